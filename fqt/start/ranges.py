"""What range to give values: all of them, a percentile, or the one in which quantizing them errs least.

The least squared error is searched over the shares 1.00, 0.99, ... 0.01 of the whole range (the search of EasyQuant, arXiv
2006.16669, section 3.1, over a range instead of a step, for the squared error of the operand itself).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fqt.formats import Format
from fqt.reference import calibrate_groups
from fqt.reference.codes import round_rows

SHARES = [share / 100 for share in range(100, 0, -1)]
BINS = 2048
"""Of a histogram, on each side of zero; at least half of them are within the range of the values."""


def bounds(low: Tensor, high: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """The smallest range of a format that holds low to high, (G,) each."""
    if format.offset:
        return low, high
    if format.code_range[0] == 0:
        return torch.zeros_like(low), high.clamp(min=0)
    span = torch.maximum(high, -low).clamp(min=0)
    return -span, span


def squared_error(rows_GE: Tensor, low: Tensor, high: Tensor, format: Format, counts_E: Tensor | None = None) -> Tensor:
    """The squared error of each group's values in a range of its own, (G,) float64. counts_E: how often each value stands."""
    scale, inverse, offset = calibrate_groups(low, high, None, format, "minmax" if format.offset else "absmax", (-1.0, 1.0))
    groups = torch.arange(rows_GE.shape[0], device=rows_GE.device)
    values = round_rows(rows_GE, format, inverse, offset, groups, None, 0) * scale.unsqueeze(1)
    error = (values - rows_GE if offset is None else values + offset.unsqueeze(1) - rows_GE).double().square()
    return (error if counts_E is None else error * counts_E).sum(1)


def least_error(
    rows_GE: Tensor, low: Tensor, high: Tensor, format: Format, counts_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The share of each group's range, (G,) each, in which its values have the least squared error."""
    middle = torch.zeros_like(low).clamp(low, high)
    best, found = squared_error(rows_GE, low, high, format, counts_E), (low, high)
    for share in SHARES[1:]:
        ends = middle + (low - middle) * share, middle + (high - middle) * share
        error = squared_error(rows_GE, *ends, format, counts_E)
        better = error < best
        best = torch.where(better, error, best)
        found = torch.where(better, ends[0], found[0]), torch.where(better, ends[1], found[1])
    return found


class Histogram:
    """Values counted in bins whose width doubles as larger ones come. Of each bin their mean is known; both ends are exact."""

    def __init__(self) -> None:
        self.low, self.high = 0.0, 0.0
        self.limit = 0.0
        self.counts = torch.zeros(2 * BINS, dtype=torch.float64)
        self.sums = torch.zeros(2 * BINS, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Count finite values, of any shape.

        Raises:
            ValueError: one of them is not finite.
        """
        if not values.numel():
            return
        values = values.detach().float().flatten()
        low, high = (float(end) for end in torch.aminmax(values))
        if not (-torch.inf < low <= high < torch.inf):
            raise ValueError("a value is not finite")
        empty = not self.counts.any()
        self.low, self.high = (low, high) if empty else (min(self.low, low), max(self.high, high))
        self._widen(max(-low, high))
        index = (values * (BINS / self.limit if self.limit else 0.0)).floor_().long().add_(BINS).clamp_(0, 2 * BINS - 1)
        self.counts += torch.bincount(index, minlength=2 * BINS).cpu()
        self.sums += torch.bincount(index, values.double(), minlength=2 * BINS).cpu()

    def _widen(self, size: float) -> None:
        if not self.limit:
            self.limit = size  # All values counted so far are 0, whose bin is the same whatever the limit is.
        while self.limit < size:
            self.limit *= 2
            for bins in (self.counts, self.sums):
                pairs = bins.view(BINS, 2).sum(1)
                bins.zero_()
                bins[BINS // 2 : BINS // 2 + BINS] = pairs

    def values(self) -> tuple[Tensor, Tensor]:
        """The mean of each bin that is not empty, (1, E) float32, and how many values it has, (E,) float64."""
        there = self.counts > 0
        return (self.sums[there] / self.counts[there]).float().unsqueeze(0), self.counts[there]

    def power(self) -> float:
        """The sum of the values' squares."""
        values, counts = self.values()
        return float((values[0].double().square() * counts).sum())

    def range(self, method: str, percent: float, format: Format) -> tuple[Tensor, Tensor]:
        """The range, (1,) float32 each, that a method ("max", "percentile" or "mse") gives values of this kind.

        percent: of the values, which the percentile holds; of a format with an offset, at each end.
        """
        whole = bounds(torch.tensor([self.low]), torch.tensor([self.high]), format)
        if method == "max" or not self.counts.any():
            return whole
        values, counts = self.values()
        if method == "mse":
            return least_error(values, *whole, format, counts)
        if format.code_range[0] < 0:
            span = _quantile(values[0].abs(), counts, percent)
            return bounds(-span, span, format)
        low, high = -_quantile(-values[0], counts, percent), _quantile(values[0], counts, percent)
        return bounds(low, torch.maximum(low, high), format)


def _quantile(values: Tensor, counts: Tensor, percent: float) -> Tensor:
    """The smallest of the values, (1,), that so many per cent of all do not exceed."""
    order = values.argsort()
    reached = counts[order].cumsum(0) >= counts.sum() * percent / 100 * (1 - 1e-12)
    return values[order][int(reached.int().argmax())].reshape(1)
