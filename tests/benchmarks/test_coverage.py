"""The coverage benchmark: a model that is as it should be is ok, and each thing that may be wrong is a miss."""

from __future__ import annotations

import json
import time

import pytest
import torch
from torch import Tensor, nn

from benchmarks import coverage
from benchmarks.coverage import Case


def small() -> tuple[nn.Module, object]:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    return model, torch.randn(4, 8)


class Refuses(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise OSError("no such disk\nanywhere")


def test_a_row_says_the_share_or_the_reason(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is in the file before the next one is tried, which is then not tried again."""
    file = tmp_path / "rows.json"
    cases = [
        Case("mine", "small", small),
        Case("mine", "broken", lambda: (nn.Sequential(nn.Linear(8, 8), Refuses(8, 8)), torch.randn(4, 8))),
    ]
    assert len(coverage.run(cases[:1], ["int8"], file)) == len(json.loads(file.read_text())["rows"]) == 1
    with monkeypatch.context() as patch:
        patch.setattr(coverage, "check", lambda *_: pytest.fail("a finished row was tried again"))
        coverage.run(cases[:1], ["int8"], file)
    good, bad = coverage.run(cases, ["int8"], file)
    assert good["ok"] and good["share"] == good["of_layers"] == pytest.approx(64 / (64 + 64 + 16))
    assert not bad["ok"] and bad["reason"] == "OSError: no such disk (forward)"
    (slow,) = coverage.run([Case("mine", "slow", lambda: time.sleep(60))], ["int8"], limit=0.05)  # type: ignore[arg-type]
    assert not slow["ok"] and slow["reason"].startswith("TimeoutError: longer than 0.05 s")


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("revert", lambda model: model, "other classes after revert"),
        ("convert", lambda model, *args, **options: model.register_buffer("extra", torch.ones(1)), "other names in the state"),
    ],
)
def test_the_check_can_fail(name: str, damage, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage.fqt, name, damage)
    with pytest.raises(AssertionError, match=words):
        coverage.check(*small(), "int8")


def test_every_group_has_cases_of_what_is_installed() -> None:
    cases = list(coverage.cases())
    groups = {case.group for case in cases}
    assert {"timm", "torchvision classify", "torchvision segment", "torchvision detect", "torchvision video"} <= groups
    assert {case.name for case in cases if case.group == "timm"} == set(coverage.TIMM.split())
