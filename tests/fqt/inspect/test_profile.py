"""profile: what is timed, that nothing else is touched, and convert's min_speedup on top of it. No time is asserted."""

from __future__ import annotations

import copy
import logging
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import fqt
from fqt import ops
from fqt.inspect import timing
from fqt.inspect.timing import Profile, Timing
from fqt.ops import Kernel
from fqt.quantizers import build
from tests.fqt.helpers import fingerprint

ONE_BIT = fqt.load_recipe("fqt_1bit").everywhere()

IMAGES = torch.randn(4, 3, 8, 8)


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(54, 5),
    )


def profile(model: nn.Module, input: object = None, **options) -> Profile:
    return fqt.profile(model, torch.randn(4, 3, 8, 8) if input is None else input, seconds=0.0, **options)


def found(result: Profile) -> dict[str, list[str]]:
    return {name: [row.product for row in result.rows if row.layer == name] for name in result.speedups()}


def test_rows_are_the_products_that_a_step_computes() -> None:
    result = profile(small(), recipe=ONE_BIT)
    both = ["output", "grad_input", "grad_weight"]
    assert found(result) == {"0": ["output", "grad_weight"], "4": both, "6": both}, "an image needs no gradient"
    assert [row.input for row in result.rows if row.product == "output"] == [(4, 3, 8, 8), (4, 4, 8, 8), (4, 54)]
    assert all(row.float_ms > 0 and row.low_ms > 0 and row.calls == 1 for row in result.rows)
    assert {row.kind for row in result.rows} == {"QuantConv2d", "QuantLinear"}
    converted = fqt.convert(small(), ONE_BIT)
    served = {row.name: row.served for row in fqt.summary(converted).rows}
    assert all(row.backend == served[row.layer][row.product] for row in profile(converted).rows)


def test_rules_decide_which_layers_are_timed_and_float_products_say_torch() -> None:
    assert list(profile(small(), recipe="fqt_1bit").speedups()) == ["4"]
    by_product = {row.product: row.backend for row in profile(small(), recipe="xnor").rows}
    assert by_product["grad_weight"] == "torch" and by_product["output"] != "torch"


def test_frozen_weights_pay_for_no_gradient_of_theirs_and_calls_add_up() -> None:
    shared = nn.Linear(6, 6).requires_grad_(False)
    model = nn.Sequential(shared, nn.ReLU(), shared, shared)
    result = profile(model, torch.randn(3, 2, 6, requires_grad=True), recipe=ONE_BIT)
    assert found(result) == {"0": ["output", "grad_input"]}
    assert {row.calls for row in result.rows} == {3}
    assert "3x2x6, 3 calls" in str(result)


