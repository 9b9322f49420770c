"""Push down (AdaPT, section 3.2): the smallest <WL, FL> whose quantized weights are distributed as the weights are.

Two histograms, of W and of its quantized copy Q(W), are compared by the Kullback-Leibler divergence KL(W || Q(W)) in nats; "no
divergence" is at most `EPSILON`. `resolution` bins are centred from the smallest to the largest weight, zero included, and one
more on either side takes what quantizing moved beyond them. Every bin counts half an observation beside its own (Krichevsky and
Trofimov), so that a single weight in a tail does not make the divergence infinite. Q rounds to nearest: the decision draws no
random numbers, so every rank and every resumed run takes it alike.

With r quantization steps to a bin, bins hold floor(r) or ceil(r) grid points, and KL of a smooth distribution is about
1 / (8 r^2): EPSILON = 0.01 asks for three to four steps a bin.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fqt.precision.formats import MAX_WORD_LENGTH, Precision

EPSILON = 1e-2
MAX_FRACTION_LENGTH = MAX_WORD_LENGTH - 1


def push_down(weight: Tensor, resolution: int, *, epsilon: float = EPSILON) -> Precision:
    """Smallest <WL, FL>, 1 <= WL <= 32, 0 <= FL <= 31, within `epsilon`; found by bisection, FL first, then WL.

    Args:
        weight: any shape, float; finite.
        resolution: bins of both histograms, at least 2.
        epsilon: the largest divergence that counts as none, in nats.

    Raises:
        ValueError: a weight that is not finite, or fewer than 2 bins.
    """
    if resolution < 2:
        raise ValueError(f"resolution is {resolution}: a histogram that shows a difference has at least 2 bins")
    w = weight.detach().float().flatten()
    if not bool(w.isfinite().all()):
        raise ValueError("the weight holds NaN or infinities, so it has no distribution: keep the format it has")
    measure = Divergence(w, resolution)
    fraction = _smallest(0, MAX_FRACTION_LENGTH, lambda fl: measure(64, fl) <= epsilon)
    word = _smallest(1, MAX_WORD_LENGTH, lambda wl: measure(wl, fraction) <= epsilon)
    return Precision(word, fraction)


class Divergence:
    """KL(W || Q(W)) of a weight at any <WL, FL>; what all formats share is computed once."""

    def __init__(self, weight: Tensor, resolution: int) -> None:
        self._w = weight
        low, high = (float(v) for v in torch.aminmax(weight)) if weight.numel() else (0.0, 0.0)
        self._low, span = min(low, 0.0), max(high, 0.0) - min(low, 0.0)
        self._bins_per_unit = (resolution - 1) / span if span > 0 else 0.0
        self._resolution = resolution
        self._p = self._distribution(weight)

    def __call__(self, word_length: int, fraction_length: int) -> float:
        """In nats, 0 where both histograms are equal."""
        q = self._distribution(nearest(self._w, word_length, fraction_length))
        return float((self._p * (self._p / q).log()).sum().clamp(min=0.0))

    def _distribution(self, values: Tensor) -> Tensor:
        # in float64, in which a point of the grid falls into the same bin whether it was rounded to or was there before
        bins = (values.double() - self._low).mul_(self._bins_per_unit).add_(0.5).floor_().clamp_(-1, self._resolution)
        counts = torch.bincount(bins.long() + 1, minlength=self._resolution + 2).double().add_(0.5)
        return counts / counts.sum()


def nearest(w: Tensor, word_length: int, fraction_length: int) -> Tensor:
    """w rounded to the nearest value of <WL, FL>, ties to even, saturated."""
    top = 2.0 ** (word_length - 1)
    codes = (w.double() * 2.0**fraction_length).round_().clamp_(-top, top - 1)
    return codes.mul_(2.0**-fraction_length)


def _smallest(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The smallest number in [low, high] that holds, if those above it do too; `high` if none does."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
