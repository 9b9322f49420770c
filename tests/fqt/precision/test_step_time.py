"""The calibrated model: it adds up, times a layer once for each set of backends, and touches nothing."""

from __future__ import annotations

import pytest
import torch

import fqt
from fqt.inspect.timing import Timing
from fqt.precision import Precision, StepTime, at_precision, step_time
from tests.fqt.precision.small_run import batch, network


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What was timed, each layer 10 ms in float32, as many ms as its word has bits in low bits."""
    seen: list[tuple[str, int]] = []

    def fake(name, layer, calls, seconds):
        bits = layer.recipe.bits("output")
        seen.append((name, bits))
        return [Timing(name, "", (1,), calls.total(), "output", 10.0, float(bits), "")]

    monkeypatch.setattr(step_time, "time_layer", fake)
    return seen


def test_a_layer_is_timed_once_for_each_set_of_backends(timed: list[tuple[str, int]]) -> None:
    model = network("adapt")
    predict = StepTime(model, batch(0)[0], 100.0)
    assert predict(model) == 100 + 3 * (16 - 10)
    assert [name for name, _ in timed] == ["0", "5", "7"]
    start = model[5].recipe
    model[5].recipe = at_precision(start, Precision(12, 4))
    assert predict(model) == 100 + 3 * (16 - 10), "the same backends, so the same time"
    model[5].recipe = at_precision(start, Precision(20, 4))
    assert predict(model) == 100 + 2 * (16 - 10) + (32 - 10)
    model[5].recipe = start
    predict(model)
    assert len(timed) == 4


def test_accumulated_forwards_count(timed: list[tuple[str, int]]) -> None:
    model = network("adapt")
    assert StepTime(model, batch(0)[0], 100.0, forwards=4)(model) == 100 + 4 * 3 * 6


def test_predicting_leaves_generator_weights_and_gradients_alone() -> None:
    model = network("adapt_calibrated")
    before, weights = torch.get_rng_state(), [p.detach().clone() for p in model.parameters()]
    milliseconds = StepTime(model, batch(0)[0], 50.0, seconds=0.001)(model)
    assert milliseconds != 50.0
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert not any("_fqt_macs" in module.__dict__ for module in model.modules())
    assert fqt.summary(model).rows[0].madds is None
