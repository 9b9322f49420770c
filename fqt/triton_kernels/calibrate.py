"""The range of each group, and scale, inverse and offset from it, as `fqt.reference.calibrate_groups` computes them."""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fqt import reference
from fqt.formats import Format
from fqt.triton_kernels import plan
from fqt.triton_kernels.launch import launch

MIN_RANGE = tl.constexpr(reference.MIN_RANGE)
_LEVEL = 1024  # elements that a program adds to one


@triton.jit
def load_folded(
    x_ptr, fold_ptr, r, i, ok, row_split, split, r0, r1, l0, l1, f0, f1, f2, f3, FOLD: tl.constexpr
):  # fmt: skip
    """Elements `i` of rows `r`, in float32, multiplied by what is folded in; 0 where not `ok`."""
    n, p, j, k = r // row_split, r % row_split, i // split, i % split
    at = (n.to(tl.int64) * r0 + p.to(tl.int64) * r1)[:, None] + (j.to(tl.int64) * l0 + k.to(tl.int64) * l1)[None, :]
    x = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32)
    folded = x
    if FOLD:
        at = (n.to(tl.int64) * f0 + p.to(tl.int64) * f1)[:, None] + (j.to(tl.int64) * f2 + k.to(tl.int64) * f3)[None, :]
        folded = x * tl.load(fold_ptr + at, mask=ok, other=0.0)
    return x, folded


