"""What README.md and docs/ show runs, page by page, and what they refer to is there."""

import copy
import re
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fqt

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in FENCE.findall(page.read_text()) if kind == language]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = {"stem": nn.Linear(48, 32), "norm": nn.BatchNorm1d(32), "relu": nn.ReLU()}
    layers |= {"layer1": nn.Linear(32, 32), "layer4": nn.Linear(32, 32), "head": nn.Linear(32, 10)}
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), **layers))


OWN = {"deploy"}  # tests/test_deploy.py runs its blocks, one after the other


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python") and page.stem not in OWN], ids=lambda page: page.stem
)
def test_python_runs(page, monkeypatch, tmp_path):
    """Each block on a network that is not converted, with a batch of images; `...` stands for what a reader has."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    images, labels = torch.randn(16, 3, 4, 4), torch.randint(10, (16,))
    # times are not what is tested, and no layer here is faster in low bits
    fast = SimpleNamespace(speedups=lambda: {"layer1": 2.0, "layer4": 0.5})
    monkeypatch.setattr(sys.modules["fqt.convert"], "measure", lambda *_, **__: fast)
    monkeypatch.setattr(fqt, "recommend", lambda *args, **options: fqt.profile(*args, recipe="int8", seconds=0.01))
    for code in blocks(page, "python"):
        model = network()
        names = {
            "fqt": fqt, "torch": torch, "copy": copy, "model": model, "images": images, "labels": labels,
            "batches": [(images, labels)], "criterion": nn.functional.cross_entropy,
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        }  # fmt: skip
        exec(compile(code, f"{page.name}", "exec"), names)  # noqa: S102


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=lambda page: page.stem)
def test_yaml_is_a_recipe(page, tmp_path):
    for text in blocks(page, "yaml"):
        (tmp_path / "shown.yaml").write_text(text)
        assert fqt.load_recipe(tmp_path / "shown.yaml").low_bit("output")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        if path.startswith("http"):
            continue
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_every_recipe_is_in_the_table():
    text = (ROOT / "docs" / "recipes.md").read_text()
    shown = {name for line in text.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)`", line)}
    families = r"psq_b\d|fqt_1bit_b\d|dorefa_w\da\dg\d"
    assert {name for name in fqt.recipes() if not re.fullmatch(families, name)} <= shown
