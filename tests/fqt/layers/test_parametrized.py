"""Parametrized layers: converted beneath their parametrization, which goes on, can be removed, and is back after revert."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fqt
from tests.fqt.helpers import fingerprint
from tests.fqt.layers.cases import INT16, step

ONE_BIT = fqt.load_recipe("fqt_1bit").everywhere()


class Doubled(nn.Module):
    """Somebody's parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


def doubled(layer: nn.Module) -> nn.Module:
    name = "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"
    return parametrize.register_parametrization(layer, name, Doubled())


LAYERS = {
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(6, 5)), (3, 6)),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(4, 6, 3)), (3, 4, 6, 5)),
    "somebody's": (lambda: doubled(nn.Conv1d(4, 6, 3)), (3, 4, 6)),
    "3d": (lambda: parametrizations.spectral_norm(nn.Conv3d(2, 3, 3)), (2, 2, 4, 4, 4)),
    "transposed": (lambda: parametrizations.weight_norm(nn.ConvTranspose1d(4, 6, 3)), (3, 4, 6)),
}
layers = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


@layers
def test_sixteen_bits_give_what_torch_does_buffers_included(make, shape) -> None:
    plain, x = make(), torch.randn(shape)
    made = fqt.convert(copy.deepcopy(plain), INT16)
    fqt.summary(made)
    for one, other in zip([*step(made, x), *made.buffers()], [*step(plain, x), *plain.buffers()], strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3 * float(other.abs().max()))
    for one, other in zip(made.buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, other), "a forward is one power iteration, and looking is none"


@layers
def test_conversion_and_looking_change_nothing_and_revert_gives_the_layer_back(make, shape) -> None:
    model = nn.Sequential(make(), nn.Flatten())
    before, names = fingerprint(model), [name for name, _ in model.named_parameters()]
    values = copy.deepcopy(model.state_dict())
    fqt.convert(model, ONE_BIT)
    assert isinstance(model[0], fqt.QuantizedLayer) and parametrize.is_parametrized(model[0])
    assert [name for name, _ in model.named_parameters()] == names
    fqt.summary(model), model[0].quantized_weight(), copy.deepcopy(model)
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    x = torch.randn(shape)
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert fqt.summary(model).rows[0].madds is not None
    assert torch.equal(copy.deepcopy(model).eval()(x), model.eval()(x))
    fqt.revert(model.train())
    assert [part[2:] for part in fingerprint(model) if len(part) > 4] == [part[2:] for part in before if len(part) > 4]


def test_a_parametrization_may_be_removed_in_between() -> None:
    layer = fqt.convert(parametrizations.weight_norm(nn.Linear(6, 5)), INT16)
    with torch.no_grad():
        x = torch.randn(3, 6)
        expected = layer(x)
        parametrize.remove_parametrizations(layer, "weight")
        assert type(layer) is fqt.QuantLinear and torch.equal(layer(x), expected)
    assert type(fqt.revert(layer)) is nn.Linear


def test_one_more_since_must_go_first() -> None:
    layer = fqt.convert(doubled(nn.Linear(6, 5)), INT16)
    parametrize.register_parametrization(layer, "bias", Doubled())
    with pytest.raises(ValueError, match="remove_parametrizations"):
        fqt.revert(layer)
    parametrize.remove_parametrizations(layer, "bias")
    fqt.revert(layer)
    assert type(layer).__name__ == "ParametrizedLinear" and type(layer).__bases__ == (nn.Linear,)


def test_an_attentions() -> None:
    model = doubled(nn.MultiheadAttention(8, 2))
    x = torch.randn(5, 2, 8)
    plain = model(x, x, x)[0]
    fqt.convert(model, INT16)
    torch.testing.assert_close(model(x, x, x)[0], plain, rtol=1e-2, atol=1e-3)
    assert torch.equal(fqt.revert(model)(x, x, x)[0], plain)
