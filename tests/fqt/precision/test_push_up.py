"""Push up and the transitions against tables worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fqt.precision.formats import Precision
from fqt.precision.push_up import gradient_diversity, push_up, raise_by
from fqt.precision.transitions import next_lookback, next_resolution, next_strategy


def test_diversity_of_gradients_by_hand() -> None:
    """Two orthogonal ones of lengths 3 and 4: (3 + 4) / 5. Equal ones: 1. Opposite ones cancel."""
    assert gradient_diversity(7.0, 5.0) == pytest.approx(1.4)
    assert gradient_diversity(6.0, 6.0) == 1.0
    assert gradient_diversity(2.0, 0.0) == math.inf


def test_diversity_is_not_below_one_by_rounding() -> None:
    assert gradient_diversity(1.0, 1.0 + 1e-7) == 1.0


@pytest.mark.parametrize("sums", [(0.0, 0.0), (math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0)])
def test_zero_and_nan_gradients_have_no_diversity(sums: tuple[float, float]) -> None:
    assert math.isnan(gradient_diversity(*sums))


@pytest.mark.parametrize(
    ("x", "fraction", "expected"),
    [
        # s1 = ceil(1 / 0.2601) = 4, s2 = ceil(8.32) - FL
        (0.51, 5, {"min": 4, "mean": 4, "max": 4}),
        (0.51, 8, {"min": 1, "mean": 3, "max": 4}),
        (0.51, 20, {"min": 0, "mean": 2, "max": 4}),
        # s1 = max(ceil(0.83), 1) = 1, s2 = min(ceil(38.7), 32) - FL
        (1.1, 10, {"min": 1, "mean": 12, "max": 22}),
        (2.0, 30, {"min": 1, "mean": 2, "max": 2}),
        # s1 = ceil(59.2) = 60, s2 = ceil(0.54) - FL = 1 - FL
        (0.13, 0, {"min": 1, "mean": 31, "max": 60}),
        (0.13, 4, {"min": 0, "mean": 30, "max": 60}),
        (0.0, 4, {"min": 1, "mean": 1, "max": 1}),
        (-0.7, 4, {"min": 1, "mean": 1, "max": 1}),
    ],
)
def test_the_raise_for_each_strategy(x: float, fraction: int, expected: dict[str, int]) -> None:
    diversity = math.exp(1 + x)
    assert {strategy: raise_by(diversity, fraction, strategy) for strategy in expected} == expected


@pytest.mark.parametrize("diversity", [math.nan, math.inf, 1.0])
def test_no_diversity_adds_one_bit(diversity: float) -> None:
    assert raise_by(diversity, 3, "max") == 1


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(ValueError, match="strategy 'median' is not one of min, mean, max"):
        raise_by(4.0, 3, "median")


@pytest.mark.parametrize(
    ("before", "bits", "buffer", "longest", "after"),
    [
        # the paper: FL += s; WL = max(WL, FL) + 1; 8 bits of headroom stay between them; both at most 32
        ((8, 4), 1, 8, 32, (13, 5)),
        ((16, 4), 1, 8, 32, (17, 5)),
        ((8, 20), 2, 8, 32, (30, 22)),
        ((8, 20), 10, 8, 32, (32, 24)),
        ((32, 31), 40, 8, 32, (32, 24)),
        ((8, 4), 1, 0, 32, (9, 5)),
        ((8, 4), 1, 4, 8, (8, 4)),
        # activations with a scale of their own: the weights' range stays
        ((7, 9), 1, None, 32, (8, 10)),
        ((7, 9), 4, None, 8, (8, 10)),
        ((12, 9), 0, None, 8, (8, 5)),
    ],
)
def test_push_up_by_hand(before, bits, buffer, longest, after) -> None:
    assert push_up(Precision(*before), bits, buffer, longest) == Precision(*after)


@pytest.mark.parametrize(
    ("lookback", "diversity", "momentum", "expected"),
    [
        (25, 1.0, 1.0, 100),  # gradients agree: look rarely
        (100, 4.0, 1.0, 25),
        (100, 1000.0, 1.0, 25),
        (100, math.inf, 1.0, 25),
        (60, 2.0, 1.0, 50),
        (60, 3.0, 1.0, 34),  # ceil(33.3)
        (60, 2.0, 0.5, 55),
        (61, 2.0, 0.25, 59),  # ceil(12.5 + 45.75)
        (60, 2.0, 0.0, 60),
        (25, math.nan, 1.0, 100),
    ],
)
def test_lookback_by_hand(lookback: int, diversity: float, momentum: float, expected: int) -> None:
    assert next_lookback(lookback, diversity, (25, 100), momentum) == expected


@pytest.mark.parametrize(
    ("lookback", "resolution", "expected"),
    [(100, 80, 81), (25, 80, 79), (60, 80, 80), (100, 150, 150), (25, 50, 50), (99, 80, 80), (26, 80, 80)],
)
def test_resolution_by_hand(lookback: int, resolution: int, expected: int) -> None:
    assert next_resolution(resolution, lookback, (25, 100), (50, 150)) == expected


def test_a_fixed_lookback_leaves_the_resolution() -> None:
    assert next_resolution(80, 40, (40, 40), (50, 150)) == 80


@pytest.mark.parametrize(
    ("strategy", "loss", "mean", "expected"),
    [
        ("min", 1.0, 1.0, "mean"),
        ("min", 1.1, 1.0, "mean"),
        ("mean", 1.1, 1.0, "max"),
        ("max", 1.1, 1.0, "max"),
        ("min", 0.9, 1.0, "min"),
        ("mean", 0.9, 1.0, "min"),
        ("max", 0.9, 1.0, "min"),
        ("mean", math.nan, 1.0, "mean"),
        ("mean", 1.0, math.nan, "mean"),
    ],
)
def test_strategy_by_hand(strategy: str, loss: float, mean: float, expected: str) -> None:
    assert next_strategy(strategy, loss, mean) == expected


def test_diversity_of_real_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(50, 400, generator=generator)
    found = gradient_diversity(float(g.norm(dim=1).sum()), float(g.sum(0).norm()))
    assert found == pytest.approx(math.sqrt(50), rel=0.1), "independent gradients: the square root of their number"
