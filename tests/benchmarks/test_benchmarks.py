"""Each benchmark runs with --quick, on data that needs no download, and writes rows with where they come from."""

import json
import logging
import sys
import types
from concurrent.futures import Future

import pytest
import torch
from torch import nn

from benchmarks import (
    accuracy,
    adapt,
    allreduce,
    calibrate,
    cases,
    gradients,
    inference,
    kernels,
    kill_drill,
    layers,
    leaks,
    lm,
    pareto,
    readme,
    rivals,
    runs,
    saved,
    sizes,
    step,
    tinyllama,
)  # fmt: skip
from fqt import ops, reference
from fqt.cpu import library
from fqt.ops import Kernel
from fqt.qtensor import check
from fqt.rows import Codes, Serves

SMALL = ((24, 40, 8), (64, 64, 4))
"""Layers in the place of VGG-16's: inputs, outputs, size of an image. The benchmark itself checks and times all of VGG-16's."""

slow = pytest.mark.every(3, of="benchmarks that take seconds")


@pytest.fixture(autouse=True)
def _loud_again():
    """The benchmarks silence the library's log."""
    level = logging.getLogger("fqt").level
    yield
    logging.getLogger("fqt").setLevel(level)


def rows(monkeypatch, tmp_path, main, *arguments: str) -> list[dict]:
    path = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["benchmark", "--quick", "--json", str(path), *arguments])
    main()
    written = json.loads(path.read_text())
    assert {"date", "commit", "torch", "machine"} <= set(written["where"])
    return written["rows"]


def test_saved(monkeypatch, tmp_path, capsys):
    (row,) = rows(monkeypatch, tmp_path, saved.main, "--model", "resnet20", "--recipes", "fqt_1bit")
    assert 0 < row["layers_bytes"] < row["fp32_layers_bytes"]
    assert "| fqt_1bit" in capsys.readouterr().out


def test_sizes(monkeypatch, tmp_path, capsys):
    found = rows(monkeypatch, tmp_path, sizes.main, "--recipes", "fqt_1bit", "int8")
    assert [row["grid"] for row in found] == ["sign", "int"] and [row["limit"] for row in found] == [28.0, None]
    for row, times in zip(found, (32, 4), strict=True):
        assert times - 8 < row["worst_ratio"] <= row["fp32_layers_bytes"] / row["layers_bytes"] < times
        assert row["layers_bytes"] < row["memory_bytes"] < row["file_bytes"] < row["fp32_file_bytes"]
    monkeypatch.setitem(sizes.LIMITS, "sign", 33.0)
    assert sizes.main() == 1 and "not 1/33" in capsys.readouterr().out


@slow
def test_calibrate(monkeypatch, tmp_path, capsys):
    found = rows(monkeypatch, tmp_path, calibrate.main, "--recipes", "int4")
    assert [row["method"] for row in found] == list(calibrate.METHODS)
    errors = {row["method"]: row["error"] for row in found}
    assert all(0 < error < 1 for error in errors.values()) and len(set(errors.values())) == len(errors)
    assert errors["adaround"] < errors["mse + weights"] < errors["max"]
    assert "| `int4` | adaquant" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    with pytest.raises(SystemExit):
        calibrate.main()


@slow
def test_kill_drill(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kill_drill, "STEPS_AN_EPOCH", 4)
    small = [f"data.limit={16 * kill_drill.STEPS_AN_EPOCH}", "data.batch_size=16"]
    monkeypatch.setattr(kill_drill, "KEYS", [*kill_drill.KEYS, *small])
    (row,) = rows(monkeypatch, tmp_path, kill_drill.main, "--recipes", "fqt_1bit", "--worlds", "1")
    assert row["equal"] and row["differences"] == [] and row["tracebacks"] == 0
    assert row["kills"] == row["kills_start"] + row["kills_step"] + row["kills_write"]


def test_kill_drill_sees_a_difference():
    a = {"model": {"w": torch.zeros(2)}, "log": [{"step": 1, "loss": 0.5}]}
    b = {"model": {"w": torch.tensor([0.0, 1e-9])}, "log": [{"step": 1, "loss": 0.25}]}
    assert kill_drill.differences(a, b) == [".model.w", ".log.0.loss"]
    assert kill_drill.differences(a, a) == []
    assert kill_drill.differences([1], [1, 2], "history") == ["history"]


def test_leaks(monkeypatch, tmp_path, capsys):
    (row,) = rows(monkeypatch, tmp_path, leaks.main, "--recipes", "int8")
    assert row["steps"] == 100 and row["files at 4/4"] <= row["files at 1/4"] and row["threads at 4/4"] <= row["threads at 1/4"]
    assert "| int8" in capsys.readouterr().out


