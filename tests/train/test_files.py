"""Where a run writes: a folder of its own, found writable, however many start at once, and `~` means the home folder."""

import threading
from pathlib import Path

import pytest

from train import checkpoint, config, data, files
from train.main import main
from train.wording import ConfigError

ROOT = Path(files.__file__).resolve().parent.parent


def test_runs_that_start_together_have_a_folder_each():
    together, folders = threading.Barrier(12), []

    def start():
        together.wait()
        folders.append(files.new_folder("runs", "run"))

    threads = [threading.Thread(target=start) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 12
    assert all(folder.is_dir() for folder in folders)


@pytest.mark.parametrize("output", ["file", "file/below"])
def test_a_file_in_the_place_of_the_folder(output):
    Path("file").write_text("")
    with pytest.raises(ConfigError, match=f"output = {output}: .*set output to a folder"):
        files.new_folder(output, "run")


def test_an_unwritable_folder_is_told(monkeypatch):
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    for attempt in (lambda: files.check_writable("there"), lambda: files.new_folder("there", "run")):
        with pytest.raises(
            ConfigError, match=r"output = there: .*Permission denied.*set output to a folder that this user may"
        ):
            attempt()


def test_a_check_leaves_nothing(tmp_path):
    files.check_writable("a/b/c")
    assert list(tmp_path.iterdir()) == []
    Path("a").mkdir()
    files.check_writable("a/b")
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


TREE = {"model": {"name": "mlp_small"}, "data": {"name": "digits"}}


def test_the_home_folder_in_every_path_of_a_configuration(home):
    (home / "own.yaml").write_text("extends: int8\n")
    keys = {"output": "~/runs", "recipe": "~/own.yaml", "model": {"name": "mlp_small", "weights": "~/w.pt"}}
    made = config.parse({**TREE, **keys})
    assert [made.output, made.recipe, made.model.weights] == [f"{home}/{name}" for name in ("runs", "own.yaml", "w.pt")]
    assert config.parse({**TREE, "data": {"name": "imagefolder:~/set"}}).data.name == f"imagefolder:{home}/set"
    assert config.parse({**TREE, "data": {"name": "cifar10", "path": "~/c"}}).data.path == f"{home}/c"


def test_the_home_folder_in_options_and_environment(home, monkeypatch, capsys):
    (home / "own.yaml").write_text("model: {name: mlp_small}\ndata: {name: digits, limit: 64, batch_size: 32}\n")
    keys = ["--set", "tracking.enabled=false", "--set", "device=cpu", "--set", "quiet=true", "--set", "output=~/runs"]
    assert main(["--config", "~/own.yaml", *keys]) == 0
    (run,) = (home / "runs" / "own").iterdir()
    assert main(["--config", "~/own.yaml", *keys, "--resume", f"~/runs/own/{run.name}"]) == 0
    assert len(list((home / "runs" / "own").iterdir())) == 1
    monkeypatch.setenv("FQT_DATA", "~/images")
    assert data._places()[0] == home / "images"
    assert not Path("~").exists()


@pytest.mark.parametrize("options", [["--config", "~nobody_here/x"], ["--config", "fp32", "--resume", "~nobody_here/x"]])
def test_a_home_that_there_is_not(options, capsys):
    assert main(options) == 2
    assert "~nobody_here/x: there is no home folder ~nobody_here; write ./~nobody_here/x" in capsys.readouterr().err


def test_a_key_with_a_home_that_there_is_not():
    with pytest.raises(
        ConfigError, match=r'output = "~nobody_here/x": there is no home folder ~nobody_here; write ./~nobody_here'
    ):
        config.parse({**TREE, "output": "~nobody_here/x"})


def test_the_newest_checkpoint_survives_what_is_no_run(tmp_path):
    checkpoint.save(tmp_path / "2026-01-01_00-00-00" / "last.pt", {})
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "figures").mkdir()
    assert checkpoint.find(tmp_path)[0] == tmp_path / "2026-01-01_00-00-00" / "last.pt"
