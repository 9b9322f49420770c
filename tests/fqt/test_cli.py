"""The shell: each command on a real file, its help, its errors in one paragraph, its exit status."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import fqt
from fqt.cli import COMMANDS, main

FACTORY = "torchvision:squeezenet1_1"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of torchvision, with its factory."""
    path = tmp_path_factory.mktemp("cli") / "m.safetensors"
    torch.manual_seed(0)
    model = fqt.convert(torchvision.models.squeezenet1_1(num_classes=5), "fqt_1bit")
    fqt.save(model, path, factory=FACTORY, arguments={"num_classes": 5})
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert (
        stop.value.code == 0
        and f"usage: python -m fqt {command}" in said
        and " ".join(COMMANDS[command].run.__doc__.split()) in said
    )


def test_inspect_adds_up_to_the_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(file)]) == 0
    out = capsys.readouterr().out
    assert "SqueezeNet, 24 frozen layers by fqt_1bit" in out and 'factory: torchvision:squeezenet1_1 {"num_classes": 5}' in out
    _, _, head, _, *table, _, total = out.splitlines()
    (expand,) = [line.split() for line in table if line.startswith("features.3.expand3x3.packed.0 ")]
    assert expand[1:4] == ["sign:O", "2", "1"] and expand[-3:] == ["64", "1,408", "1.22"], "64 x 16 x 3 x 3, 64 scales"
    end = head.index(" bytes") + len(" bytes")
    in_bytes = [int(line[:end].split()[-1].replace(",", "")) for line in [*table, total]]
    assert in_bytes[-1] == file.stat().st_size == sum(in_bytes[:-1]), "the total is the file's size"


def test_summary_builds_what_the_file_records_or_what_is_named(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", str(file)]) == 0
    recorded = capsys.readouterr().out
    assert recorded.count("frozen") == 24
    assert main(["summary", str(file), "--factory", FACTORY, "--arguments", '{"num_classes": 5}']) == 0
    assert capsys.readouterr().out == recorded
    assert main(["summary", str(file), "--factory", FACTORY]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fqt summary: ") and error.count("\n") == 1 and "does not fit this SqueezeNet" in error


@pytest.mark.parametrize("kind", ["m.safetensors", "m.pt", "last.pt"])
def test_freeze_a_state_dict(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = fqt.convert(torchvision.models.squeezenet1_1(num_classes=5), "int8")
    state = model.state_dict()
    if kind.endswith(".pt"):
        torch.save({"format": 2, "model": state} if kind == "last.pt" else state, tmp_path / kind)
    else:
        save_file(state, tmp_path / kind)
    command = ["freeze", str(tmp_path / kind), str(tmp_path / "out"), "--recipe", "int8", "--factory", FACTORY]
    assert main([*command, "--arguments", '{"num_classes": 5}']) == 0
    assert f"{(tmp_path / 'out').stat().st_size:,} bytes" in capsys.readouterr().out
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(fqt.load(tmp_path / "out", factory=True)(x), model.eval()(x))
    assert main(command) == 1 and "does not fit torchvision:squeezenet1_1 by int8" in capsys.readouterr().err


def test_freeze_takes_the_recipes_that_a_policy_decided(tmp_path: Path) -> None:
    model = fqt.convert(torchvision.models.squeezenet1_1(num_classes=5), "int8")
    policy = fqt.build_policy("static", model)
    model.features[3].squeeze.recipe = fqt.load_recipe("int4")
    torch.save({"model": model.state_dict(), "precision": {"policy": policy.state_dict()}}, tmp_path / "last.pt")
    command = ["freeze", str(tmp_path / "last.pt"), str(tmp_path / "out"), "--recipe", "int8", "--factory", FACTORY]
    assert main([*command, "--arguments", '{"num_classes": 5}']) == 0
    assert fqt.load(tmp_path / "out", factory=True).features[3].squeeze.packed[0].format.name == "int4:O"


def test_bench_times_both(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(file), "--shape", "3", "32", "32", "--batch", "1", "2", "--seconds", "0"]) == 0
    said = capsys.readouterr()
    assert [line.split()[:2] for line in said.out.splitlines()[1:]] == [["1", "1"], ["2", "1"]]
    assert said.err.splitlines() == ["batch of 1 ...", "batch of 2 ..."]


def test_errors_are_a_paragraph_and_a_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "none")]) == 1
    assert re.fullmatch(
        r"fqt inspect: \S+ is not there, or is no file: give one that fqt.save wrote\n", capsys.readouterr().err
    )
    fqt.save(fqt.convert(nn.Linear(3, 2), fqt.load_recipe("int8").everywhere()), tmp_path / "m")
    assert main(["summary", str(tmp_path / "m")]) == 1
    assert "records no factory: give an instance of QuantLinear" in capsys.readouterr().err
    torch.save([1], tmp_path / "list.pt")
    assert main(["freeze", str(tmp_path / "list.pt"), "out", "--recipe", "int8", "--factory", FACTORY]) == 1
    assert "holds no state dict" in capsys.readouterr().err
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04")
    assert main(["freeze", str(tmp_path / "cut.pt"), "out", "--recipe", "int8", "--factory", FACTORY]) == 1
    assert re.fullmatch(
        r"fqt freeze: \S+cut.pt cannot be read \(.*\): give a state dict .*\n", capsys.readouterr().err.split("parameters\n")[1]
    )
    with pytest.raises(SystemExit) as stop:
        main(["summary", str(tmp_path / "m"), "--arguments", "[]"])
    assert stop.value.code == 2 and "is no JSON object" in capsys.readouterr().err