class Named(nn.Module):
    """Takes keyword arguments, and does not call one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, *, x: torch.Tensor, scale: float) -> torch.Tensor:
        return self.used(input=x) * scale


def test_inputs_are_tensors_tuples_or_mappings_and_uncalled_layers_have_no_row() -> None:
    result = profile(Named(), {"x": torch.randn(2, 4), "scale": 2.0}, recipe=ONE_BIT)
    assert list(result.speedups()) == ["used"]
    assert list(profile(nn.Sequential(nn.Linear(4, 3)), (torch.randn(2, 4),), recipe=ONE_BIT).speedups()) == ["0"]


@pytest.mark.parametrize("converted", [False, True])
def test_the_model_and_the_generator_stay_as_they_were(converted: bool) -> None:
    model = small()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    if converted:
        fqt.convert(model, ONE_BIT)
    before, state, parts = copy.deepcopy(model.state_dict()), torch.get_rng_state(), fingerprint(model)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with torch.no_grad():
        profile(model, IMAGES, recipe=None if converted else "fqt_1bit")
    assert fingerprint(model) == parts and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True) if p.grad is not None)


def test_a_named_backend_is_timed() -> None:
    assert {row.backend for row in profile(fqt.convert(small(), ONE_BIT, backend="reference")).rows} == {"reference"}


def test_both_sides_are_twins_of_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(timing, "in_turns", lambda functions, device, seconds: [2.0, 4.0, 8.0] + [9.0] * 3 + [1.0, 2.0, 3.0])
    twin = timing._twin

    def spy(layer: nn.Module, low: bool) -> nn.Module:
        made.append(twin(layer, low))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(timing, "_twin", spy)
    result = profile(small(), recipe="fqt_1bit")
    assert {(m.stride, m.groups, m.bias) for m in made} == {((2, 2), 2, None)}
    assert {type(m).__name__ for m in made} == {"Conv2d", "QuantConv2d"}
    times = [(row.product, row.float_ms, row.low_ms) for row in result.rows]
    assert times == [("output", 1.0, 2.0), ("grad_input", 2.0, 4.0), ("grad_weight", 3.0, 8.0)], "the faster float side"
    assert result.speedups() == {"4": 6 / 14}


def test_the_table() -> None:
    rows = [
        Timing("a", "QuantLinear", (2, 3), 1, "output", 2.0, 1.0, "cpu"),
        Timing("b.c", "QuantLinear", (2, 3), 2, "output", 1.0, 4.0, "torch"),
    ]
    assert str(Profile(rows)).splitlines() == [
        "layer  kind         input         output ms    grad_input ms  grad_weight ms  total ms     speedup  backend",
        "-" * 107,
        "a      QuantLinear  2x3           2.00 / 1.00                                 2.00 / 1.00  2.00x    cpu",
        "b.c    QuantLinear  2x3, 2 calls  1.00 / 4.00                                 1.00 / 4.00  0.25x    torch",
        "-" * 107,
        "total                                                                         3.00 / 5.00  0.60x",
        "milliseconds: float32 / low bits, quantizing included",
    ]


def test_what_profile_refuses() -> None:
    with pytest.raises(ValueError, match=r"nothing in this Sequential is converted: pass recipe=\.\.\., or convert it first"):
        profile(small())
    with pytest.raises(ValueError, match="converted already"):
        profile(fqt.convert(small(), ONE_BIT), recipe=ONE_BIT)


# --- min_speedup -----------------------------------------------------------------------------------------------------


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the measurement says, by layer, in place of a clock."""
    said: dict[str, float] = {}

    def measure(model: nn.Module, input: object, *, seconds: float) -> Profile:
        rows = timing.measure(model, input, seconds=0.0).rows
        return Profile([replace(row, float_ms=said[row.layer], low_ms=1.0) for row in rows])

    monkeypatch.setattr(sys.modules["fqt.convert"], "measure", measure)
    return said


def test_slow_layers_stay_float_and_say_so(speeds: dict[str, float], caplog: pytest.LogCaptureFixture) -> None:
    speeds |= {"0": 0.621, "4": 1.0, "6": 3.0}
    model = small()
    with caplog.at_level(logging.INFO, "fqt"):
        fqt.convert(model, ONE_BIT, min_speedup=1.0, example=IMAGES)
    assert [name for name, _ in fqt.quantized_layers(model)] == ["4", "6"]
    assert fqt.summary(model).rows[0].note == "kept float: 0.62x measured"
    (record,) = caplog.records
    assert "2 of 3 layers converted, 1 activations replaced (2); kept float, slower than 1x: 0 0.62x" in record.getMessage()
    assert fqt.summary(fqt.revert(model)).rows[0].note == "kept float"


def test_an_uncalled_layer_is_not_judged(speeds: dict[str, float]) -> None:
    speeds["used"] = 0.5
    model = fqt.convert(Named(), ONE_BIT, min_speedup=1, example={"x": torch.randn(2, 4), "scale": 1.0})
    assert [name for name, _ in fqt.quantized_layers(model)] == ["unused"]


def test_a_real_measurement_decides_without_a_trace_on_the_rest() -> None:
    model = small()
    fqt.convert(model, ONE_BIT, min_speedup=1e-9, example=IMAGES)
    assert len(list(fqt.quantized_layers(model))) == 3 and int(model[1].num_batches_tracked) == 0


