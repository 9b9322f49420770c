"""The guards of this folder can fail: memory is really poisoned, and a test's random numbers are its own."""

import re

import numpy as np
import pytest
import torch

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
