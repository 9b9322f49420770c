"""Push down finds the format that a tensor was made with, and decides nothing at random."""

from __future__ import annotations

import math

import pytest
import torch

from fqt.precision.formats import Precision
from fqt.precision.push_down import EPSILON, Divergence, nearest, push_down

GRIDS = [(2, 0), (3, 1), (4, 3), (4, 10), (5, 2), (6, 6), (6, 0)]


@pytest.mark.parametrize(("word", "fraction"), GRIDS)
def test_an_exact_grid_is_found(word: int, fraction: int) -> None:
    """Every code of <WL, FL> equally often: one bit less of either merges or saturates a part of them."""
    codes = torch.arange(-(2 ** (word - 1)), 2 ** (word - 1)).repeat(50)
    weight = (codes * 2.0**-fraction)[torch.randperm(len(codes))].view(-1, 10)
    assert push_down(weight, 150) == Precision(word, fraction)


@pytest.mark.parametrize(("word", "fraction"), GRIDS)
def test_the_neighbours_of_an_exact_grid_diverge_and_it_does_not(word: int, fraction: int) -> None:
    weight = torch.arange(-(2 ** (word - 1)), 2 ** (word - 1)).repeat(50) * 2.0**-fraction
    measure = Divergence(weight, 150)
    assert measure(word, fraction) == 0.0
    assert measure(word - 1, fraction) > EPSILON
    assert measure(64, fraction - 1) > EPSILON


def test_all_zeros_need_one_bit() -> None:
    assert push_down(torch.zeros(40), 100) == Precision(1, 0)


@pytest.mark.parametrize(
    ("value", "expected"),
    # bins are centred from 0 to the value, so it must come out within half a bin of itself
    [(1.0, (2, 0)), (-1.0, (1, 0)), (0.75, (3, 2)), (-0.75, (3, 2)), (5.0, (4, 0)), (2.0**-9, (2, 9)), (-(2.0**-9), (1, 9))],
)
def test_one_value_is_kept(value: float, expected: tuple[int, int]) -> None:
    assert push_down(torch.full((64,), value), 100) == Precision(*expected)


def test_a_heavy_tail_costs_word_length_not_fraction() -> None:
    """A quarter of the weights at +-16 beside +-1: five bits reach 15 only."""
    body, tail = torch.tensor([-1.0, 1.0]).repeat(300), torch.tensor([-16.0, 16.0]).repeat(100)
    assert push_down(body, 100) == Precision(2, 0)
    assert push_down(torch.cat([body, tail]), 100) == Precision(6, 0)


def test_a_rare_outlier_spreads_the_bins_and_so_needs_less_fraction() -> None:
    weight = torch.randn(20000, generator=torch.Generator().manual_seed(0)) * 0.05
    plain = push_down(weight, 100)
    outlier = push_down(torch.cat([weight, torch.tensor([4.0])]), 100)
    assert outlier.fraction_length < plain.fraction_length
    assert 6 <= plain.word_length <= 10, "a normal distribution over 100 bins of three to four steps"


def test_more_bins_or_a_smaller_epsilon_ask_for_more_bits() -> None:
    weight = torch.randn(20000, generator=torch.Generator().manual_seed(1))
    fractions = [push_down(weight, resolution).fraction_length for resolution in (10, 40, 160)]
    assert fractions == sorted(set(fractions))
    assert push_down(weight, 40, epsilon=1e-4).fraction_length > fractions[1]


def test_what_bisection_finds_is_the_smallest_of_all_that_a_search_finds() -> None:
    generator = torch.Generator().manual_seed(2)
    for scale in (1e-3, 0.1, 3.0):
        weight = torch.randn(3000, generator=generator) * scale
        measure, found = Divergence(weight, 60), push_down(weight, 60)
        fraction = next(fl for fl in range(32) if measure(64, fl) <= EPSILON)
        word = next(wl for wl in range(1, 33) if measure(wl, fraction) <= EPSILON)
        assert found == Precision(word, fraction)


def test_the_divergence_is_kullback_and_leiblers() -> None:
    """Five bins centred on 0, 1, 2, 3, 4, one beyond on either side, half an observation more in each of the seven."""
    weight = torch.tensor([0.6, 1.6, 2.6, 4.0])
    rounded = nearest(weight, 8, -1)
    assert rounded.tolist() == [0.0, 2.0, 2.0, 4.0]
    p = [(c + 0.5) / 7.5 for c in (0, 0, 1, 1, 1, 1, 0)]
    q = [(c + 0.5) / 7.5 for c in (0, 1, 0, 2, 0, 1, 0)]
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert Divergence(weight, 5)(8, -1) == pytest.approx(expected, rel=1e-12)


def test_nearest_saturates_at_both_ends() -> None:
    assert nearest(torch.tensor([-100.0, -1.3, 0.26, 100.0]), 4, 2).tolist() == [-2.0, -1.25, 0.25, 1.75]


def test_no_random_number_is_drawn() -> None:
    before = torch.get_rng_state()
    push_down(torch.linspace(-1, 1, 100), 50)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="the weight holds NaN or infinities"):
        push_down(torch.tensor([0.1, bad]), 50)


def test_a_histogram_of_one_bin_is_refused() -> None:
    with pytest.raises(ValueError, match="resolution is 1: .* at least 2 bins"):
        push_down(torch.ones(3), 1)
