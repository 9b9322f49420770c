"""Activation gradient pruning on the device: `fqt.reference.keep_groups` without asking the host.

Sorting is counting: a group's rank is the number of those that go before it. One program then does what remains, which is a
few sums over the groups in order.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fqt.triton_kernels import plan
from fqt.triton_kernels.launch import launch

_ONE = tl.constexpr(16777216)  # the probability 1


@triton.jit
def _widths(low_ptr, high_ptr, g, groups):
    """Of groups: largest |x|, range with the zero in it, and whether it is not finite; NaN is not."""
    low = tl.load(low_ptr + g, mask=g < groups, other=0.0)
    high = tl.load(high_ptr + g, mask=g < groups, other=0.0)
    up = tl.where(high > 0, high, 0.0)
    down = tl.where(low < 0, low, 0.0)
    bad = ~(tl.abs(up - down) < float("inf")) | (low != low) | (high != high)
    largest = tl.where(up > -down, up, -down)
    return largest, tl.where(bad, 0.0, up - down), bad


@triton.jit
def _keys(low_ptr, high_ptr, g, groups, widest, TOPK: tl.constexpr):
    """What groups are sorted by, largest first, as float64: the largest |x|, or the range as an integer of 30 bits."""
    largest, span, bad = _widths(low_ptr, high_ptr, g, groups)
    if TOPK:
        keys = tl.where(bad, float("inf"), largest).to(tl.float64)
    else:
        keys = tl.floor(span.to(tl.float64) * (1073741824.0 / widest))
        keys = tl.where(span > 0, tl.where(keys < 1.0, 1.0, keys), 0.0)
    return keys


@triton.jit
def _rank(low_ptr, high_ptr, rank_ptr, key_ptr, sorted_ptr, groups, TOPK: tl.constexpr, BLOCK: tl.constexpr):
    """Ranks, largest key first and equal ones in order; the keys, and the keys sorted."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    widest = tl.full((BLOCK,), 0.0, tl.float32)
    for first in range(0, groups, BLOCK):
        _, span, _ = _widths(low_ptr, high_ptr, first + tl.arange(0, BLOCK), groups)
        widest = tl.maximum(widest, span)
    most = tl.max(widest, axis=0).to(tl.float64)
    most = tl.where(most > 0, most, 1.0)
    mine = _keys(low_ptr, high_ptr, i, groups, most, TOPK)
    rank = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, groups, BLOCK):
        j = first + tl.arange(0, BLOCK)
        other = _keys(low_ptr, high_ptr, j, groups, most, TOPK)
        before = (other[None, :] > mine[:, None]) | ((other[None, :] == mine[:, None]) & (j[None, :] < i[:, None]))
        rank += tl.sum((before & (j < groups)[None, :]).to(tl.int32), axis=1)
    ok = i < groups
    tl.store(rank_ptr + i, rank, mask=ok)
    tl.store(key_ptr + i, mine, mask=ok)
    tl.store(sorted_ptr + rank, mine, mask=ok)


