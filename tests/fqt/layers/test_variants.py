"""Known subclasses compute by a recipe what they computed before: at 16 bits their own output and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, Linear, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn

import fqt
from tests.fqt.layers.cases import INT16, step

LAYERS = {
    "timm linear": (lambda: Linear(6, 5, bias=False), (3, 2, 6)),
    "same": (lambda: Conv2dSame(4, 6, 3, stride=2), (3, 4, 8, 7)),
    "same dilated": (lambda: Conv2dSame(4, 6, (3, 2), dilation=2, groups=2, bias=False), (3, 4, 8, 7)),
    "standardized": (lambda: StdConv2d(4, 6, 3, stride=2), (3, 4, 8, 8)),
    "standardized same": (lambda: StdConv2dSame(4, 6, 3, stride=2), (3, 4, 8, 7)),
    "standardized same static": (lambda: StdConv2dSame(4, 6, 3), (3, 4, 8, 7)),
    "scaled": (lambda: ScaledStdConv2d(4, 6, 3, gamma=1.7, gain_init=0.7), (3, 4, 8, 8)),
    "scaled same": (lambda: ScaledStdConv2dSame(4, 6, 2, stride=2, gamma=1.7), (3, 4, 7, 7)),
}
layers = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


@layers
def test_sixteen_bits_give_what_the_plain_class_does(make, shape) -> None:
    layer, x = make(), torch.randn(shape)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = step(copy.deepcopy(layer), x)
    fqt.convert(layer, INT16)
    for one, other in zip(step(layer, x), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3 * float(other.abs().max()))


@layers
def test_everything_that_asks_about_layers_knows_it(make, shape) -> None:
    layer, x = make(), torch.randn(shape)
    kind, keys, plain = type(layer), list(layer.state_dict()), layer(x)
    fqt.convert(layer, fqt.load_recipe("fqt_1bit").everywhere())
    assert isinstance(layer, kind) and type(layer).__name__ == f"Quant{kind.__name__}"
    assert list(layer.state_dict()) == keys and len(fqt.profile(layer, x, seconds=0.0).rows) == 2
    y = layer(x)
    (row,) = fqt.summary(layer).rows
    assert row.madds == y[0].numel() // layer.weight.shape[0] * layer.weight.numel() and row.backend != "torch"
    fqt.revert(layer)
    assert type(layer) is kind and torch.equal(layer(x), plain)


def test_padding_is_zero_not_a_sign() -> None:
    layer, x = Conv2dSame(3, 5, 3, stride=2, bias=False), torch.randn(2, 3, 7, 7)
    fqt.convert(layer, fqt.load_recipe("xnor").everywhere())
    weight = layer.weight.sign() * layer.weight.abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(layer(x), F.conv2d(F.pad(x.sign(), [1, 1, 1, 1]), weight, stride=2))


def test_other_subclasses_are_left_alone() -> None:
    class Mine(Conv2dSame):
        pass

    model = fqt.convert(nn.Sequential(nn.Conv2d(3, 3, 1), Mine(3, 3, 1)), fqt.load_recipe("int8").everywhere())
    assert type(model[1]) is Mine
