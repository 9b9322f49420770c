"""How AdaPT's own settings move (section 3.4): the lookback of a layer, its resolution, and the strategy of the model."""

from __future__ import annotations

import math

from fqt.precision.push_up import STRATEGIES

Bounds = tuple[int, int]


def next_lookback(lookback: int, diversity: float, bounds: Bounds, momentum: float) -> int:
    """Steps until the next decision: ceil(m clip(lb_max / diversity, lb_min, lb_max) + (1 - m) lookback).

    Diverse gradients are looked back upon more often. A diversity that is NaN (no gradients) counts as 1: nothing happens, so
    look rarely.
    """
    low, high = bounds
    wanted = float(high) if math.isnan(diversity) else min(max(high / diversity, low), high)
    return min(max(math.ceil(momentum * wanted + (1 - momentum) * lookback), low), high)


def next_resolution(resolution: int, lookback: int, lookback_bounds: Bounds, bounds: Bounds) -> int:
    """Bins of push down's histograms: one more where the lookback sits at its maximum, one fewer at its minimum."""
    low, high = lookback_bounds
    change = 0 if low == high else (lookback == high) - (lookback == low)
    return min(max(resolution + change, bounds[0]), bounds[1])


def next_strategy(strategy: str, loss: float, recent_mean: float) -> str:
    """One step harder (min, mean, max) while the loss is not below its recent mean, else min. NaN changes nothing."""
    if math.isnan(loss) or math.isnan(recent_mean):
        return strategy
    if loss < recent_mean:
        return STRATEGIES[0]
    return STRATEGIES[min(STRATEGIES.index(strategy) + 1, len(STRATEGIES) - 1)]
