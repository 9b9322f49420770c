"""Transposed linear layers are known by their class's path, and compute what nn.Linear does with the weight turned."""

from __future__ import annotations

import copy
import pickle
import sys
import types

import pytest
import torch
from torch import nn

import fqt


class Conv1D(nn.Module):
    """As transformers' own: weight (in, out), and a bias."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.02)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.view(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


@pytest.fixture(autouse=True)
def _transformers(monkeypatch: pytest.MonkeyPatch):
    """The class where transformers has it; where that is installed, its own class stays what it is."""
    module = types.ModuleType("transformers.pytorch_utils")
    module.Conv1D = Conv1D  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", module)
    monkeypatch.setattr(Conv1D, "__module__", "transformers.pytorch_utils")


def block() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Conv1D(24, 16), nn.GELU(), Conv1D(16, 24))


def turned(model: nn.Module) -> nn.Module:
    linear = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
    for one, other in zip(linear, model, strict=True):
        if isinstance(one, nn.Linear):
            one.weight, one.bias = nn.Parameter(other.weight.detach().T.contiguous()), nn.Parameter(other.bias.detach().clone())
    return linear


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(1)
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    y.square().sum().backward()
    return [y.detach(), leaf.grad, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("recipe", ["int8", "fqt_1bit", "fqt_w1a1g6", "dorefa_w8a8g8"])
@pytest.mark.parametrize("shape", [(6, 16), (3, 5, 16)], ids=str)
def test_it_is_a_linear_layer_turned(recipe, shape):
    model, chosen = block(), fqt.load_recipe(recipe).everywhere()
    linear = fqt.convert(turned(model), chosen)
    fqt.convert(model, chosen)
    x = torch.randn(shape)
    for one, other in zip(step(model, x), step(linear, x), strict=True):
        assert torch.equal(one, other.T if one.shape != other.shape else other)


def test_everything_that_asks_about_layers_knows_it():
    model, x = block(), torch.randn(3, 5, 16)
    plain = copy.deepcopy(model)
    fqt.convert(model, fqt.load_recipe("int8").everywhere())
    assert model.state_dict().keys() == plain.state_dict().keys()
    expected = model(x)
    assert [(row.kind, row.madds) for row in fqt.summary(model).rows] == [("QuantConv1D", 5 * 16 * 24)] * 2
    assert isinstance(model[0], Conv1D) and isinstance(model[0], fqt.QuantizedLayer)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again[0]) is type(model[0]) and torch.equal(again(x), expected)
    assert {row.layer for row in fqt.profile(model, x, seconds=0.01).rows} == {"0", "2"}
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    fqt.revert(model)
    assert type(model[0]) is Conv1D and torch.equal(model(x), plain(x))


def test_a_class_of_that_name_elsewhere_is_left_alone(monkeypatch):
    monkeypatch.setattr(Conv1D, "__module__", "somebody.else")
    model = nn.Sequential(Conv1D(8, 4), nn.Linear(8, 3))
    fqt.convert(model, fqt.load_recipe("int8").everywhere())
    assert type(model[0]) is Conv1D and [row.kind for row in fqt.summary(model).rows] == ["Conv1D", "QuantLinear"]
