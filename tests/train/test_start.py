"""Runs that start from static ranges and moved weights: what they say, what they resume to, and what is refused."""

from pathlib import Path

import pytest
import torch

import fqt
from tests.train.helpers import assert_same, interrupt, trained, weights
from train.config import parse
from train.loop import run
from train.wording import ConfigError

START = {"calibrate": "mse", "batches": 2, "reconstruct": "adaquant", "steps": 3}


def ranges(state: dict) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state["model"].items() if ".stored." in name}


def test_a_run_says_how_it_began_and_a_resumed_one_goes_on_with_its_ranges(make, monkeypatch, capsys):
    config = make(
        recipe="int8",
        start=START,
        quiet=False,
        model={"name": "mlp_small"},
        training={"epochs": 2},
        checkpoint={"enabled": True},
    )
    whole = run(config)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("start: ")]
    assert line.startswith("start: 2 ranges (mse) from 2 batches; adaquant moved ") and "of 1 layers, mean error of" in line
    kept = ranges(weights(whole.folder))
    assert len(kept) == 4 and all(value.isfinite().all() for value in kept.values())
    interrupt(monkeypatch, config.model_copy(update={"name": "stopped"}), 1)
    assert_same(ranges(weights(next(Path("runs/stopped").iterdir()))), kept)
    capsys.readouterr()
    resumed = run(config.model_copy(update={"name": "stopped"}), resume=Path("runs/stopped"))
    assert "start:" not in capsys.readouterr().out, "it did not begin anew"
    assert_same(trained(resumed), trained(whole))


def test_without_batches_ranges_are_those_behind_batchnorms(make, monkeypatch):
    found: list[fqt.Calibrated] = []
    calibrate = fqt.calibrate
    monkeypatch.setattr(fqt, "calibrate", lambda *args, **options: found.append(calibrate(*args, **options)) or found[-1])
    result = run(make(recipe="int8", start={"calibrate": "max", "batches": 0, "weights": False}, model={"name": "lenet5"}))
    (report,) = found
    assert {row.operand for row in report.rows} == {"x"} and all(row.before is None for row in report.rows)
    assert 0 <= result.test <= 1


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"start": {"calibrate": "mode"}}, "start.calibrate"),
        ({"start": {"steps": 3}}, "start.steps = 3: it has no effect with start.reconstruct none"),
        ({"start": {"batches": 3}}, "start.batches = 3: it has no effect"),
        ({"start": {"calibrate": "mse", "percent": 99.0}}, 'start.percent = 99.0: it has no effect with start.calibrate "?mse'),
        ({"start": {"reconstruct": "adaround", "weights": False}}, "start.weights = false: it has no effect"),
        (
            {"start": {"reconstruct": "adaround", "batches": 1}},
            "start.batches = 1: start.reconstruct adaround needs at least 2, one of which judges",
        ),
        ({"recipe": "fp32", "start": {"calibrate": "mse"}}, 'start.calibrate = "?mse"?: it has no effect with recipe fp32'),
        (
            {"start": {"calibrate": "mse"}, "distributed": {"engine": "fsdp2"}},
            "start.calibrate = mse: it does not go with distributed.engine fsdp2",
        ),
    ],
)
def test_a_key_without_effect_is_named(changed, words):
    tree = {"model": {"name": "lenet5"}, "data": {"name": "digits"}, "recipe": "int4", **changed}
    with pytest.raises(ConfigError, match=words):
        parse(tree)


def test_the_librarys_refusals_are_the_runs(make):
    with pytest.raises(ConfigError, match="start: layer .* reads a value that is not finite"):
        run(make(recipe="int8", start={"calibrate": "max"}, model={"name": "lenet5", "weights": broken(make)}))


def broken(make) -> str:
    """Weights of which one is infinite."""
    from train import models

    state = models.build("lenet5", (1, 8, 8), 10).state_dict()
    state["0.weight"][0, 0, 0, 0] = float("inf")
    torch.save(state, "broken.pt")
    return "broken.pt"
