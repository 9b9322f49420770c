"""The examples of docs/deploy.md run as they stand there, one after the other."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch

import fqt
from fqt.cli import main

TEXT = (Path(__file__).parents[1] / "docs" / "deploy.md").read_text()


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, source) of each example."""
    return re.findall(r"```(python|sh)\n(.*?)```", text, re.DOTALL)


def sections(text: str) -> dict[str, str]:
    """Heading -> text of the sections that have examples."""
    found = re.split(r"^## (.*)$", text, flags=re.MULTILINE)[1:]
    return {heading: body for heading, body in zip(found[::2], found[1::2], strict=True) if blocks(body)}


def missing(text: str) -> list[str]:
    """Packages that a section needs, `<!-- needs: a, b -->`, and that are not installed."""
    needed = re.search(r"<!-- needs: (.*?) -->", text)
    return [name for name in re.split(r",\s*", needed[1]) if importlib.util.find_spec(name) is None] if needed else []


# of the exporters that the examples call
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_every_section_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    skipped, ran = [], 0
    for heading, body in sections(TEXT).items():
        if missing(body):
            skipped.append(f"{heading}: no {', '.join(missing(body))}")
            continue
        for language, source in blocks(body):
            if language == "python":
                exec(source, names)  # noqa: S102  the example is the subject
            else:
                for line in source.splitlines():
                    python, flag, module, *arguments = shlex.split(line)
                    assert (python, flag, module) == ("python", "-m", "fqt")
                    if "last.pt" in arguments:
                        torch.save({"model": names["model"].state_dict()}, "last.pt")  # type: ignore[attr-defined]
                    assert main(arguments) == 0, capsys.readouterr().err
            ran += 1
    assert ran >= 5 and isinstance(names["loaded"], torch.nn.Module) and any(fqt.quantized_layers(names["again"]))  # type: ignore
    if skipped:
        pytest.skip("; ".join(skipped))


def test_what_is_missing_is_seen() -> None:
    assert missing("<!-- needs: torch, no_such_package -->") == ["no_such_package"] and missing("") == []


def test_the_recipes_are_recipes(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "signs.yaml").write_text(text)
    recipe = fqt.load_recipe(tmp_path / "signs.yaml")
    assert [str(recipe.quantizer("output", letter)) for letter in "xw"] == ["int8/token", "sign/channel"]