@triton.jit
def _range(
    x_ptr, fold_ptr, low_ptr, high_ptr, rows, length, group_rows, row_split, split, r0, r1, l0, l1, f0, f1, f2, f3,
    span, chunks, FOLD: tl.constexpr, EACH_ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Smallest and largest value of a chunk of a group, NaN if it holds one: (groups, chunks)."""
    chunk = tl.program_id(1)
    low = tl.full((ROWS, COLUMNS), float("inf"), tl.float32)
    high = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    bad = tl.zeros((ROWS, COLUMNS), tl.int32)
    if EACH_ROW:
        r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        for first in range(chunk * span, tl.minimum(chunk * span + span, length), COLUMNS):
            i = first + tl.arange(0, COLUMNS)
            ok = (r < rows)[:, None] & (i < length)[None, :]
            _, x = load_folded(x_ptr, fold_ptr, r, i, ok, row_split, split, r0, r1, l0, l1, f0, f1, f2, f3, FOLD)
            bad = bad | (ok & (x != x)).to(tl.int32)
            low = tl.minimum(low, tl.where(ok & (x == x), x, float("inf")))
            high = tl.maximum(high, tl.where(ok & (x == x), x, float("-inf")))
        spoilt = tl.max(bad, axis=1) > 0
        at = r * chunks + chunk
        tl.store(low_ptr + at, tl.where(spoilt, float("nan"), tl.min(low, axis=1)), mask=r < rows)
        tl.store(high_ptr + at, tl.where(spoilt, float("nan"), tl.max(high, axis=1)), mask=r < rows)
    else:
        group = tl.program_id(0)
        for row in range(chunk * span, tl.minimum(chunk * span + span, group_rows), ROWS):
            within = row + tl.arange(0, ROWS)
            for first in range(0, length, COLUMNS):
                i = first + tl.arange(0, COLUMNS)
                ok = (within < group_rows)[:, None] & (i < length)[None, :]
                r = group * group_rows + within
                _, x = load_folded(x_ptr, fold_ptr, r, i, ok, row_split, split, r0, r1, l0, l1, f0, f1, f2, f3, FOLD)
                bad = bad | (ok & (x != x)).to(tl.int32)
                low = tl.minimum(low, tl.where(ok & (x == x), x, float("inf")))
                high = tl.maximum(high, tl.where(ok & (x == x), x, float("-inf")))
        spoilt = tl.max(tl.max(bad, axis=1), axis=0) > 0
        at = group * chunks + chunk
        tl.store(low_ptr + at, tl.where(spoilt, float("nan"), tl.min(tl.min(low, axis=1), axis=0)))
        tl.store(high_ptr + at, tl.where(spoilt, float("nan"), tl.max(tl.max(high, axis=1), axis=0)))


@triton.jit
def _calibrate(
    low_ptr, high_ptr, mean_ptr, out_ptr, groups, chunks, steps, given_scale, given_inverse, given_offset,
    CALIBRATE: tl.constexpr, OFFSET: tl.constexpr, GROUPS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """`reference.calibrate_groups`. out (5, G): scale, inverse, offset, and the range itself."""
    g = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    low = tl.full((GROUPS,), float("inf"), tl.float32)
    high = tl.full((GROUPS,), float("-inf"), tl.float32)
    bad = tl.zeros((GROUPS,), tl.int32)
    for first in range(0, chunks, CHUNKS):
        c = first + tl.arange(0, CHUNKS)
        ok = (g < groups)[:, None] & (c < chunks)[None, :]
        at = g[:, None] * chunks + c[None, :]
        lows = tl.load(low_ptr + at, mask=ok, other=float("inf"))
        highs = tl.load(high_ptr + at, mask=ok, other=float("-inf"))
        nan = (lows != lows) | (highs != highs)
        bad = bad | tl.max(nan.to(tl.int32), axis=1)
        low = tl.minimum(low, tl.min(tl.where(nan, float("inf"), lows), axis=1))
        high = tl.maximum(high, tl.max(tl.where(nan, float("-inf"), highs), axis=1))
    low = tl.where(bad > 0, float("nan"), low)
    high = tl.where(bad > 0, float("nan"), high)
    if CALIBRATE == "absmean":
        span = tl.load(mean_ptr + g, mask=g < groups, other=0.0)
        offset = low
        steps = 1.0
    elif CALIBRATE == "none":
        offset = tl.zeros((GROUPS,), tl.float32) + given_offset
    elif CALIBRATE == "minmax":
        span = high - low
        offset = low
    else:
        span = tl.where(high > -low, high, -low)
        span = tl.where(bad > 0, float("nan"), span)
        offset = tl.where(span >= MIN_RANGE, -span, 0.0)
        if OFFSET:
            span = span * 2
    if CALIBRATE == "none":
        spoilt = bad > 0
        scale = tl.zeros((GROUPS,), tl.float32) + given_scale
        inverse = tl.zeros((GROUPS,), tl.float32) + given_inverse
    else:
        spoilt = ~(tl.abs(span) < float("inf"))
        wide = span >= MIN_RANGE
        steps = tl.zeros((GROUPS,), tl.float32) + steps
        divisor = tl.where(wide, span, 1.0)
        scale = tl.where(wide, tl.div_rn(divisor, steps), 0.0)
        inverse = tl.where(wide, tl.div_rn(steps, divisor), 0.0)
    ok = g < groups
    tl.store(out_ptr + g, tl.where(spoilt, float("nan"), scale), mask=ok)
    tl.store(out_ptr + groups + g, tl.where(spoilt, 0.0, inverse), mask=ok)
    tl.store(out_ptr + 2 * groups + g, tl.where(spoilt, 0.0, offset), mask=ok)
    tl.store(out_ptr + 3 * groups + g, low, mask=ok)
    tl.store(out_ptr + 4 * groups + g, high, mask=ok)


@triton.jit
def _tree(
    x_ptr, fold_ptr, sums_ptr, out_ptr, elements, blocks, length, group_rows, row_split, split, r0, r1, l0, l1, f0, f1, f2, f3,
    divisor, FIRST: tl.constexpr, LAST: tl.constexpr, FOLD: tl.constexpr, LEVEL: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """LEVEL values of a group to one, by pairs: (groups, blocks) float64; the LAST time divided, to the mean in float32."""
    group, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    start, e = block.to(tl.int64) * LEVEL, tl.arange(0, LEVEL)  # a group may have more than 2^31 elements
    ok = start + e < elements
    if FIRST:
        i = (start % length).to(tl.int32) + e
        r, i = group * group_rows + (start // length).to(tl.int32) + i // length, i % length
        n, p, j, k = r // row_split, r % row_split, i // split, i % split
        at = n.to(tl.int64) * r0 + p.to(tl.int64) * r1 + j.to(tl.int64) * l0 + k.to(tl.int64) * l1
        x = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32)
        if FOLD:
            at = n.to(tl.int64) * f0 + p.to(tl.int64) * f1 + j.to(tl.int64) * f2 + k.to(tl.int64) * f3
            x = x * tl.load(fold_ptr + at, mask=ok, other=0.0)
        total = tl.abs(x).to(tl.float64)
    else:
        total = tl.load(sums_ptr + group.to(tl.int64) * elements + start + e, mask=ok, other=0.0)
    for level in tl.static_range(LOG):
        total = tl.sum(tl.reshape(total, (LEVEL >> (level + 1), 2)), axis=1)
    total = tl.sum(total, axis=0)  # of one
    if LAST:
        # a number first: an argument that is 1 is a constant on a device, and no constant has a dtype
        tl.store(out_ptr + group, (total / (tl.full((), 0.0, tl.float64) + divisor)).to(tl.float32))
    else:
        tl.store(out_ptr + group.to(tl.int64) * blocks + block, total)


@functools.cache
def given(format: Format, limits: tuple[float, float]) -> tuple[float, float, float]:
    """Scale, inverse and offset of a range that is given, computed where the reference computes them."""
    zero = torch.zeros(1, dtype=torch.float32, device="cpu")  # nothing waits, whatever torch's defaults are
    scale, inverse, offset = reference.calibrate_groups(zero, zero, None, format, "none", limits)
    return scale.item(), inverse.item(), 0.0 if offset is None else offset.item()


def calibrate_groups(
    x: Tensor, folded: Tensor, where: tuple[int, ...], lie: plan.Stored, groups: int, format: Format, calibrate: str,
    limits: tuple[float, float], fold: bool, ranges: tuple[Tensor, Tensor] | None, prune: bool,
) -> Tensor:  # fmt: skip
    """(5, G) float32: scale, inverse, offset, smallest and largest value of each group."""
    chunks = 1
    if ranges is not None:
        low, high = (v.contiguous() for v in ranges)
    elif calibrate == "absmean" and not format.offset and not prune:  # the mean tells whether a group is finite
        low = high = None
        chunks = 0
    else:
        cut = plan.reduction(lie)
        chunks = cut.chunks
        low, high = torch.empty(2, groups, chunks, dtype=torch.float32, device=x.device)
        launch(
            _range, cut.grid(lie), x, folded, low, high, lie.rows, lie.length, lie.group_rows, *where, cut.span, chunks,
            FOLD=fold, EACH_ROW=cut.each_row, ROWS=cut.rows, COLUMNS=cut.columns,
        )  # fmt: skip
    mean = low
    if calibrate == "absmean":
        mean = _absmean(x, folded, where, lie, groups, fold)
    if low is None:
        low = high = mean
    out = torch.empty(5, groups, dtype=torch.float32, device=x.device)
    low_code, high_code = format.code_range
    steps = float(high_code if low_code < 0 else high_code - low_code)
    launch(
        _calibrate, (plan.ceil_div(groups, 16),), low, high, mean, out, groups, chunks, steps,
        *(given(format, limits) if calibrate == "none" else (0.0, 0.0, 0.0)),
        CALIBRATE=calibrate, OFFSET=format.offset, GROUPS=16, CHUNKS=64,
    )  # fmt: skip
    return out


def _absmean(x: Tensor, folded: Tensor, where: tuple[int, ...], lie: plan.Stored, groups: int, fold: bool) -> Tensor:
    """Mean |x| of each group, (G,) float32, over the tree of `reference.absmean`: whole subtrees of 1024 a program."""
    elements = whole = lie.group_rows * lie.length
    sums, first = x, True
    while True:
        blocks = plan.ceil_div(elements, _LEVEL)
        last = blocks == 1
        out = torch.empty(groups, blocks, dtype=torch.float32 if last else torch.float64, device=x.device)
        launch(
            _tree, (groups * blocks,), x, folded, sums, out, elements, blocks, lie.length, lie.group_rows, *where, whole,
            FIRST=first, LAST=last, FOLD=fold, LEVEL=_LEVEL, LOG=_LEVEL.bit_length() - 1,
        )  # fmt: skip
        if last:
            return out.view(groups)
        sums, elements, first = out, blocks, False
