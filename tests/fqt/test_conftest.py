"""The guards of this folder can fail: memory is really poisoned, and a test's random numbers are its own."""

import numpy as np
import pytest
import torch

from tests.fqt import oracle


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
    first = rng.integers(2**62)
    other = request.config.__dict__.setdefault("_fqt_first_numbers", {})
    other[number] = first
    assert len(set(other.values())) == len(other)


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
