"""Convolutions of clips by a recipe: at 16 bits what torch computes, at 1 bit what torch computes of the signs."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

import fqt
from tests.fqt.layers.cases import INT16, step

LAYERS = {
    "cube": (nn.Conv3d(4, 6, 3, padding=1), (2, 4, 5, 6, 5)),
    "strided": (nn.Conv3d(4, 6, (3, 2, 3), stride=(2, 1, 2), padding=(2, 0, 1), bias=False), (2, 4, 5, 6, 5)),
    "frames": (nn.Conv3d(4, 6, (1, 3, 3), stride=(2, 1, 1)), (2, 4, 5, 6, 5)),
    "time": (nn.Conv3d(4, 6, (3, 1, 1), padding=(1, 0, 0), groups=2), (2, 4, 5, 6, 5)),
    "dilated": (nn.Conv3d(4, 6, 2, dilation=(3, 1, 2), padding=(3, 1, 0)), (2, 4, 2, 6, 5)),
    "same": (nn.Conv3d(4, 6, (3, 1, 5), dilation=(1, 1, 2), padding="same"), (2, 4, 5, 6, 9)),
    "unbatched": (nn.Conv3d(4, 6, 3, padding=1), (4, 5, 6, 5)),
    "circular": (nn.Conv3d(4, 6, 3, padding=(1, 2, 0), padding_mode="circular"), (2, 4, 5, 6, 5)),
    "replicate": (nn.Conv3d(4, 6, 3, padding=(1, 2, 0), padding_mode="replicate"), (2, 4, 5, 6, 5)),
}
layers = pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)


@layers
def test_sixteen_bits_give_what_torch_does(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x, made = torch.randn(shape), fqt.convert(copy.deepcopy(layer), INT16)
    for one, other in zip(step(made, x), step(copy.deepcopy(layer), x), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3 * float(other.abs().max()))


@layers
def test_signs_are_multiplied_and_nothing_beyond_the_ends(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer, x = copy.deepcopy(layer), torch.randn(shape)
    with torch.no_grad():
        layer.weight.copy_(0.3 * torch.sign(layer.weight))
        expected = layer(x.sign())
        fqt.convert(layer, fqt.load_recipe("xnor").everywhere())
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@layers
def test_everything_that_asks_about_layers_knows_it(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer, x = copy.deepcopy(layer), torch.randn(shape)
    plain = layer(x)
    fqt.convert(layer, fqt.load_recipe("fqt_1bit").everywhere())
    assert layer(x).shape == plain.shape
    (row,) = fqt.summary(layer).rows
    assert row.madds == plain.shape[-3:].numel() * layer.weight.numel() and row.backend == "cpu"
    with fqt.observe_gradients(layer) as seen:
        layer(x).square().sum().backward()
    assert seen[""].keys() == {"grad_input", "grad_weight"}
    assert len(fqt.profile(layer, x, seconds=0.0).rows) == 2
    fqt.revert(layer)
    assert type(layer) is nn.Conv3d and torch.equal(layer(x), plain)


def test_a_clip_that_is_too_short_is_named() -> None:
    with pytest.raises(ValueError, match="a window of 3 frames .dilation 1. does not fit 2 padded by 0: give more frames"):
        fqt.convert(nn.Conv3d(3, 3, 3), INT16)(torch.randn(1, 3, 2, 5, 5))


def test_a_video_network_trains_a_step() -> None:
    model = fqt.convert(torchvision.models.video.r3d_18(num_classes=3), "int8")
    assert len(list(fqt.quantized_layers(model))) == 19, "subclasses of nn.Conv3d that compute what it does"
    assert fqt.profile(model.layer1, torch.randn(1, 64, 2, 4, 4), seconds=0.0).rows
    loss = model(torch.randn(2, 3, 4, 16, 16)).square().sum()
    loss.backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
