"""A checkpoint is whole or not there, restores what it took, and says what is wrong with it."""

import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fqt
from tests.train.helpers import assert_same
from train import checkpoint
from train.wording import ConfigError

ROOT = Path(checkpoint.__file__).resolve().parent.parent


def test_round_trip(tmp_path):
    checkpoint.save(tmp_path / "run" / "last.pt", {"model": {"w": torch.arange(3)}, "epoch": 2, "history": [{"loss": 0.5}]})
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    assert torch.equal(state.pop("model")["w"], torch.arange(3))
    assert state == {"format": checkpoint.FORMAT, "epoch": 2, "history": [{"loss": 0.5}]}


def test_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"epoch": 1})

    def fail(*_):
        raise OSError("disk full")

    for function in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, fail)
            with pytest.raises(OSError, match="disk full"):
                checkpoint.save(path, {"epoch": 2})
        assert checkpoint.load(path)["epoch"] == 1
        assert os.listdir(tmp_path) == ["last.pt"]


def test_a_kill_before_the_replacement_leaves_the_old_file(tmp_path):
    checkpoint.save(tmp_path / "last.pt", {"epoch": 1})
    program = (
        "import os, sys, pathlib; from train import checkpoint; os.replace = lambda *_: os._exit(9);"
        f"checkpoint.save(pathlib.Path({str(tmp_path / 'last.pt')!r}), {{'epoch': 2}})"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 9
    assert checkpoint.load(checkpoint.find(tmp_path)[0])["epoch"] == 1


class Intruder:
    """An object whose unpickling would run code."""

    def __reduce__(self):
        return os.mkdir, ("intruded",)


def damage(path, how):
    torch.save({"format": checkpoint.FORMAT, "weights": torch.rand(1000)}, path)
    raw = path.read_bytes()
    if how == "cut":
        path.write_bytes(raw[: len(raw) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("no checkpoint at all")
    elif how == "code":
        torch.save({"format": checkpoint.FORMAT, "x": Intruder()}, path)
    elif how == "pickle":
        path.write_bytes(pickle.dumps(Intruder(), protocol=2))
    elif how == "bit":
        path.write_bytes(raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :])
    elif how == "folder":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("how", ["cut", "bit", "empty", "text", "code", "pickle", "folder"])
def test_unreadable_file_is_named(tmp_path, how):
    path = tmp_path / "last.pt"
    damage(path, how)
    with pytest.raises(ConfigError, match=f"{path} cannot be read as a checkpoint .*delete it and start again") as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "intruded").exists()


@pytest.mark.parametrize("content", [{"format": 0}, {"state_dict": {}}, [1]])
def test_other_file_is_named(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match="other.pt is no checkpoint of this version.*model.weights"):
        checkpoint.load(tmp_path / "other.pt")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="none.pt does not exist"):
        checkpoint.load(tmp_path / "none.pt")


def test_find(tmp_path):
    for run in ("2026-01-02_00-00-00_10", "2026-01-02_00-00-00_9", "2026-01-02_00-00-00", "2026-01-01_00-00-00"):
        checkpoint.save(tmp_path / run / "last.pt", {})
    (tmp_path / "2026-01-03_00-00-00").mkdir()
    newest = tmp_path / "2026-01-02_00-00-00_10" / "last.pt"
    assert checkpoint.find(tmp_path) == (newest, [])
    assert checkpoint.find(newest.parent) == (newest, [])
    other = tmp_path / "2026-01-01_00-00-00" / "last.pt"
    assert checkpoint.find(other) == (other, [])
    assert checkpoint.find(tmp_path / "2026-01-03_00-00-00") == (None, [])
    assert checkpoint.find(tmp_path / "none") == (None, [])