def test_auto_waits_for_the_first_batch(speeds: dict[str, float], caplog: pytest.LogCaptureFixture) -> None:
    speeds |= {"0": 0.5, "4": 1.0, "6": 3.0}
    model = fqt.convert(small(), ONE_BIT, min_speedup="auto")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = [name for name, _ in fqt.quantized_layers(model)]
    copied, reverted = copy.deepcopy(model), fqt.revert(copy.deepcopy(model))
    model.eval()(IMAGES)
    with torch.no_grad():
        model.train()(IMAGES)
    assert names == [name for name, _ in fqt.quantized_layers(model)] == ["0", "4", "6"]
    expected = fqt.convert(fqt.revert(copy.deepcopy(model)), ONE_BIT, min_speedup=1.0, example=IMAGES)
    torch.manual_seed(0)
    wanted = expected(IMAGES)
    torch.manual_seed(0)
    with caplog.at_level(logging.INFO, "fqt"):
        y = model(IMAGES)
    assert torch.equal(y, wanted), "that very forward is the new model's, and draws no other numbers"
    assert [name for name, _ in fqt.quantized_layers(model)] == ["4", "6"] and not model._forward_pre_hooks
    assert "kept float, slower than 1x: 0 0.50x" in caplog.text
    before = model[0].weight.clone()
    y.square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before), "the optimizer has the parameters still"
    assert len(list(fqt.quantized_layers(copied))) == 3 and not any(fqt.quantized_layers(reverted))
    copied(IMAGES), reverted(IMAGES)
    assert [len(list(fqt.quantized_layers(one))) for one in (copied, reverted)] == [2, 0]


def test_auto_takes_the_arguments_as_they_come_and_may_leave_all_in_float(
    speeds: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    speeds["used"] = 0.5
    model = fqt.convert(Named(), ONE_BIT, min_speedup="auto", only="used")
    with caplog.at_level(logging.WARNING, "fqt"):
        model(x=torch.randn(2, 4), scale=1.0)
    assert not any(fqt.quantized_layers(model))
    assert "every layer is slower than float32 here (used 0.50x), so it trains in float" in caplog.text


def test_auto_cannot_wait_where_the_optimizer_would_lose_parameters() -> None:
    learned = fqt.Recipe("learned", fqt.Product(build("lsq", "x"), build("lsq", "w")), *[fqt.Product("float", "saved")] * 2)
    cases = ((small(), learned, r"parameters of their own \(0\."), (nn.Linear(3, 3), ONE_BIT, "a layer itself"))
    for model, recipe, words in cases:
        with pytest.raises(ValueError, match=rf'"auto" cannot wait for a batch, because .*{words}.*give example='):
            fqt.convert(model, recipe, min_speedup="auto")
        assert not any(fqt.quantized_layers(model))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_speedup": 1.0}, r"min_speedup=1 is measured: give example=, an input as large as in training"),
        ({"min_speedup": 0, "example": IMAGES}, "min_speedup is 0, not a positive number"),
        ({"min_speedup": "1", "example": IMAGES}, "min_speedup is '1', not a positive number"),
        ({"min_speedup": 2.0, "example": IMAGES}, r"is slower than min_speedup=2 \(0 1.00x, 4 1.00x, 6 1.00x\); lower it"),
    ],
)  # fmt: skip
def test_what_min_speedup_refuses(speeds: dict[str, float], options: dict, words: str) -> None:
    speeds |= {"0": 1.0, "4": 1.0, "6": 1.0}
    model = small()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=words):
        fqt.convert(model, ONE_BIT, **options)
    assert fingerprint(model) == before


def test_a_named_backend_that_cannot_serve_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "KERNELS", [Kernel("output", "mine", "cpu", "none:none", lambda request: "no"), *ops.KERNELS])
    model = small()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="layer '0', quantize output.x: backend 'mine' does not serve"):
        fqt.convert(model, ONE_BIT, backend="mine", min_speedup=1.0, example=IMAGES)
    assert fingerprint(model) == before


def test_an_example_that_does_not_fit_leaves_the_model_as_it_was() -> None:
    model = small()
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 5"):
        fqt.convert(model, ONE_BIT, example=torch.randn(4, 5, 8, 8))
    assert fingerprint(model) == before
