"""Each benchmark runs with --quick, on data that needs no download, and writes rows with where they come from."""

import json
import sys

import pytest

from benchmarks import accuracy, gradients, kernels, readme, saved
from fqt.cpu import refuses_quantize
from fqt.formats import Format


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


@pytest.mark.filterwarnings("ignore")  # the workers' own
def test_accuracy_repeats_no_finished_run(monkeypatch, tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    arguments = ("--data", "digits", "--methods", "xnor", "--workers", "1", "--log", str(log))
    (first,) = rows(monkeypatch, tmp_path, accuracy.main, *arguments)
    runs = log.read_text().splitlines()
    assert len(runs) == len(accuracy.RATES) + 1
    (second,) = rows(monkeypatch, tmp_path, accuracy.main, *arguments)
    assert second == first and log.read_text().splitlines() == runs
    assert first["rate"] in accuracy.RATES and 0 < first["mean"] <= 100
    assert "| xnor" in capsys.readouterr().out


def test_readme_says_what_the_results_say(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["readme", "--check"])
    with pytest.raises(SystemExit) as stopped:
        readme.main()
    assert stopped.value.code == 0


def test_a_readme_that_says_something_else_is_noticed():
    text = (readme.ROOT / "README.md").read_text()
    changed = text.replace("| `xnor`", "| `xnorr`", 1)
    assert changed != text and readme.rewritten(changed) == text


def test_kernels(monkeypatch, tmp_path, capsys):
    if refuses_quantize((Format("sign", 1),)) is not None:
        pytest.skip("the C++ kernels are not built")
    found = rows(monkeypatch, tmp_path, kernels.main, "--threads", "1")
    assert {"output", "grad_input", "grad_weight"} <= {row.get("product") for row in found}
    assert "all kernels equal the reference" in capsys.readouterr().out
