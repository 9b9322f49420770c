"""The program as it is started: help, dry run, a script from any folder."""

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from benchmarks import warm
from train import catalogue, config, loop
from train.main import main
from train.wording import RankError, TrainingError

ROOT = Path(config.__file__).resolve().parent.parent
QUICK = ["--set", "data.name=digits", "--set", "data.limit=256", "--set", "data.batch_size=64", "--set", "device=cpu"]
QUICK += ["--set", "training.epochs=1"]


def test_help_explains_itself(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    wanted = [path for path, _, _ in config.key_table()]
    wanted += [
        *catalogue.MODELS,
        *catalogue.DATASETS,
        *catalogue.POLICIES,
        *catalogue.recipe_names(),
        "fqt_1bit",
        "--resume",
        "--dry-run",
    ]
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


def test_help_and_a_misspelt_name_need_no_slow_import(tmp_path):
    program = (
        "import sys; from train.main import main\n"
        "for arguments in (['--help'], ['--config', 'fp32', '--set', 'model.name=timm:resnet5O']):\n"
        "    try: main(arguments)\n"
        "    except SystemExit: pass\n"
        "print([name for name in ('torch', 'torchvision', 'timm', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert 'model.name = "timm:resnet5O": timm has no such model; did you mean resnet50' in done.stderr


def test_the_main_job_needs_neither_torchvision_nor_the_compiler_to_start():
    program = (
        "import sys; from train import config, loop, models; import torch; models.build('vgg_small', (1, 28, 28), 10);"
        "print([name for name in ('torchvision', 'timm', 'torch._dynamo', 'sympy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


LONG = [*QUICK[:-1], "training.epochs=2000", "--set", "tracking.baseline_steps=0"]


@contextmanager
def started(folder, *arguments):
    """The training program in a process of its own, and a reader of what it prints."""
    os.mkfifo(folder / "out")
    script, place = ROOT / "train" / "main.py", {"folder": folder, "out": folder / "out", "err": folder / "err.txt"}
    process = warm.start(script, "--config", "fp32", *arguments, **place)
    try:
        with (folder / "out").open() as printed:
            yield process, printed
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_run_with_a_checkpoint_and_a_line(number, tmp_path):
    with started(tmp_path, *LONG) as (process, printed):
        while not (line := printed.readline()).startswith("epoch 1/"):
            assert line, (tmp_path / "err.txt").read_text()
        os.kill(process.pid, number)
        printed.read()
        process.join(60)
    err = (tmp_path / "err.txt").read_text()
    assert process.exitcode == 0, err
    said = re.fullmatch(
        rf"train: stopped by {number.name} after step (\d+) of 8000; the same command with --resume (\S+) goes.*\n", err
    )
    assert said, err
    state = torch.load(tmp_path / said[2] / "last.pt", weights_only=True)
    assert state["steps"] == int(said[1])


def test_a_signal_before_the_first_step_ends_the_program_at_once(monkeypatch, capsys):
    def killed(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the handler should have raised")

    monkeypatch.setattr(loop, "run", killed)
    assert main(["--config", "fp32", *QUICK]) == 143
    assert capsys.readouterr().err == "train: ended by SIGTERM; --resume continues from a checkpoint, if there is one.\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_nobody_reads_the_output(tmp_path):
    """What `... | head -1` does: the training goes on."""
    with started(tmp_path, *QUICK) as (process, printed):
        printed.readline()
        printed.close()
        process.join(60)
        assert (process.exitcode, (tmp_path / "err.txt").read_text()) == (0, "")
    assert len(list(tmp_path.glob("runs/fp32/*/last.pt"))) == 1


@pytest.mark.parametrize("option", ["--help", "--dry-run"])
def test_nobody_reads_a_long_text(option, tmp_path):
    with started(tmp_path, *QUICK, option) as (process, printed):
        printed.close()
        process.join(60)
        assert (process.exitcode, (tmp_path / "err.txt").read_text()) == (0, "")


def test_resume_auto_begins_anew_or_goes_on_past_a_damaged_file(capsys, tmp_path):
    arguments = ["--config", "fp32", *QUICK, "--set", "tracking.enabled=false", "--resume", "auto"]
    assert main(arguments) == 0
    assert "resumed" not in capsys.readouterr().out
    assert main([*arguments, "--set", "checkpoint.every_steps=3"]) == 0
    assert "resumed after epoch 1" in capsys.readouterr().out
    (folder,) = (tmp_path / "runs" / "fp32").iterdir()
    (folder / "step_000000003.pt").write_bytes((folder / "last.pt").read_bytes())
    (folder / "last.pt").write_bytes(b"torn")
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert re.match(
        r"train: runs/fp32/\S+/last.pt cannot be read as a .* Continuing from runs/\S+/step_000000003.pt", printed.err
    )
    assert "resumed after epoch 1" in printed.out
    (folder / "step_000000003.pt").write_bytes(b"")
    (folder / "last.pt").write_bytes(b"torn")
    assert main(arguments) == 2
    assert "--resume runs/fp32: no checkpoint there is whole." in capsys.readouterr().err


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


@pytest.mark.parametrize(("kind", "spoken"), [(TrainingError, ""), (RankError, "train: x.jpg cannot be read\n")])
def test_what_only_one_rank_knows_that_rank_says(monkeypatch, capsys, kind, spoken):
    def fail(*_, **__):
        raise kind("x.jpg cannot be read")

    monkeypatch.setattr(loop, "run", fail)
    monkeypatch.setenv("RANK", "1")
    assert main(["--config", "fp32", *QUICK]) == 1
    assert capsys.readouterr().err == spoken


def test_one_rank_complains_for_all(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main(["--config", "none"]) == 2
    assert capsys.readouterr().err == ""
