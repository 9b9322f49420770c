"""Transposed convolutions by a recipe: at 16 bits what torch computes, at 1 bit what torch computes of the signs."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import fqt
from tests.fqt.layers.cases import INT16, step

XNOR = fqt.load_recipe("xnor").everywhere()
LAYERS = {
    "unet": (nn.ConvTranspose2d(4, 6, 2, stride=2), (3, 4, 5, 4)),
    "dcgan": (nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1, bias=False), (3, 4, 5, 4)),
    "overlap": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (3, 4, 5, 4)),
    "one": (nn.ConvTranspose2d(4, 6, 3, padding=2), (3, 4, 5, 4)),
    "gaps": (nn.ConvTranspose2d(4, 6, 2, stride=3), (3, 4, 3, 4)),
    "dilated": (nn.ConvTranspose2d(4, 6, 3, stride=2, dilation=3, padding=2), (3, 4, 5, 4)),
    "dilated by two": (nn.ConvTranspose2d(4, 6, 3, stride=4, dilation=2, padding=1, output_padding=3), (3, 4, 5, 4)),
    "groups": (nn.ConvTranspose2d(4, 6, (3, 4), stride=(1, 2), groups=2), (3, 4, 5, 4)),
    "unbatched": (nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1), (4, 5, 4)),
    "1d": (nn.ConvTranspose1d(4, 6, 16, stride=8, padding=4), (3, 4, 5)),
    "3d": (nn.ConvTranspose3d(4, 6, (3, 2, 2), stride=2, padding=(1, 0, 0), output_padding=(1, 0, 0)), (2, 4, 3, 3, 2)),
    "3d gaps": (nn.ConvTranspose3d(4, 6, 2, stride=(3, 2, 1), dilation=(2, 1, 1), groups=2, bias=False), (2, 4, 2, 3, 3)),
    "3d unbatched": (nn.ConvTranspose3d(4, 6, 3, padding=1), (4, 3, 3, 2)),
    "1d unbatched": (nn.ConvTranspose1d(4, 6, 5, stride=2, output_padding=1, groups=2), (4, 5)),
}  # fmt: skip
layers = pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)


@layers
def test_sixteen_bits_give_what_torch_does(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x, made = torch.randn(shape), fqt.convert(copy.deepcopy(layer), INT16)
    for one, other in zip(step(made, x), step(copy.deepcopy(layer), x), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3 * float(other.abs().max()))


@layers
def test_signs_are_multiplied_and_nothing_between_pixels(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """A scale for the whole weight and one magnitude: then every phase has the same scale."""
    layer, x = copy.deepcopy(layer), torch.randn(shape)
    with torch.no_grad():
        layer.weight.copy_(0.3 * torch.sign(layer.weight))
        expected = layer(x.sign())
        made = fqt.convert(layer, XNOR)
        torch.testing.assert_close(made(x), expected, rtol=1e-5, atol=1e-5)


@layers
def test_everything_that_asks_about_layers_knows_it(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer, x = copy.deepcopy(layer), torch.randn(shape)
    kind, keys, plain = type(layer), list(layer.state_dict()), layer(x)
    fqt.convert(layer, fqt.load_recipe("fqt_1bit").everywhere())
    assert isinstance(layer, kind) and list(layer.state_dict()) == keys
    y = layer(x)
    (row,) = fqt.summary(layer).rows
    assert row.madds == math.prod(shape[-len(layer.kernel_size) :]) * layer.weight.numel()
    assert row.backend == "cpu"
    with fqt.observe_gradients(layer) as seen:
        layer(x).square().sum().backward()
    assert y.shape == plain.shape and seen[""].keys() == {"grad_input", "grad_weight"}
    assert len(fqt.profile(layer, x, seconds=0.0).rows) == 2
    q = layer.quantized_weight()
    assert q is not None and q.shape == tuple(layer.weight_OKI().shape)
    fqt.revert(layer)
    assert type(layer) is kind and torch.equal(layer(x), plain)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1), (2, 4, 9)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 5, 6)),
        (nn.ConvTranspose3d(4, 6, 2, stride=(1, 2, 1)), (2, 4, 3, 4, 3)),
    ],
    ids=["1d", "2d", "3d"],
)
@pytest.mark.every(3)
def test_it_compiles_whole(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer, x = fqt.convert(copy.deepcopy(layer), fqt.load_recipe("fqt_1bit").everywhere()).eval(), torch.randn(shape)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


def test_an_output_size_may_be_given() -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1)
    made, x = fqt.convert(copy.deepcopy(layer), INT16), torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(made(x, output_size=[10, 9]), layer(x, output_size=[10, 9]), rtol=1e-2, atol=1e-3)
    with pytest.raises(ValueError, match="requested an output size"):
        made(x, output_size=[12, 9])
    with pytest.raises(ValueError, match="padding 3 leaves no output of the input's 1 pixels"):
        fqt.convert(nn.ConvTranspose1d(2, 2, 3, padding=3), INT16)(torch.randn(1, 2, 1))


def test_depthwise_ones_stay_float() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 4, 3, groups=4), nn.ConvTranspose2d(4, 4, 3))
    fqt.convert(model, replace(XNOR, rules=fqt.load_recipe("xnor").rules[-1:]))
    assert [name for name, _ in fqt.quantized_layers(model)] == ["0", "2"]
