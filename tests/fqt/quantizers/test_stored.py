"""Stored ranges: the codes of a fixed range, on every backend's encode; in state dicts, copies, files and graphs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fqt
from fqt.cpu import library
from fqt.quantizers import build, quantize
from fqt.quantizers.stored import Range, Stored
from fqt.testing import assert_same_codes

BACKENDS = ["reference", *(["cpu"] if library.refuses() is None else [])]


def stated(low: list[float], high: list[float]) -> dict[str, nn.Module]:
    state = Range(len(low))
    state.set(torch.tensor(low), torch.tensor(high))
    return {"stored": state}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_those_of_the_range_as_fixed_limits(backend, bits):
    x = 2 * torch.randn(3, 5, 12)
    for stored, fixed in (
        (
            build("uniform", "x", bits=bits, calibrate="stored"),
            fqt.Quantizer("int", bits, calibrate="none", limits=(-1.5, 1.5)),
        ),
        (
            build("affine", "x", bits=bits, calibrate="stored"),
            fqt.Quantizer("uint", bits, calibrate="none", limits=(-1.5, 1.5), offset=True),
        ),
    ):
        q, _ = quantize(x, stored, "x", state=stated([-1.5], [1.5]), backend=backend)
        assert_same_codes(q, quantize(x, fixed, "x", backend="reference")[0])
    assert float(q.decode().abs().max()) == pytest.approx(1.5), "and what lies outside saturates"


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_output_channel_has_its_own_range(backend):
    w, high = torch.randn(3, 2, 8), [0.5, 1.0, 2.0]
    quantizer = build("uniform", "w", bits=4, granularity="channel", calibrate={"stored": {"groups": 3}})
    q, _ = quantize(w, quantizer, "w", state=stated([-h for h in high], high), backend=backend)
    assert torch.equal(q.scale, torch.tensor(high) / 7)


def test_one_range_serves_all_groups_of_a_tensor():
    quantizer = build("uniform", "x", granularity="sample", calibrate="stored")
    q, _ = quantize(torch.randn(4, 3, 5), quantizer, "x", state=stated([-1.0], [1.0]))
    assert torch.equal(q.scale, torch.full((4,), 1.0) / 127)


def recipe(bits: int = 4) -> fqt.Recipe:
    x = build("uniform", "x", bits=bits, calibrate="stored", estimator="stored")
    saved = fqt.Product("float", "saved")
    return fqt.Recipe("static", fqt.Product(x, build("uniform", "w")), saved, saved)


def with_range(layer: nn.Module, high: float) -> nn.Module:
    layer.quantizers.output_x.stored.set(torch.tensor([-high]), torch.tensor([high]))
    return layer


def test_the_gradient_of_x_passes_inside_the_range_alone():
    layer = with_range(fqt.convert(nn.Linear(5, 3), recipe()), 1.0)
    x = torch.tensor([[-1.5, -1.0, 0.2, 1.0, 1.01]], requires_grad=True)
    layer(x).sum().backward()
    passed = layer.quantized_weight().decode().sum((0, 1))
    assert torch.allclose(x.grad, passed * torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]))


def test_without_a_range_it_says_where_one_comes_from():
    layer = fqt.convert(nn.Linear(5, 3), recipe())
    with pytest.raises(RuntimeError, match=r"no range is stored yet for this layer: fqt.calibrate\(model, loader\) finds it"):
        layer(torch.ones(1, 5))


def test_the_range_goes_through_state_dicts_copies_and_a_whole_graph():
    layer, x = with_range(fqt.convert(nn.Linear(5, 3), recipe()), 0.75), torch.randn(2, 5)
    again = fqt.convert(nn.Linear(5, 3), recipe())
    again.load_state_dict(layer.state_dict())
    expected = layer(x)
    for other in (again, copy.deepcopy(layer), torch.compile(again, fullgraph=True, backend="aot_eager")):
        assert torch.equal(other(x), expected)
    assert [name for name, _ in layer.named_buffers()] == ["quantizers.output_x.stored.low", "quantizers.output_x.stored.high"]
    assert torch.equal(layer.double().quantizers.output_x.stored.high, torch.tensor([0.75]).double())


def test_a_nan_shows_and_an_infinity_saturates():
    layer = with_range(fqt.convert(nn.Linear(2, 1), recipe()), 1.0)
    assert layer(torch.tensor([[torch.nan, 0.0]])).isnan().all()
    assert torch.equal(layer(torch.tensor([[torch.inf, 0.0]])), layer(torch.tensor([[1.0, 0.0]])))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Stored(0), "groups 0 is not a positive integer"),
        (lambda: build("affine", "x", calibrate={"stored": {"group": 2}}), "did you mean 'groups'"),
        (
            lambda: fqt.Recipe(
                "bad",
                fqt.Product(fqt.Quantizer("sign", 1, "tensor", "stored"), build("uniform", "w")),
                *[fqt.Product("float", "saved")] * 2,
            ),
            "output.x: stored keeps one range, or one for each output channel, and sign has no range at all",
        ),
    ],
)
def test_what_it_cannot_be_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
