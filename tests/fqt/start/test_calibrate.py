"""calibrate: what ranges it stores, on which loaders, what it leaves alone, and that the ranges go wherever the model goes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fqt
from fqt.quantizers import build
from fqt.quantizers.stored import Stored
from tests.fqt.helpers import pickled, small

BATCHES = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(3)]


def everywhere(recipe: str) -> fqt.Recipe:
    return fqt.load_recipe(recipe).everywhere()


def converted(recipe: str = "int8") -> nn.Module:
    return fqt.convert(small(), everywhere(recipe)).eval()


def linear(x: str | fqt.Quantizer = "uniform", w: str | fqt.Quantizer = "uniform", **options: object) -> nn.Module:
    """One layer by a recipe of its own."""
    x = build(x, "x", **options) if isinstance(x, str) else x
    w = build(w, "w") if isinstance(w, str) else w
    saved = fqt.Product("float", "saved")
    return fqt.convert(nn.Linear(6, 3), fqt.Recipe("own", fqt.Product(x, w), saved, saved))


def span(layer: nn.Module, letter: str = "x") -> tuple[torch.Tensor, torch.Tensor]:
    state = getattr(layer.quantizers, f"output_{letter}").stored
    return state.low, state.high


# --- ranges ---------------------------------------------------------------------------------------------------------------


def test_max_is_the_largest_value_that_a_layer_reads_in_any_batch():
    layer = linear()
    batches = [torch.randn(4, 6), 3 * torch.randn(4, 6), torch.randn(4, 6)]
    report = fqt.calibrate(layer, batches, method="max", weights=False)
    largest = torch.cat(batches).abs().max()
    assert [float(end) for end in span(layer)] == [-float(largest), float(largest)]
    (row,) = report.rows
    assert (row.layer, row.operand, row.method, row.high) == ("", "x", "max", float(largest))
    scale = largest / 127
    error = ((torch.cat(batches) / scale).round() * scale - torch.cat(batches)).square().sum() / torch.cat(
        batches
    ).square().sum()
    assert row.after == pytest.approx(float(error), rel=0.05) and row.before < row.after, "each batch had a range of its own"


def test_methods_clip_outliers_and_weights_get_the_best_range_of_each_channel():
    x = torch.randn(200, 6)
    x[0, 0] = 10.0
    highs = {}
    for method in ("max", "percentile", "mse"):
        layer = linear(w=build("uniform", "w", bits=4, granularity="channel"), bits=4)
        report = fqt.calibrate(layer, [x], method=method, percent=99.0)
        highs[method] = float(span(layer)[1])
        assert span(layer, "w")[1].shape == (3,)
        weight = next(row for row in report.rows if row.operand == "w")
        assert weight.after < weight.before and weight.method == "mse"
    assert highs["percentile"] < highs["mse"] < highs["max"] == 10.0


def test_ranges_are_those_of_the_float_network_and_eval_uses_them():
    plain = small().eval()
    model = fqt.convert(copy.deepcopy(plain), everywhere("int4"))
    report = fqt.calibrate(model, BATCHES, method="max", weights=False)
    found = {row.layer: row.high for row in report.rows}
    seen: dict[str, float] = {}
    for name in found:
        plain.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, max(seen.get(name, 0.0), float(args[0].abs().max())))
        )
    with torch.no_grad():
        for x in BATCHES:
            plain(x)
    assert found == pytest.approx(seen, rel=1e-3), "but for activations of 16 bits"
    assert all(isinstance(layer.recipe.quantizer("output", "x").calibrate, Stored) for _, layer in fqt.quantized_layers(model))
    one = model(BATCHES[0])
    assert torch.equal(model(torch.cat(BATCHES))[:4], one), "a static range does not see the other samples"


def test_an_8_bit_network_stays_near_the_float_one():
    plain = small().eval()
    model = fqt.convert(copy.deepcopy(plain), everywhere("int8"))
    fqt.calibrate(model, BATCHES)
    with torch.no_grad():
        expected = plain(BATCHES[0])
        assert float((model(BATCHES[0]) - expected).norm() / expected.norm()) < 0.05


def test_an_offset_has_both_ends():
    layer = linear("affine", bits=8)
    fqt.calibrate(layer, [torch.rand(50, 6) + 2.0], method="max")
    low, high = span(layer)
    assert 2.0 <= float(low) < 2.1 < 2.9 < float(high) <= 3.0


@pytest.mark.parametrize(
    ("quantizer", "state"),
    [
        ({"calibrate": "moving_average"}, "moving_average.average"),
        ("pact", "pact.alpha"),
        ("lsq", "lsq.step"),
    ],
)
def test_quantizers_with_a_range_of_their_own_get_it_set(quantizer, state):
    layer = linear(quantizer, bits=4) if isinstance(quantizer, str) else linear(**quantizer)
    x = torch.randn(64, 6).abs()
    fqt.calibrate(layer, [x], method="max", weights=False)
    steps = 7 if "step" in state else 1
    found = layer.quantizers.output_x.get_submodule(state.split(".")[0]).state_dict()[state.split(".")[1]]
    assert float(found) * steps == pytest.approx(float(x.max()), rel=1e-6)
    layer.eval()
    assert layer(x).isfinite().all()


def test_calibrating_anew_finds_the_range_of_now():
    layer = linear()
    fqt.calibrate(layer, [torch.ones(2, 6)], method="max")
    report = fqt.calibrate(layer, [torch.full((2, 6), 2.0)], method="max")
    assert float(span(layer)[1]) == 2.0
    assert report.rows[0].before == pytest.approx(0.25), "in the old range half of each value is cut off"


# --- loaders ----------------------------------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, a, b=None):
        return self.layer(a if b is None else a + b)


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(2, 6),
        (torch.ones(2, 6), torch.zeros(2)),
        [torch.ones(2, 6), torch.zeros(2)],
        {"a": torch.ones(2, 6)},
        ((torch.full((2, 6), 0.5), torch.full((2, 6), 0.5)), torch.zeros(2)),
        ({"a": torch.zeros(2, 6), "b": torch.ones(2, 6)}, torch.zeros(2)),
    ],
)
def test_batches_come_in_every_usual_form(batch):
    model = fqt.convert(TwoInputs(), everywhere("int8"))
    fqt.calibrate(model, iter([batch]), method="max")
    assert float(span(model.layer)[1]) == 1.0


def test_no_more_batches_are_run_than_asked_for_and_the_model_trains_as_before():
    model = converted().train()
    model[1].eval()
    modes = {module: module.training for module in model.modules()}
    statistics, seen = model[1].running_mean.clone(), []
    state = torch.get_rng_state()

    def loader():
        for x in BATCHES:
            seen.append(len(x))
            yield x

    fqt.calibrate(model, loader(), batches=2)
    assert len(seen) == 2 and all(module.training == mode for module, mode in modes.items())
    assert torch.equal(model[1].running_mean, statistics) and torch.equal(torch.get_rng_state(), state)
    before = {name: value.clone() for name, value in model.state_dict().items() if "stored" in name}
    model(BATCHES[0]).square().sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    model(BATCHES[1])
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items()), "training leaves ranges"
    assert before and all(layer.weight.grad.isfinite().all() for _, layer in fqt.quantized_layers(model))


# --- where the model goes ---------------------------------------------------------------------------------------------------


def test_ranges_go_into_frozen_models_files_copies_and_out_with_revert(tmp_path, caplog):
    model = converted("int8")
    fqt.calibrate(model, BATCHES)
    x = BATCHES[0]
    expected = model(x).detach()
    frozen = fqt.freeze(model)
    fqt.save(model, tmp_path / "m.safetensors")
    loaded = fqt.load(tmp_path / "m.safetensors", small())
    again = converted("int8")
    fqt.calibrate(again, [2 * BATCHES[1]])
    again.load_state_dict(model.state_dict())
    for other in (frozen, loaded, again, copy.deepcopy(model), pickled(model)):
        assert torch.equal(other(x), expected)
    trainable = fqt.load(tmp_path / "m.safetensors", small(), trainable=True).eval()
    assert float((trainable(x).detach() - expected).abs().max()) < 1e-3 * float(expected.abs().max())
    with caplog.at_level("INFO", "fqt"):
        fqt.revert(model)
    assert "dropped with the quantizers" in caplog.text and "0.quantizers.output_x.stored.low" in caplog.text
    assert not any("stored" in name for name in model.state_dict())


def test_the_native_kernels_serve_what_they_served():
    model = converted("int8")
    before = {row.name: row.served for row in fqt.summary(model).rows}
    fqt.calibrate(model, BATCHES)
    assert {row.name: row.served for row in fqt.summary(model).rows} == before


def test_an_attention_and_a_transposed_convolution_have_ranges_for_all_their_products():
    model = fqt.convert(
        nn.Sequential(nn.ConvTranspose2d(3, 4, 4, stride=2), nn.Flatten(2), nn.TransformerEncoderLayer(100, 2, 16)),
        everywhere("int8"),
    ).eval()
    x = torch.randn(2, 3, 4, 4)
    expected = model(x).detach()
    report = fqt.calibrate(model, [x])
    assert {(row.layer, row.operand) for row in report.rows} >= {
        ("0", "w"),
        ("2.self_attn", "x"),
        ("2.self_attn.out_proj", "x"),
    }
    assert float((model(x).detach() - expected).norm() / expected.norm()) < 0.1


# --- what is left as it was -----------------------------------------------------------------------------------------------


def test_what_has_no_range_to_choose_is_named_with_the_reason():
    model = converted("fqt_1bit")
    report = fqt.calibrate(model, BATCHES)
    assert not report.rows
    assert set(report.skipped.values()) == {"its codes are signs, which have no range"}
    assert "left as it was: 0.x: its codes are signs" in str(report)
    block = fqt.Quantizer("int", 8, "block", block=4)
    for layer, letter, reason in (
        (linear("dorefa_activation", bits=2), "x", "the recipe fixes its limits, 0 to 1"),
        (linear(block), "x", "every block of 4 has a range of its own"),
        (linear(w="ternary_weight"), "w", "its scale is the mean of |values|"),
    ):
        assert fqt.calibrate(layer, [torch.randn(4, 6)]).skipped[f".{letter}"] == reason


def test_the_report_is_a_table():
    text = str(fqt.calibrate(linear(), [torch.randn(4, 6)])).splitlines()
    assert text[0].split() == ["layer", "operand", "method", "from", "to", "error", "before", "after"]
    assert len(text) == 3


# --- errors -----------------------------------------------------------------------------------------------------------------


class Forgetful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.used(x)


def touched(model: nn.Module) -> list[object]:
    return [(name, value.data_ptr(), value._version) for name, value in model.state_dict().items()]


@pytest.mark.parametrize(
    ("make", "loader", "options", "error", "words"),
    [
        (small, BATCHES, {}, ValueError, "nothing in this Sequential is converted: fqt.convert it first"),
        (
            lambda: fqt.freeze(converted()),
            BATCHES,
            {},
            ValueError,
            "is frozen .* fqt.calibrate takes a model with float weights",
        ),
        (converted, [], {}, ValueError, "the loader is empty: fqt.calibrate needs at least one batch"),
        (converted, [()], {}, ValueError, "batch 1 of the loader is empty"),
        (converted, BATCHES[0], {}, TypeError, "an iterable of batches, not one Tensor: put it into a list"),
        (converted, BATCHES, {"method": "entropy"}, ValueError, "method 'entropy' is not one of 'max', 'percentile', 'mse'"),
        (converted, BATCHES, {"percent": 0}, ValueError, "percent 0 is not above 0 and at most 100"),
        (converted, BATCHES, {"batches": 0}, ValueError, "batches is 0, not a positive integer"),
        (converted, BATCHES, {"skip": "head"}, ValueError, "skip='head' matches none of the converted layers: 0, 3"),
        (
            converted,
            [BATCHES[0], BATCHES[1] / 0],
            {},
            ValueError,
            "layer '0' reads a value that is not finite: no range holds it",
        ),
        (
            lambda: fqt.convert(Forgetful(), everywhere("int8")),
            [torch.ones(2, 6)],
            {},
            ValueError,
            r"1 converted layers were not reached by 1 batches \(idle\).*by skip='idle'",
        ),
    ],
)
def test_an_error_names_what_is_wrong_and_leaves_the_model_as_it_was(make, loader, options, error, words):
    model = make()
    before, modes = touched(model), [module.training for module in model.modules()]
    recipes = [layer.recipe for _, layer in fqt.quantized_layers(model)]
    with pytest.raises(error, match=words):
        fqt.calibrate(model, loader, **options)
    assert touched(model) == before and modes == [module.training for module in model.modules()]
    assert recipes == [layer.recipe for _, layer in fqt.quantized_layers(model)]


def test_a_layer_that_is_not_reached_can_be_left_out():
    model = fqt.convert(Forgetful(), everywhere("int8"))
    report = fqt.calibrate(model, [torch.ones(2, 6)], skip="idle")
    assert {row.layer for row in report.rows} == {"used"} and model.idle.states is None


# --- without data -----------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two branches behind BatchNorms, added; then a layer behind nothing that is known."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.left = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.after, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        x = nn.functional.relu(x + self.left(x))
        return self.head(self.after(x).mean((2, 3)))


def test_ranges_behind_batchnorms_need_no_data():
    model = Residual().eval()
    with torch.no_grad():
        for norm in (model.stem[1], model.left[1]):
            norm.weight.copy_(torch.tensor([1.0, -0.5, 2.0, 0.1]))
            norm.bias.copy_(torch.tensor([0.0, 3.0, -1.0, 0.5]))
    fqt.convert(model, everywhere("int8"))
    report = fqt.calibrate(model, method="max", weights=False)
    assert sorted(row.layer for row in report.rows) == ["after", "left.0"]
    assert float(span(model.left[0])[1]) == pytest.approx(max(6.0, 3 + 3.0, -1 + 12.0))
    # channel 2: a rectified normal of mean -1, deviation 2, added to a whole one
    r = torch.tensor(-1.0 / 2)
    density, below = torch.exp(-r * r / 2) / (2 * torch.pi) ** 0.5, torch.special.ndtr(r)
    mean = -1.0 * below + 2 * density
    variance = (1 + 4) * below - 2 * density - mean**2
    expected = float(mean - 1 + 6 * (variance + 4).sqrt())
    assert float(span(model.after)[1]) == pytest.approx(expected, rel=0.01)
    assert report.skipped["head.x"] == "no BatchNorm alone is in front of it: give a loader"
    assert report.skipped.keys() == {"stem.0.x", "head.x"}


def test_without_data_a_clip_is_searched_too_and_real_activations_agree():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU6(), nn.Dropout(), nn.Linear(64, 4))
    x = torch.randn(4000, 8)
    for _ in range(60):
        model(x)
    fqt.convert(model, everywhere("int4"))
    free, real = copy.deepcopy(model), copy.deepcopy(model)
    fqt.calibrate(free)
    fqt.calibrate(real, [x])
    assert float(span(free[4])[1]) == pytest.approx(float(span(real[4])[1]), rel=0.15)


def test_a_model_that_cannot_be_traced_wants_a_loader():
    class Branch(Forgetful):
        def forward(self, x):
            return self.used(x) if x.sum() > 0 else self.idle(x)

    with pytest.raises(ValueError, match="torch.fx cannot trace this Branch.*give a loader"):
        fqt.calibrate(fqt.convert(Branch(), everywhere("int8")))