@triton.jit
def _keep(
    calibrated_ptr, rank_ptr, range_ptr, sorted_ptr, key_ptr, scale_ptr, offset_ptr, factor_ptr, index_ptr,
    groups, keep_one_in, stream, TOPK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Which groups are kept, and times what; their scales and offsets multiplied. One program."""
    low_ptr = calibrated_ptr + 3 * groups
    high_ptr = calibrated_ptr + 4 * groups
    one = tl.full((), 16777216.0, tl.float64)
    zero = tl.full((), 0.0, tl.float64)
    share = zero
    sure_from = zero
    any_sure = False
    if not TOPK:
        total = tl.zeros((), tl.int64)
        for first in range(0, groups, BLOCK):
            k = first + tl.arange(0, BLOCK)
            total += tl.sum(tl.load(sorted_ptr + k, mask=k < groups, other=0.0).to(tl.int64), axis=0)
        budget = (zero + groups) * one / (zero + keep_one_in)
        budget = tl.where(budget > one, budget, one)
        # the least k such that, with the k widest kept for sure, no other probability exceeds 1
        sure = zero.to(tl.int32) + groups
        rest_there = tl.zeros((), tl.int64)
        before = tl.zeros((), tl.int64)
        for first in range(0, groups, BLOCK):
            k = first + tl.arange(0, BLOCK)
            widths = tl.load(sorted_ptr + k, mask=k < groups, other=0.0).to(tl.int64)
            rest = total - before - (tl.cumsum(widths, axis=0) - widths)
            left = budget - one * k.to(tl.float64)
            left = tl.where(left > 0.0, left, 0.0)
            fits = (left * widths.to(tl.float64) <= one * rest.to(tl.float64)) & (k < groups)
            here = tl.min(tl.where(fits, k, groups), axis=0)
            there = tl.sum(tl.where(k == here, rest, 0), axis=0)
            rest_there = tl.where(here < sure, there, rest_there)
            sure = tl.minimum(sure, here)
            before += tl.sum(widths, axis=0)
        left = budget - one * sure.to(tl.float64)
        left = tl.where(left > 0.0, left, 0.0)
        rest_there = tl.where(rest_there > 1, rest_there, 1)
        share = tl.where(sure < groups, left / rest_there.to(tl.float64), 0.0)
        any_sure = sure > 0
        sure_from = tl.load(sorted_ptr + sure - 1, mask=any_sure, other=0.0)

    count = tl.zeros((), tl.int32)
    for first in range(0, groups, BLOCK):
        g = first + tl.arange(0, BLOCK)
        ok = g < groups
        _, _, bad = _widths(low_ptr, high_ptr, g, groups)
        if TOPK:
            most = tl.maximum(groups // keep_one_in, 1)
            keep = ((tl.load(rank_ptr + g, mask=ok, other=0) < most) | bad) & ok
            factor = keep.to(tl.float32)
        else:
            width = tl.load(range_ptr + g, mask=ok, other=0.0)
            threshold = (width * share + 4503599627370496.0) - 4503599627370496.0  # rounded, ties to even
            threshold = tl.where(threshold < 1.0, 1.0, tl.where(threshold > one, one, threshold))
            threshold = tl.where(width > 0.0, threshold, 0.0)
            threshold = tl.where((any_sure & (width >= sure_from)) | bad, one, threshold)
            block = (g // 4).to(tl.uint32)
            none = tl.zeros_like(block)
            w0, w1, w2, w3 = tl.philox(tl.load(key_ptr), block, none, none + stream, none)
            word = g % 4
            draw = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3)) >> 8
            keep = (draw.to(tl.float64) < threshold) & ok
            factor = tl.where(keep, one / tl.where(keep, threshold, one), 0.0).to(tl.float32)
        scale = tl.load(calibrated_ptr + g, mask=ok, other=0.0)
        offset = tl.load(calibrated_ptr + 2 * groups + g, mask=ok, other=0.0)
        tl.store(scale_ptr + g, tl.where(keep, scale * factor, 0.0), mask=ok)
        tl.store(offset_ptr + g, tl.where(keep, offset * factor, 0.0), mask=ok)
        tl.store(factor_ptr + g, factor, mask=ok)
        kept = keep.to(tl.int32)
        tl.store(index_ptr + count + tl.cumsum(kept, axis=0) - 1, g, mask=keep)
        count += tl.sum(kept, axis=0)
    for first in range(0, groups, BLOCK):
        place = first + tl.arange(0, BLOCK)
        tl.store(index_ptr + place, tl.full((BLOCK,), -1, tl.int32), mask=(place >= count) & (place < groups))


def prune_groups(
    calibrated: Tensor, mode: str, keep_one_in: int, key: Tensor | None, stream: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale and offset of all groups, (G,) float32, 0 where pruned; the factor; and the index of the kept ones, (G,) int32.

    Args:
        calibrated: (5, G) float32, scale, inverse, offset, smallest and largest value.
    """
    groups, device = calibrated.shape[1], calibrated.device
    rank = torch.empty(groups, dtype=torch.int32, device=device)
    keys, in_order = torch.empty(2, groups, dtype=torch.float64, device=device)
    scale, offset, factor = torch.empty(3, groups, dtype=torch.float32, device=device)
    index = torch.empty(groups, dtype=torch.int32, device=device)
    topk = mode == "topk"
    assert topk or key is not None, "pruning at random needs a key"
    launch(
        _rank, (plan.ceil_div(groups, 64),), calibrated[3], calibrated[4], rank, keys, in_order, groups, TOPK=topk, BLOCK=64
    )  # fmt: skip
    launch(
        _keep, (1,), calibrated, rank, keys, in_order, calibrated if key is None else key, scale, offset, factor, index,
        groups, keep_one_in, stream, TOPK=topk, BLOCK=1024, warps=8,
    )  # fmt: skip
    return scale, offset, factor, index
