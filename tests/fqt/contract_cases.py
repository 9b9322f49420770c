"""What tests of training contracts share: every low-bit recipe, a network, its gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fqt
from fqt.quantizers import build
from fqt.recipe import Product, Recipe, Rule

LOW_BIT = [name for name in fqt.recipes() if name != "fp32" and Rule("<conv>", None) not in fqt.load_recipe(name).rules]
_WEIGHT = build("fixed_point", "w", word_length=6, fraction_length=4)
_ACTIVATION = build("affine", "x", bits=3, stochastic=True)
_GRADIENT = build("psq", "g", bits=4)
assert _WEIGHT is not None
assert _ACTIVATION is not None
assert _GRADIENT is not None
STOCHASTIC_FORWARD = Recipe(
    "stochastic_forward", Product(_ACTIVATION, _WEIGHT), Product(_GRADIENT, "saved"), Product(_GRADIENT, "saved")
)
RECIPES = {name: fqt.load_recipe(name).everywhere() for name in LOW_BIT} | {"stochastic_forward": STOCHASTIC_FORWARD}
RANDOM = {name: recipe for name, recipe in RECIPES.items() if recipe.random}
recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


class Net(nn.Module):
    """Two convolutions with a dropout between, one of them called twice, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.twice = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.drop = nn.Dropout(0.4)
        self.head = nn.Linear(6 * 25, 4)

    def segments(self) -> list[Callable[[Tensor], Tensor]]:
        return [
            lambda x: self.drop(torch.tanh(self.first(x))),
            lambda x: torch.tanh(self.twice(self.twice(x))),
            lambda x: self.head(self.drop(x).flatten(1)),
        ]

    def forward(self, x: Tensor) -> Tensor:
        for segment in self.segments():
            x = segment(x)
        return x


def net(recipe: Recipe, seed: int = 3) -> Net:
    torch.manual_seed(seed)
    return fqt.convert(Net(), recipe)  # type: ignore[return-value]


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, 3, 5, 5, generator=generator), torch.randint(4, (n,), generator=generator)


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor] | None = None, n: int = 6) -> list[Tensor]:
    """[loss, gradient of the input, gradients of the parameters] of one step from one seed."""
    x, target = batch(n)
    x.requires_grad_()
    model.zero_grad()
    torch.manual_seed(11)
    loss = nn.functional.cross_entropy((run or model)(x), target)
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert x.grad is not None
    return [loss.detach(), x.grad.clone(), *(g.clone() for g in grads), torch.get_rng_state()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
