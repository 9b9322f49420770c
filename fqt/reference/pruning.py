"""Activation gradient pruning (1-Bit FQT, arXiv 2408.14267, section 4.2): which groups are kept, in exact arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from fqt.philox import uniform_u24

ONE = 1 << 24
"""The probability 1, in the integers that decide."""
KERNEL_MODES = ("", "bernoulli", "topk")
"""What a kernel that quantizes in one pass knows of pruning. Groups that are drawn otherwise are drawn here, and encoded by any
kernel with the scales that they have then."""


def check_kernel_mode(mode: str) -> None:
    """Raise ValueError for a mode that no such kernel knows."""
    if mode not in KERNEL_MODES:
        raise ValueError(f"prune {mode!r} is drawn by the reference's calibrate alone: find the scales with it, then encode")


def keep_groups(low: Tensor, high: Tensor, mode: str, b: int, key: Tensor | None, stream: int) -> tuple[Tensor, Tensor]:
    """Activation gradient pruning (1-Bit FQT, section 4.2): which groups are kept, and by what they are multiplied.

    "bernoulli": group i is kept with probability p_i = min(1, c * R_i), c such that the p_i sum to G/b (at least 1), and
    multiplied by 1/p_i: unbiased. The paper's p_i = (G/b) R_i / sum R can exceed 1; clipping that alone would keep too few,
    so the excess is spread. R_i = max(x, 0) - min(x, 0) includes the zero, so a constant group is not lost.
    "systematic": the same probabilities and factors, so unbiased too, but one draw for all groups: the p_i stand one behind the
    other on a line, and every group is kept in whose piece one of the points u, u + 1, u + 2 ... falls. So the number of kept
    groups is G/b rounded up or down, never none. Which groups are kept together depends on their order.
    "topk": the max(1, G // b) groups of the largest max |x|, not rescaled: what the paper's code does. Biased.

    The probabilities are multiples of 2^-24 that come from exact integer sums, hence equal everywhere. A group that is not
    finite is kept as it is.

    Args:
        low, high: of `group_range`.

    Returns:
        (kept,) int64 ascending, and (G,) float32, 0 for a pruned group.
    """
    groups = low.shape[0]
    if groups == 0:
        return torch.arange(0, device=low.device), low
    high, low = high.clamp(min=0), low.clamp(max=0)
    bad = ~(high - low).isfinite()
    if mode == "topk":
        order = torch.where(bad, torch.inf, torch.maximum(high, -low)).argsort(descending=True, stable=True)
        keep = torch.zeros_like(bad).index_fill_(0, order[: max(1, groups // b)], True) | bad
        return keep.nonzero()[:, 0], keep.float()

    span = torch.where(bad, 0.0, high - low).double()
    # ranges as integers of 30 bits, so that their sums are exact in any order
    range_30 = torch.where(span > 0, (span * (2.0**30 / span.max())).floor().clamp(min=1), 0.0).long()
    budget = max(groups * ONE / b, float(ONE))
    largest = range_30.sort(descending=True).values
    rest = largest.flip(0).cumsum(0).flip(0).double()  # sum of the ranges from the k-th largest on
    left = (budget - ONE * torch.arange(groups, device=span.device, dtype=torch.float64)).clamp(min=0)
    fits = (left * largest <= ONE * rest).nonzero()  # with the k widest kept for sure, no other p exceeds 1
    k = int(fits[0]) if fits.numel() else groups
    sure = (range_30 >= largest[k - 1]) | bad if k else bad
    share = left[k] / rest[k].clamp(min=1) if k < groups else torch.zeros_like(left[0])
    threshold = torch.where(range_30 > 0, (range_30 * share).round().clamp(1, ONE), 0.0)
    threshold = torch.where(sure, float(ONE), threshold)
    assert key is not None, "pruning at random needs a key"
    first = torch.zeros(1, dtype=torch.int64, device=span.device)
    if mode == "systematic":
        ends = threshold.long().cumsum(0)
        # where rounding leaves the sum a little under one, the point still falls on the line
        point = uniform_u24(first, 1, key, stream)[0].long() * ends[-1].clamp(max=ONE) // ONE
        before = (ends - point + ONE - 1) // ONE  # points below the end of each piece
        keep = before.diff(prepend=before.new_zeros(1)) > 0
    else:
        keep = uniform_u24(first, groups, key, stream)[0] < threshold
    return keep.nonzero()[:, 0], torch.where(keep, ONE / threshold, 0.0).float()


def kept_index(kept: Tensor, groups: int) -> Tensor:
    """(groups,) int32: the numbers of the kept groups in ascending order, then -1."""
    index = torch.full((groups,), -1, dtype=torch.int32, device=kept.device)
    index[: kept.numel()] = kept.int()
    return index