@pytest.mark.parametrize("how", ["cut", "empty", "text", "bit"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, how):
    run, last = tmp_path / "2026-01-01", tmp_path / "2026-01-01" / "last.pt"
    for step in (10, 20, 30):
        checkpoint.save_last(run, {"steps": step}, keep=2, previous=step - 10 if step > 10 else None)
    assert sorted(path.name for path in run.iterdir()) == ["last.pt", "step_000000020.pt"]
    damage(last, how)
    found, (fault,) = checkpoint.find(tmp_path)
    assert checkpoint.load(found)["steps"] == 20
    assert f"{last} cannot be read as a checkpoint" in fault
    damage(found, how)
    with pytest.raises(ConfigError, match=f"--resume {tmp_path}: no checkpoint there is whole. .*last.pt.*step_000000020.pt"):
        checkpoint.find(tmp_path)


def test_a_changed_bit_is_found_or_changes_nothing(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"w": torch.arange(50), "history": [{"loss": 0.5}]})
    raw, whole, rng = path.read_bytes(), checkpoint.load(path), np.random.default_rng(1)
    found = 0
    for position in rng.choice(len(raw), 300, replace=False):
        changed = bytearray(raw)
        changed[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        try:
            assert_same(checkpoint.load(path), whole)
        except ConfigError:
            found += 1
    assert found > 100


def test_a_kill_between_the_two_renamings_leaves_a_checkpoint(tmp_path):
    checkpoint.save(tmp_path / "last.pt", {"steps": 1})
    program = (
        "import os, pathlib; from train import checkpoint; replace = os.replace;"
        "os.replace = lambda a, b: os._exit(9) if str(b).endswith('last.pt') else replace(a, b);"
        f"checkpoint.save_last(pathlib.Path({str(tmp_path)!r}), {{'steps': 2}}, keep=2, previous=1)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 9
    found, _ = checkpoint.find(tmp_path)
    assert (found.name, checkpoint.load(found)["steps"]) == ("step_000000001.pt", 1)
    checkpoint.save_last(tmp_path, {"steps": 2}, keep=2, previous=None)
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "step_000000001.pt"]


def test_another_configuration_is_refused(make):
    recipe = fqt.load_recipe("int8")
    config = make(seed=1, optimizer={"lr": 0.1}).model_dump(mode="json")
    state = {"world": 1, "config": config, "recipe": checkpoint.described(recipe)}
    with pytest.raises(ConfigError, match=r"optimizer.lr was 0.1 and is 0.2; seed was 1 and is 2\. Resume with the same"):
        checkpoint.check(state, make(seed=2, optimizer={"lr": 0.2}), recipe, 1, Path("last.pt"))
    free = make(seed=1, optimizer={"lr": 0.1}, name="other", quiet=False, tracking={"every": 3})
    checkpoint.check(state, free, recipe, 1, Path("last.pt"))
    with pytest.raises(ConfigError, match=r"written by 1 processes and this run has 2.*--nproc_per_node=1"):
        checkpoint.check(state, free, recipe, 2, Path("last.pt"))


def test_an_edited_recipe_is_refused(make):
    before, now = fqt.load_recipe("dorefa_w1a2g6"), fqt.load_recipe("dorefa_w1a2g4")
    state = {"world": 1, "config": make().model_dump(mode="json"), "recipe": checkpoint.described(before)}
    with pytest.raises(ConfigError, match=r"recipe.grad_input was .*bits=6.* and is .*bits=4"):
        checkpoint.check(state, make(), now, 1, Path("last.pt"))


def draw():
    return torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist(), np.random.randn()  # noqa: NPY002


def test_generators_survive_a_file(tmp_path):
    np.random.randn()  # noqa: NPY002 (the legacy generator keeps half of a pair)
    checkpoint.save(tmp_path / "last.pt", {"generators": [checkpoint.generators()]})
    first = draw()
    assert draw() != first
    checkpoint.restore_generators(checkpoint.load(tmp_path / "last.pt")["generators"][0])
    assert draw() == first


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": {f"module.{name}": value for name, value in weights.items()}, "best": 3},
        lambda weights: {"format": 1, "model": weights},
    ],
    ids=["plain", "public", "ours"],
)
def test_weights_of_many_files(tmp_path, wrap):
    weights = {"a.weight": torch.ones(2), "b": torch.zeros(1)}
    torch.save(wrap(weights), tmp_path / "weights.pt")
    assert checkpoint.load_weights(tmp_path / "weights.pt").keys() == weights.keys()


@pytest.mark.parametrize("content", [{}, [1], {"a": 1}])
def test_no_weights(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match="model.weights = .*should hold a state dict"):
        checkpoint.load_weights(tmp_path / "weights.pt")
