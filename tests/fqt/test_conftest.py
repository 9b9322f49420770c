"""The guards of this folder can fail: memory is really poisoned, and a test's random numbers are its own."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests import conftest
from tests.fqt import oracle
from tests.fqt.helpers import case_seeds, random_case, random_numbers


@pytest.mark.usefixtures("poisoned_memory")
def test_uninitialized_memory_is_poisoned():
    assert bool(torch.empty(3).isnan().all())
    assert bool(torch.ones(2, dtype=torch.float64).new_empty(3).isnan().all())
    assert torch.empty(4, dtype=torch.uint8).tolist() == [255] * 4
    assert torch.empty_like(torch.zeros(2, dtype=torch.int16)).tolist() == [32767] * 2
    assert torch.empty_strided((2,), (3,), dtype=torch.int32).tolist() == [2**31 - 1] * 2


def test_the_poison_is_gone_after_the_test():
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("number", [1, 2])
def test_random_numbers_depend_on_the_tests_name(number, rng, request):
    name = request.node.nodeid
    first = rng.integers(2**62)
    assert f"[{number}]" in name and first == random_numbers(name).integers(2**62)
    assert first != random_numbers(name.replace(f"[{number}]", f"[{3 - number}]")).integers(2**62)


def test_a_random_case_can_be_repeated_alone(rng, monkeypatch):
    monkeypatch.delenv("FQT_TEST_CASE", raising=False)
    seeds = case_seeds(rng, 20)
    assert len(set(seeds)) == 20
    with random_case(seeds[7]) as (draw, generator):
        drawn = draw.random(), torch.rand((), generator=generator)
    with pytest.raises(ZeroDivisionError) as failed, random_case(seeds[7]):
        _ = 1 / 0
    (note,) = failed.value.__notes__
    monkeypatch.setenv("FQT_TEST_CASE", re.search(r"FQT_TEST_CASE=(\d+)", note)[1])
    (alone,) = case_seeds(rng, 20)
    with random_case(alone) as (draw, generator):
        assert (draw.random(), torch.rand((), generator=generator)) == drawn


def test_the_z_test_finds_a_small_bias_and_passes_none():
    draws = 10000
    rng = np.random.default_rng(0)
    fair = rng.binomial(draws, 0.3, 50)
    oracle.assert_mean(fair, draws, np.full(50, 0.3), np.full(50, 0.21))
    with pytest.raises(AssertionError, match="biased"):
        oracle.assert_mean(fair, draws, np.full(50, 0.31), np.full(50, 0.21))
    with pytest.raises(AssertionError, match="biased"):  # one of fifty
        oracle.assert_mean(fair + np.eye(50)[7] * 300, draws, np.full(50, 0.3), np.full(50, 0.21))
    with pytest.raises(AssertionError, match="a certain value varies"):
        oracle.assert_mean(np.array([1.0]), draws, np.array([0.0]), np.array([0.0]))


class Item:
    """A case as pytest collects it."""

    def __init__(self, nodeid: str, share: int | None, **options: str) -> None:
        self.nodeid, self.share, self.options = nodeid, share, options

    def get_closest_marker(self, name: str) -> SimpleNamespace | None:
        return SimpleNamespace(args=(self.share,), kwargs=self.options) if name == "every" and self.share else None


def taken(
    monkeypatch, seed: int = 1, effort: float = 1, named: str = "tests", keyword: str = ""
) -> tuple[list[str], list[str]]:
    """Of seven cases of a test marked every(3), four tests marked every(2, of="of") and one of another, those that run and
    those that are counted as left out."""
    monkeypatch.setattr(conftest, "SEED", seed)
    monkeypatch.setattr(conftest, "EFFORT", effort)
    left: list[Item] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: left.extend(items))
    config = SimpleNamespace(args=[named], option=SimpleNamespace(keyword=keyword), hook=hook)
    several = (Item(f"b.py::test_{n}", 2, of="of") for n in range(4))
    items = [*(Item(f"a.py::test_n[{n}]", 3) for n in range(7)), *several, Item("a.py::test_other", None)]
    conftest.pytest_collection_modifyitems(config, items)
    return [item.nodeid for item in items], sorted(item.nodeid for item in left)


def test_a_default_run_takes_a_share_of_a_marked_test_and_counts_the_rest(monkeypatch):
    every = {*(f"a.py::test_n[{n}]" for n in range(7)), *(f"b.py::test_{n}" for n in range(4)), "a.py::test_other"}
    ran, left = taken(monkeypatch)
    assert [sum(name.startswith(file) for name in ran) for file in ("a", "b")] == [4, 2]
    assert len(ran) == 6 and ran[-1] == "a.py::test_other" and {*ran, *left} == every
    assert taken(monkeypatch) == (ran, left), "the same in every process"
    assert {case for seed in range(30) for case in taken(monkeypatch, seed)[0]} == every, "others with another seed"
    for options in ({"effort": 2}, {"named": "a.py::test_n[4]"}, {"keyword": "test_n"}):
        assert len(taken(monkeypatch, **options)[0]) == 12
