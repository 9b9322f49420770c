"""The program as it is started: help, dry run, a script from any folder."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from train import config, loop
from train.main import main
from train.wording import TrainingError

ROOT = Path(config.__file__).resolve().parent.parent
QUICK = ["--set", "data.name=digits", "--set", "data.limit=256", "--set", "data.batch_size=64", "--set", "device=cpu"]
QUICK += ["--set", "training.epochs=1"]


def test_help_explains_itself(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    wanted = [path for path, _, _ in config.key_table()]
    wanted += [*config.MODELS, *config.DATASETS, *config.recipe_names(), "fqt_1bit", "--resume", "--dry-run"]
    assert [name for name in wanted if name not in text] == []


def test_dry_run_prints_configuration_and_summary_and_stops(capsys, tmp_path):
    assert main(["--config", "fqt_1bit", *QUICK, "--dry-run"]) == 0
    printed, summary, modelled = re.split(r"\n\n", capsys.readouterr().out, maxsplit=2)
    (tmp_path / "printed.yaml").write_text(printed)
    assert config.load("printed.yaml") == config.load("fqt_1bit", QUICK[1::2])
    assert "QuantConv2d" in summary
    assert " ? " not in summary, "multiply-adds are known"
    assert re.match(r"modelled speed-up \d+\.\d\dx", modelled)
    assert [path.name for path in tmp_path.iterdir()] == ["printed.yaml"]


def test_dry_run_of_the_float_baseline(capsys):
    assert main(["--config", "fp32", *QUICK, "--dry-run"]) == 0
    assert "modelled speed-up 1.00x" in capsys.readouterr().out


def test_script_runs_from_any_folder(tmp_path):
    script = [sys.executable, str(ROOT / "train" / "main.py"), "--config", "fp32", *QUICK]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"test accuracy \d+\.\d\d %", done.stdout.splitlines()[-1])
    assert "TensorBoard log in runs/fp32/" in done.stdout
    assert len(list(tmp_path.glob("runs/fp32/*/last.pt"))) == 1
    assert len(list(tmp_path.glob("runs/fp32/*/events*"))) == 2, "one of the curves, one of the hyperparameters"


def test_resume_without_a_path_takes_the_newest_run(capsys):
    arguments = ["--config", "fp32", *QUICK, "--set", "tracking.enabled=false"]
    assert main(arguments) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert main([*arguments, "--resume"]) == 0
    resumed = capsys.readouterr().out.splitlines()
    assert "resumed after epoch 1" in resumed[0]
    assert resumed[-1] == last
    assert main([*arguments, "--set", "optimizer.lr=1", "--resume"]) == 2
    assert "belongs to another configuration: optimizer.lr was 0.006 and is 1.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "wanted"),
    [(TrainingError("the loss is nan"), 1, "train: the loss is nan"), (KeyboardInterrupt(), 130, "--resume continues")],
)
def test_a_run_that_ends_early(monkeypatch, capsys, error, status, wanted):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(loop, "run", fail)
    assert main(["--config", "fp32", *QUICK]) == status
    assert wanted in capsys.readouterr().err


def test_one_rank_complains_for_all(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main(["--config", "none"]) == 2
    assert capsys.readouterr().err == ""
