"""freeze: what a frozen model computes is what the model that it was made of does in evaluation, bit for bit."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import fqt
from fqt.packed import PackedWeight
from fqt.quantizers import build
from fqt.recipe import Product, Recipe
from tests.fqt.helpers import fits_convolutions, fingerprint

RECIPES = [name for name in fqt.recipes() if name != "fp32"]


def everywhere(name: str) -> Recipe:
    return fqt.load_recipe(name).everywhere()


def stages(x: dict, w: dict, transform: object = None) -> Recipe:
    """A recipe of other stages; what it needs of the backward is float."""
    back = "float" if transform else "saved"
    return Recipe(
        "stages",
        Product(build(letter="x", **x), build(letter="w", **w), transform),
        Product("float", back),
        Product("float", back),
    )


class Convolutions(nn.Module):
    """Every kind of convolution, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode="reflect")
        self.standardized = timm.layers.ScaledStdConv2dSame(6, 6, 3, stride=2)
        self.norm = nn.BatchNorm2d(6)
        self.pool = nn.MaxPool2d(2)
        self.again = nn.Conv2d(6, 8, (3, 2), padding="same")
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2)
        self.one = nn.Conv1d(6, 6, 3, padding=2, dilation=2)
        self.up_one = nn.ConvTranspose1d(6, 4, 2, stride=3, output_padding=1)
        self.three = nn.Conv3d(2, 4, (2, 3, 1), padding=(1, 1, 0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.again(self.pool(self.norm(self.standardized(self.two(x))))))
        x = self.up_one(self.one(x.flatten(2)))
        return self.three(x.unflatten(1, (2, 2)).unflatten(3, (-1, 5))).flatten(1)


class Linears(nn.Module):
    """Attention, a tied head, a transposed linear layer, one whose weight is computed by its module, one that is pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.flat = nn.LayerNorm(8), nn.Linear(8, 8)
        self.twin = nn.Linear(8, 8)
        self.twin.weight = self.flat.weight
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.lent = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = self.normed(torch.tanh(self.twin(torch.tanh(self.flat(x)))))
        return self.head(x + F.linear(x, self.lent.weight, self.lent.bias))


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, NaN included."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.nan_to_num(nan=7.0), other.nan_to_num(nan=7.0))
    )


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    """After a step, so that running statistics, learned steps and BatchNorms are no longer what they began with."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(x).float().square().mean().backward()
    optimizer.step()
    return model.eval()


def check(model: nn.Module, x: Tensor) -> nn.Module:
    """Freeze, and compare; the frozen model."""
    before, parts = fingerprint(model), model.state_dict()
    frozen = fqt.freeze(model)
    assert fingerprint(model) == before and model.state_dict().keys() == parts.keys()
    with torch.no_grad():
        expected = model(x)
        assert same(frozen(x), expected)
    assert same(frozen(x).detach(), expected), "and where gradients are enabled"
    return frozen


@pytest.mark.parametrize("name", [name for name in RECIPES if fits_convolutions(fqt.load_recipe(name))])
def test_convolutions_compute_the_same_bits(name: str) -> None:
    x = torch.randn(3, 4, 17, 16)
    check(trained(fqt.convert(Convolutions(), everywhere(name)), x), x)


@pytest.mark.parametrize("name", RECIPES)
def test_linear_layers_compute_the_same_bits(name: str) -> None:
    x = torch.randint(11, (3, 5))
    model = trained(fqt.convert(Linears(), everywhere(name), example=x), x)
    frozen = check(model, x)
    assert frozen.flat.packed is frozen.twin.packed, "layers that share a weight share its codes"
    assert not any(p.requires_grad for p in frozen.parameters())
