"""Two training steps of every recipe give the bits that they gave when benchmarks/results/golden.json was written."""

import json
import logging

import pytest
import torch

import fqt
from benchmarks import golden
from fqt.cpu import library

TABLES = json.loads(golden.FILE.read_text())


@pytest.fixture(autouse=True)
def _quiet():
    level = logging.getLogger("fqt").level
    logging.getLogger("fqt").setLevel(logging.ERROR)
    yield
    logging.getLogger("fqt").setLevel(level)


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("recipe", fqt.recipes())
@pytest.mark.every(4)
def test_every_bit_is_what_it_was(recipe, part, monkeypatch):
    # One backend: that all give the same bits is shown by tests/fqt/test_kernels.py. The program itself compares both.
    monkeypatch.setattr(golden, "BACKENDS", ("reference" if library.refuses() else "cpu",))
    count, differing = golden.compare([recipe], list(golden.CASES)[part::2], TABLES)
    assert not differing
    assert count > 0 or recipe == "fp32" or golden.canary() not in TABLES


def test_a_changed_bit_is_seen(monkeypatch):
    recipe, case = "int8", "linear"
    whole = golden.steps
    monkeypatch.setattr(golden, "steps", lambda *args, **options: whole(*args, **options)[::-1])
    table = {golden.canary(): {"hashes": golden.record([recipe], [case])}}
    monkeypatch.undo()
    _, differing = golden.compare([recipe], [case], table)
    assert differing == [f"{recipe} / {case} / {mode} / {backend}" for mode in ("train", "eval") for backend in golden.BACKENDS]


def test_zero_and_nan_have_one_hash_each():
    assert golden.digest([torch.tensor([0.0, torch.nan])]) == golden.digest([torch.tensor([-0.0, -torch.nan])])
    assert golden.digest([torch.tensor([0.0])]) != golden.digest([torch.tensor([1e-45])])