def test_allreduce_counts_differences_in_standard_errors():
    job = {"config": "c", "error_feedback": False, "epochs": 1, "limit": 0, "data": "d", "loss": 1.0, "times_fewer": 7.7}
    runs = [
        {**job, "gradient_bits": bits, "seed": seed, "test_accuracy": accuracy}
        for bits, accuracies in ((0, (0.5, 0.7)), (4, (0.4, 0.6)))
        for seed, accuracy in enumerate(accuracies)
    ]
    in_float, low = allreduce.summarized(runs)
    assert (in_float["bits"], in_float["seeds"], in_float["standard_errors"]) == (32, 2, 0)
    assert low["difference"] == pytest.approx(-0.1)
    assert low["standard_errors"] == pytest.approx(-0.1 / (0.02 / 2 + 0.02 / 2) ** 0.5)


def test_gradients(monkeypatch, tmp_path, capsys):
    found = rows(monkeypatch, tmp_path, gradients.main, "--data", "digits")
    by_name = {(row["product"], row["quantizer"]): row for row in found}
    assert len(found) == sum(len(wanted) for wanted in gradients.QUANTIZERS.values())
    # more bits, less error; an unbiased quantizer's bias is a small part of its error, top-k's is not
    errors = [by_name["grad_input", f"uint{bits}/sample"]["error"] for bits in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    biased = by_name["grad_input", "uint4/sample keep 1/4 topk"]
    assert biased["bias"] > 0.3 * biased["error"]
    assert abs(by_name["grad_input", "uint4/sample"]["bias"]) < 0.1 * by_name["grad_input", "uint4/sample"]["error"]
    assert "grad_weight" in capsys.readouterr().out


def test_adapt_repeats_no_finished_run(monkeypatch, tmp_path, capsys):
    arguments = ("--jobs", "lenet5", "--methods", "fp32", "adapt_int8")
    found = rows(monkeypatch, tmp_path, adapt.main, *arguments)
    assert [row["method"] for row in found] == ["fp32", "adapt_int8"]
    low = found[1]
    assert low["ms"] > 0 and low["fp32_ms"] > 0 and low["predicted_training"] > 0
    assert low["measured_training"] == pytest.approx(low["fp32_ms"] / low["ms"])
    assert 0 < low["size"] <= 0.25 and max(low["word_lengths"].values()) <= 8
    assert len(low["word_length_over_time"]) >= 1
    table = capsys.readouterr().out
    assert "| lenet5" in table and "| the paper's | averages" in table and "+0.98" in table

    monkeypatch.setattr(adapt, "train", lambda *_: pytest.fail("a finished run was repeated"))
    assert rows(monkeypatch, tmp_path, adapt.main, *arguments) == found


class _InPlace:
    """A pool of processes without the processes, each of which would import torch and scikit-learn."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


def test_accuracy_repeats_no_finished_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(runs, "ProcessPoolExecutor", _InPlace)
    log = tmp_path / "log.jsonl"
    arguments = ("--data", "digits", "--methods", "xnor", "--workers", "1", "--log", str(log))
    (first,) = rows(monkeypatch, tmp_path, accuracy.main, *arguments)
    finished = log.read_text().splitlines()
    assert len(finished) == len(accuracy.RATES) + 1
    (second,) = rows(monkeypatch, tmp_path, accuracy.main, *arguments)
    assert second == first and log.read_text().splitlines() == finished
    assert first["rate"] in accuracy.RATES and 0 < first["mean"] <= 100
    assert "| xnor" in capsys.readouterr().out


def test_lm_repeats_no_finished_run(monkeypatch, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 100)
    monkeypatch.setattr(runs, "ProcessPoolExecutor", _InPlace)
    log = tmp_path / "lm.jsonl"
    arguments = (str(text), "--recipes", "fp32", "int8", "--log", str(log))
    first = rows(monkeypatch, tmp_path, lm.main, *arguments)
    assert [row["recipe"] for row in first] == ["fp32", "int8"]
    assert all(0 < row["loss"] < 5 and row["speedup"] > 0 for row in first)
    finished = log.read_text()
    assert [row["losses"] for row in rows(monkeypatch, tmp_path, lm.main, *arguments)] == [row["losses"] for row in first]
    assert log.read_text() == finished
    assert "| int8" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # the worker's own
def test_accuracy_trains_in_a_process_of_its_own_as_here(tmp_path):
    job = accuracy.Job("digits", "xnor", 2e-2, 1, 1, 200, 0.0)
    (row,) = runs.run_all([job], accuracy.train, tmp_path / "log.jsonl", 1, accuracy.said)
    assert {**row, "seconds": 0} == {**accuracy.train(job), "seconds": 0}


def test_readme_says_what_the_results_say(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["readme", "--check"])
    with pytest.raises(SystemExit) as stopped:
        readme.main()
    assert stopped.value.code == 0


def test_a_readme_that_says_something_else_is_noticed():
    text = (readme.ROOT / "README.md").read_text()
    changed = text.replace("| `xnor`", "| `xnorr`", 1)
    assert changed != text and readme.rewritten(changed) == text


def test_no_row_of_the_table_goes_unmeasured(monkeypatch):
    """A kernel for a format of its own is measured on that, and one that the list serves already on nothing more."""
    if library.refuses() is not None:
        pytest.skip("the C++ kernels are not built")
    assert cases.covering(kernels.PRODUCTS, "cpu") == list(kernels.PRODUCTS)
    ternary = (Codes({"ternary": (2, 2)}, ("",)), Codes({"ternary": (2, 2)}, ("",)))
    new = Kernel("output", "mine", "cpu", "fqt.reference:output", Serves(ternary, "multiplies ternary codes"))
    monkeypatch.setattr(ops, "KERNELS", [new, *ops.KERNELS])
    assert cases.covering(kernels.PRODUCTS, "cpu") == [*kernels.PRODUCTS, ("output", "ternary", "ternary", 1.0)]


@pytest.mark.parametrize("name", ["sign:O", "ternary", "int4:N", "int8:C", "uint6+:NC", "uint8+", "fixed12", "int16", "e4m3"])
def test_random_codes_are_codes_of_their_format(name):
    q = cases.coded(name, (6, 8, 16), 0.5)
    check(q)
    codes, (low, high) = reference.unpack(q.codes, q.format, q.shape), q.format.code_range
    assert low <= codes.min() <= codes.max() <= high and len(codes.unique()) > 1
    assert q.index is not None and int((q.index >= 0).sum()) == max(1, q.scale.numel() // 2)


@slow
def test_kernels(monkeypatch, tmp_path, capsys):
    if library.refuses() is not None:
        pytest.skip("the C++ kernels are not built")
    monkeypatch.setattr(kernels, "VGG16", SMALL)
    found = rows(monkeypatch, tmp_path, kernels.main, "--threads", "1")
    assert {"output", "grad_input", "grad_weight"} <= {row.get("product") for row in found}
    assert {row["layer"] for row in found if "layer" in row} == {"1024 x 1024 -> 1024", "16 x 24 -> 40, 3x3 on 8x8"}
    assert "all kernels equal the reference" in capsys.readouterr().out


def test_inference(monkeypatch, tmp_path, capsys):
    def small(batch):
        layers = [layer for _ in range(3) for layer in (nn.Linear(24, 24), nn.BatchNorm1d(24), nn.ReLU())]
        return nn.Sequential(nn.Linear(16, 24), *layers, nn.Linear(24, 5)), torch.randn(batch, 16)

    def missing(*args, **options):
        raise inference.Missing("it is not installed")

    monkeypatch.setitem(inference.CASES, "mlp", (small, ("fqt_1bit", "int8"), (1, 64)))
    monkeypatch.setattr(inference.runtimes, "onnxruntime", missing)
    found = rows(monkeypatch, tmp_path, inference.main, "--model", "mlp")
    assert [(row["recipe"], row["batch"], row["threads"]) for row in found] == [("fqt_1bit", 1, 1), ("int8", 1, 1)]
    for row in found:
        assert row["speedup"] == row["fp32_ms"] / row["fqt_ms"] and row["llama_cpp_ms"] is None
        median, low, high = row["variants_ms"][row["fqt_variant"]]
        assert 0 < low <= median <= high
    assert "onnxruntime is not measured: it is not installed" in capsys.readouterr().out


def test_rivals(monkeypatch, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    found = rows(monkeypatch, tmp_path, rivals.main)
    assert {row["package"] for row in found} >= {"torch", "fqt", "onnxruntime"}
    error = {row["multiplies"]: row["error"] for row in found}
    assert error["float32"] < 1e-6 < error["int8: 8-bit x, 8-bit w"] < error["int6: 6-bit x, 6-bit w"] < 0.1
    assert error["MatMulNBits: 8-bit x, 8-bit w"] < 0.02 < error["MatMulNBits: 8-bit x, 4-bit w"] < 0.2
    assert all(row["ms"] > 0 for row in found)


@slow
def test_step(monkeypatch, tmp_path, capsys):
    arguments = ("--model", "resnet20", "mlp_small", "--recipe", "fqt_1bit", "xnor", "--threads", "1", "--optimizer", "sgd")
    found = rows(monkeypatch, tmp_path, step.main, *arguments)
    assert [(row["model"], row["recipe"]) for row in found] == [
        ("resnet20", "fqt_1bit"), ("resnet20", "xnor"), ("mlp_small", "fqt_1bit"), ("mlp_small", "xnor"),
    ]  # fmt: skip
    for row in found:
        assert (row["batch"], row["threads"], row["optimizer"]) == (4, 1, "sgd")
        for side in ("fp32", "fqt"):
            low, high = row[f"{side}_spread_ms"]
            assert 0 < low <= row[f"{side}_ms"] <= high
            assert 0 < row[f"{side}_saved_bytes"] < row[f"{side}_peak_bytes"]
        assert row["speedup"] == row["fp32_ms"] / row["fqt_ms"]
        assert {"forward", "backward", "optimizer", "operators"} == set(row["breakdown_ms"])
        assert any(name.startswith(("fqt::", "fqt_cpu::")) for name in row["breakdown_ms"]["operators"])
        assert {"commit", "torch", "machine"} <= set(row["where"])
    # convolutions in both memory formats; without any, one suffices
    assert len(found[0]["variants_ms"]) == 4 and len(found[2]["variants_ms"]) == 2
    assert found[0]["fqt_saved_bytes"] < found[0]["fp32_saved_bytes"]
    out = capsys.readouterr().out
    assert "torch.compile is not measured: --quick" in out and "equal the reference: loss and every gradient" in out


def test_step_gives_no_figures_of_a_kernel_that_differs(monkeypatch, tmp_path, capsys):
    module = types.ModuleType("a_wrong_kernel")
    module.grad_weight = lambda *args: 2 * reference.grad_weight(*args)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    wrong = Kernel("grad_weight", "wrong", "cpu", f"{module.__name__}:grad_weight", lambda request: None)
    monkeypatch.setattr(ops, "KERNELS", [wrong, *ops.KERNELS])
    path = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["step", "--quick", "--model", "mlp_small", "--recipe", "fqt_1bit", "--json", str(path)])
    with pytest.raises(
        SystemExit, match="mlp_small, fqt_1bit: the kernels differ from the reference, so no figures: 4.weight:"
    ):
        step.main()
    assert not path.exists() and "ms" not in capsys.readouterr().out


def test_layers(monkeypatch, tmp_path, capsys):
    found = rows(monkeypatch, tmp_path, layers.main, "--threads", "1")
    shapes = [row["shape"] for row in found]
    assert shapes[0] == "3x3, 1 -> 16, on 28x28" and shapes[-1] == "linear, 1024 -> 10" and len(set(shapes)) == len(shapes)
    assert set(found[0]["products_ms"]) == {"output", "grad_weight"}, "the first layer's input needs no gradient"
    assert all(row["ratio"] == pytest.approx(row["fp32_ms"] / row["fqt_ms"]) for row in found)
    assert "| vgg_small" in capsys.readouterr().out


def test_layers_names_strides_and_groups():
    described = [
        layers.describe(torch.nn.Conv2d(8, 8, (3, 1), stride=2, groups=8), (4, 8, 5, 6)),
        layers.describe(torch.nn.Conv2d(8, 4, 1, groups=2), (4, 8, 5, 6)),
    ]
    assert described == ["3x1, 8 -> 8, /2, depthwise, on 5x6", "1x1, 8 -> 4, 2 groups, on 5x6"]


@slow
def test_pareto(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.svg"
    found = rows(monkeypatch, tmp_path, pareto.main, "--threads", "1", "--picture", str(picture))
    assert [row["recipe"] for row in found] == list(accuracy.METHODS)
    assert found[0]["speedup"] == 1.0 and all(row["speedup"] > 0 and 50 < row["accuracy"] < 100 for row in found)
    first = picture.read_bytes()
    assert all(method in first.decode() for method in accuracy.METHODS)
    pareto.draw(found, picture)
    assert picture.read_bytes() == first
    assert f"drawn: {picture}" in capsys.readouterr().out


def test_pareto_trains_for_the_accuracies_if_it_is_told_to(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    trained = [{"method": "fp32", "mean": 90.0, "stdev": 0.0}, {"method": "xnor", "mean": 80.0, "stdev": 1.0}]
    monkeypatch.setattr(accuracy, "measure", lambda methods, data, *, quick: trained if quick and data == "digits" else None)
    picture = tmp_path / "picture.png"
    found = rows(monkeypatch, tmp_path, pareto.main, "--train", "--data", "digits", "--picture", str(picture))
    assert [(row["recipe"], row["accuracy"]) for row in found] == [("fp32", 90.0), ("xnor", 80.0)]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tinyllama_compares_the_file_with_the_model(monkeypatch, tmp_path, capsys):
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'fqt[export]'")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, and so on. " * 300)
    found = rows(monkeypatch, tmp_path, tinyllama.main, str(text), "--recipes", "signs", "--folder", str(tmp_path))
    (row,) = found
    assert row["types"]["Q1_0"] == 7 and abs(row["difference"]) < 0.02 and row["same_token"] > 0.9
    assert (tmp_path / "signs.gguf").stat().st_size == row["bytes"] and "| signs" in capsys.readouterr().out
