"""The program as it is started: help, dry run, a script from any folder, torchrun with two processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


RANK = """
import sys, torch
from pathlib import Path
from train import config, loop, ranks
with ranks.join("cpu") as place:
    trainer = loop.Trainer(config.load("fqt_1bit", sys.argv[1:]), place)
    result = trainer.train()
    images = [y.tolist() for part in trainer.batches(0) for _, y in part]
    torch.save(
        {"model": trainer.model.state_dict(), "noise": torch.rand(4), "accuracy": result.test_accuracy,
         "folder": str(result.folder), "chunks": trainer.chunks(0), "history": [row["loss"] for row in result.history]},
        f"rank{place.rank}.pt",
    )
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What each of two gloo processes ended with."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "rank.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    overrides = [*QUICK[1::2], "training.accumulate=2", "tracking.baseline_steps=1", "tracking.every=1"]
    done = subprocess.run([*command, *overrides], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)], done.stdout, folder


def test_ranks_end_with_equal_models(two_ranks):
    (first, second), _, _ = two_ranks
    assert first["model"].keys() == second["model"].keys()
    assert all(torch.equal(value, second["model"][name]) for name, value in first["model"].items())


def test_ranks_draw_different_noise_and_images(two_ranks):
    (first, second), _, _ = two_ranks
    assert not torch.equal(first["noise"], second["noise"])
    seen = [index for rank in (first, second) for chunk in rank["chunks"] for index in chunk]
    assert sorted(seen) == list(range(256))
    assert [len(chunk) for chunk in first["chunks"]] == [32] * 4


def test_ranks_agree_on_the_result(two_ranks):
    (first, second), _, _ = two_ranks
    assert first["accuracy"] == second["accuracy"]
    assert first["history"] == second["history"]
    assert first["accuracy"] * 297 == pytest.approx(round(first["accuracy"] * 297))


def test_one_rank_speaks_and_writes(two_ranks):
    (first, second), printed, folder = two_ranks
    assert printed.count("test accuracy") == 1
    assert "2 processes" in printed
    assert first["folder"] == second["folder"]
    assert len(list(folder.glob("runs/fqt_1bit/*/events*"))) == 2, "one of the curves, one of the hyperparameters"
    state = torch.load(next(folder.glob("runs/fqt_1bit/*/last.pt")), weights_only=True)
    assert len(state["generators"]) == state["world"] == 2
