"""quantize: range, calibration, pruning, rounding and packing, in at most two reads of the tensor.

    _range -> _calibrate -> [rank and keep, of prune.py] -> _encode            the range is measured
    _encode -> _settle                                                          it is given: one read

All of them see the tensor in stored order, as rows of which some on end make a group (`plan.Stored`). With a given range
only a NaN can spoil a group, which is seen after others of its codes are written: `_encode` flags it, `_settle` clears it.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fqt import reference
from fqt.formats import Format
from fqt.qtensor import QTensor, Scales, codes_dtype
from fqt.triton_kernels import plan
from fqt.triton_kernels.calibrate import calibrate_groups, given, load_folded
from fqt.triton_kernels.codes import packed, row_bytes
from fqt.triton_kernels.launch import launch
from fqt.triton_kernels.prune import prune_groups

_BIT = Format("sign", 1)
_FLOAT8_BITS = {"e4m3": (3, 7), "e5m2": (2, 15)}  # mantissa bits, exponent bias


@triton.jit
def _words(block, group, stream, key):
    """The four words of Philox blocks, as integers of 24 bits in float32."""
    zero = tl.zeros_like(block)
    w0, w1, w2, w3 = tl.philox(key, block, zero + group, zero + stream, zero)
    return (
        (w0 >> 8).to(tl.float32), (w1 >> 8).to(tl.float32), (w2 >> 8).to(tl.float32), (w3 >> 8).to(tl.float32)
    )  # fmt: skip


@triton.jit
def _draws(
    r, first, length, group_rows, stream, key, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """24 random bits for each element of a tile. ALIGNED: rows begin with a Philox block, so that one serves four elements."""
    group = (r // group_rows).to(tl.uint32)
    row = (r % group_rows).to(tl.int64) * length
    if ALIGNED:
        quad = tl.arange(0, COLUMNS // 4)
        block = ((row // 4)[:, None] + (first // 4 + quad)[None, :]).to(tl.uint32)
        w0, w1, w2, w3 = _words(block, group[:, None], stream, key)
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, COLUMNS))
    else:
        e = row[:, None] + (first + tl.arange(0, COLUMNS))[None, :]
        w0, w1, w2, w3 = _words((e // 4).to(tl.uint32), group[:, None], stream, key)
        word = e % 4
        words = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    return words


@triton.jit
def _rounded(y, draws, STOCHASTIC: tl.constexpr):
    """y, |y| < 2^22, to an integer in float32: to nearest, ties to even, or by the draws."""
    if STOCHASTIC:
        below = tl.floor(y)
        rounded = below + (draws < (y - below) * 16777216.0).to(tl.float32)
    else:
        rounded = (y + 12582912.0) - 12582912.0
    return rounded


@triton.jit
def _float8(y, draws, STOCHASTIC: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """y, within the grid's range, as the bits of an 8-bit float."""
    exponent = ((y.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    step_exponent = tl.maximum(exponent, 1 - BIAS) - MANTISSA
    step = ((step_exponent + 127) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 - step_exponent) << 23).to(tl.float32, bitcast=True)
    codes = _rounded(y * inverse, draws, STOCHASTIC)
    if STOCHASTIC:
        negative = codes < 0
    else:  # a zero keeps the sign of what was rounded to it
        negative = y.to(tl.int32, bitcast=True) < 0
    size = tl.abs(codes) * step
    bits = size.to(tl.int32, bitcast=True)
    normal = (bits >> (23 - MANTISSA)) - ((127 - BIAS) << MANTISSA)
    subnormal = tl.abs(codes).to(tl.int32)
    stored = tl.where(bits >= ((128 - BIAS) << 23), normal, subnormal)
    return stored | tl.where(negative, 128, 0)


@triton.jit
def _encode(
    x_ptr, fold_ptr, calibrated_ptr, factor_ptr, flag_ptr, key_ptr, codes_ptr, mask_ptr,
    groups, rows, length, group_rows, row_bytes, mask_bytes, row_split, split, r0, r1, l0, l1, f0, f1, f2, f3,
    inverse, offset, low_code, high_code, stream, pass_low, pass_high,
    GRID: tl.constexpr, BITS: tl.constexpr, FIXED: tl.constexpr, OFFSET: tl.constexpr, STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr, PRUNED: tl.constexpr, FOLD: tl.constexpr, MASK: tl.constexpr,
    MANTISSA: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Codes of a tile, packed, and the estimator's mask. FIXED: the range is given, and NaNs are flagged for `_settle`."""
    columns = tl.cdiv(length, COLUMNS)
    r = tl.program_id(0) // columns * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) % columns * COLUMNS
    i = first + tl.arange(0, COLUMNS)
    inside = (r < rows)[:, None] & (i < length)[None, :]
    group = r // group_rows
    wanted = inside
    if PRUNED:
        factor = tl.load(factor_ptr + group, mask=r < rows, other=0.0)
        wanted = inside & (factor != 0.0)[:, None]
    read = inside if MASK else wanted  # what is pruned is not read, but for the mask
    x, folded = load_folded(x_ptr, fold_ptr, r, i, read, row_split, split, r0, r1, l0, l1, f0, f1, f2, f3, FOLD)
    if FIXED:
        spoilt = (tl.max((inside & (folded != folded)).to(tl.int32), axis=1) > 0) & (r < rows)
        tl.atomic_max(flag_ptr + group, spoilt.to(tl.int32), mask=spoilt, sem="relaxed")
        good = inside & (folded == folded)
    else:
        scale = tl.load(calibrated_ptr + group, mask=r < rows, other=0.0)
        good = wanted & (scale == scale)[:, None]
        inverse = tl.load(calibrated_ptr + groups + group, mask=r < rows, other=0.0)[:, None]
        offset = tl.load(calibrated_ptr + 2 * groups + group, mask=r < rows, other=0.0)[:, None]

    if GRID == "sign":
        stored = (folded >= 0).to(tl.int32)
    else:
        y = folded - offset if OFFSET else folded
        y = y * inverse
        y = tl.minimum(tl.maximum(tl.where(good, y, 0.0), low_code), high_code)
        draws = y
        if STOCHASTIC:
            draws = _draws(r, first, length, group_rows, stream, tl.load(key_ptr), ALIGNED, ROWS, COLUMNS)
        if GRID == "e4m3" or GRID == "e5m2":
            stored = _float8(y, draws, STOCHASTIC, MANTISSA, BIAS)
        else:
            stored = _rounded(y, draws, STOCHASTIC).to(tl.int32)
    stored = tl.where(good, stored, 0)
    if BITS == 16:
        at = r.to(tl.int64)[:, None] * length + i[None, :]
        tl.store(codes_ptr + at, stored.to(tl.int16), mask=inside)
    elif BITS == 8:
        at = r.to(tl.int64)[:, None] * length + i[None, :]
        tl.store(codes_ptr + at, (stored & 255).to(tl.uint8), mask=inside)
    else:
        lanes: tl.constexpr = 8 // BITS
        byte = first // lanes + tl.arange(0, COLUMNS // lanes)
        at = r.to(tl.int64)[:, None] * row_bytes + byte[None, :]
        ok = (r < rows)[:, None] & (byte < row_bytes)[None, :]
        tl.store(codes_ptr + at, packed(stored & ((1 << BITS) - 1), BITS, ROWS, COLUMNS), mask=ok)
    if MASK:
        passes = (inside & (x >= pass_low) & (x <= pass_high)).to(tl.int32)
        byte = first // 8 + tl.arange(0, COLUMNS // 8)
        at = r.to(tl.int64)[:, None] * mask_bytes + byte[None, :]
        ok = (r < rows)[:, None] & (byte < mask_bytes)[None, :]
        tl.store(mask_ptr + at, packed(passes, 1, ROWS, COLUMNS), mask=ok)


@triton.jit
def _settle(
    flag_ptr, bytes_ptr, scale_ptr, offset_ptr, rows, group_rows, row_bytes, scale, offset,
    OFFSET: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Scales of groups whose range was given; a group in which a NaN was seen has scale NaN and stored bits 0."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = r // group_rows
    spoilt = tl.load(flag_ptr + group, mask=r < rows, other=0) > 0
    begins = (r < rows) & (r % group_rows == 0)
    tl.store(scale_ptr + group, tl.where(spoilt, float("nan"), scale), mask=begins)
    if OFFSET:
        tl.store(offset_ptr + group, tl.where(spoilt, 0.0, offset), mask=begins)
    if tl.max(spoilt.to(tl.int32), axis=0) > 0:
        zeros = tl.zeros((ROWS, COLUMNS), tl.uint8)
        for first in range(0, row_bytes, COLUMNS):
            byte = first + tl.arange(0, COLUMNS)
            at = r.to(tl.int64)[:, None] * row_bytes + byte[None, :]
            tl.store(bytes_ptr + at, zeros, mask=spoilt[:, None] & (byte < row_bytes)[None, :])


def quantize(
    x_NPC: Tensor,
    format: Format,
    *,
    calibrate: str,
    limits: tuple[float, float] = (-1.0, 1.0),
    stochastic: bool = False,
    prune: str = "",
    keep_one_in: int = 1,
    fold: Tensor | None = None,
    key: Tensor | None = None,
    stream: int = 0,
    pass_range: tuple[float, float] | None = None,
    ranges: tuple[Tensor, Tensor] | None = None,
) -> tuple[QTensor, Tensor | None]:
    """As `fqt.reference.quantize`. ValueError for a mode of pruning that only the reference draws."""
    reference.check_kernel_mode(prune)
    shape = (x_NPC.shape[0], x_NPC.shape[1], x_NPC.shape[2])
    device, lie, groups = x_NPC.device, plan.stored(format, shape), format.groups(shape)
    mask = None if pass_range is None else x_NPC.new_empty(_BIT.packed_shape(shape), dtype=torch.uint8)
    if x_NPC.numel() == 0 or (mask is not None and (not format.grouping.in_order)):
        # nothing to launch; or a mask that is packed along another axis than the codes
        mask = None if pass_range is None else reference.pass_mask(x_NPC, *pass_range)
    if x_NPC.numel() == 0:
        measured = torch.zeros(2, groups, dtype=torch.float32, device=device).unbind() if ranges is None else ranges
        options = {"stochastic": stochastic, "prune": prune, "keep_one_in": keep_one_in, "key": key, "stream": stream}
        return reference.quantize(x_NPC, format, calibrate=calibrate, limits=limits, ranges=measured, **options)[0], mask

    x, folded, where = _values(x_NPC, fold, lie)
    fixed = calibrate == "none" and not prune
    codes = torch.empty(format.packed_shape(shape), dtype=codes_dtype(format), device=device)
    factor = index = None
    if fixed:
        range_given = given(format, limits)
        calibrated = torch.zeros(groups, dtype=torch.int32, device=device)  # flags of groups that are spoilt
        scales, offsets = torch.empty(2, groups, dtype=torch.float32, device=device)
    else:
        asked = (format, calibrate, limits, fold is not None, ranges, bool(prune))
        calibrated, range_given = calibrate_groups(x, folded, where, lie, groups, *asked), None
        scales, offsets = calibrated[0], calibrated[2]
    if prune:
        scales, offsets, factor, index = prune_groups(calibrated, prune, keep_one_in, key, stream + 1)
    inside = mask if mask is not None and format.grouping.in_order else None
    _launch_encode(
        x, folded, where, fold is not None, calibrated, range_given, factor, key if stochastic else None, stream, format, lie,
        groups, codes, inside, pass_range or (0.0, 0.0),
    )  # fmt: skip
    if range_given is not None:
        scale, _, offset = range_given
        launch(
            _settle, (plan.ceil_div(lie.rows, 128),), calibrated, codes.view(torch.uint8), scales, offsets,
            lie.rows, lie.group_rows, row_bytes(format, lie), scale, offset,
            OFFSET=format.offset, ROWS=128, COLUMNS=16,
        )  # fmt: skip
    return QTensor(codes, scales, offsets if format.offset else None, index, format, shape), mask


def calibrate(
    x_NPC: Tensor,
    format: Format,
    *,
    calibrate: str,
    limits: tuple[float, float] = (-1.0, 1.0),
    prune: str = "",
    keep_one_in: int = 1,
    fold: Tensor | None = None,
    key: Tensor | None = None,
    stream: int = 0,
    ranges: tuple[Tensor, Tensor] | None = None,
) -> Scales:
    """As `fqt.reference.calibrate`. ValueError as `quantize`."""
    reference.check_kernel_mode(prune)
    shape = (x_NPC.shape[0], x_NPC.shape[1], x_NPC.shape[2])
    lie, groups = plan.stored(format, shape), format.groups(shape)
    if x_NPC.numel() == 0:
        options = {"prune": prune, "keep_one_in": keep_one_in, "key": key, "stream": stream}
        return reference.calibrate(x_NPC, format, calibrate=calibrate, limits=limits, ranges=ranges, **options)
    x, folded, where = _values(x_NPC, fold, lie)
    calibrated = calibrate_groups(
        x, folded, where, lie, groups, format, calibrate, limits, fold is not None, ranges, bool(prune)
    )
    scale, inverse, offset = (v.clone() for v in calibrated[:3])  # outputs of an operator share no memory
    scales = Scales(scale, inverse, offset if format.offset else None)
    if not prune:
        return scales
    _, _, factor, index = prune_groups(calibrated, prune, keep_one_in, key, stream + 1)
    return replace(scales, factor=factor, index=index)


def encode(
    x_NPC: Tensor,
    scales: Scales,
    format: Format,
    *,
    fold: Tensor | None = None,
    key: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """As `fqt.reference.encode`."""
    shape = (x_NPC.shape[0], x_NPC.shape[1], x_NPC.shape[2])
    lie, groups = plan.stored(format, shape), format.groups(shape)
    codes = torch.empty(format.packed_shape(shape), dtype=codes_dtype(format), device=x_NPC.device)
    if x_NPC.numel() == 0:
        return codes
    x, folded, where = _values(x_NPC, fold, lie)
    offset = torch.zeros_like(scales.scale) if scales.offset is None else scales.offset
    calibrated = torch.stack([scales.scale, scales.inverse, offset])
    _launch_encode(
        x, folded, where, fold is not None, calibrated, None, scales.factor, key, stream, format, lie, groups, codes, None,
        (0.0, 0.0),
    )  # fmt: skip
    return codes


def _values(x_NPC: Tensor, fold: Tensor | None, lie: plan.Stored) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """What the kernels read, the factor of each element (x itself where there is none), and how both lie in memory."""
    x = x_NPC if x_NPC.dtype in (torch.float32, torch.bfloat16, torch.float16) else x_NPC.float()
    folded = x if fold is None else fold.float().expand(x.shape)
    return x, folded, (lie.row_split, lie.split, *lie.strides(*x.stride()), *lie.strides(*folded.stride()))


def _launch_encode(
    x: Tensor, folded: Tensor, where: tuple[int, ...], fold: bool, calibrated: Tensor,
    range_given: tuple[float, float, float] | None, factor: Tensor | None, key: Tensor | None, stream: int, format: Format,
    lie: plan.Stored, groups: int, codes: Tensor, mask: Tensor | None, pass_range: tuple[float, float],
) -> None:  # fmt: skip
    """Write codes, and the estimator's mask if there is one.

    Args:
        calibrated: (3 or 5, G) float32, scale, inverse and offset first; with `range_given` (scale, inverse, offset of all
            groups) the flags of groups in which a NaN is seen.
    """
    tile = plan.elementwise(lie)
    low_code, high_code = format.code_range
    mantissa, bias = _FLOAT8_BITS.get(format.grid, (0, 0))
    _, inverse, offset = range_given or (0.0, 0.0, 0.0)
    launch(
        _encode, (plan.ceil_div(lie.rows, tile.rows) * plan.ceil_div(lie.length, tile.columns),),
        x, folded, calibrated, calibrated if factor is None else factor, calibrated, calibrated if key is None else key,
        codes, codes if mask is None else mask,
        groups, lie.rows, lie.length, lie.group_rows, row_bytes(format, lie), plan.ceil_div(lie.length, 8), *where,
        inverse, offset, float(low_code), float(high_code), stream, *map(float, pass_range),
        GRID=format.grid, BITS=format.storage_bits, FIXED=range_given is not None, OFFSET=format.offset,
        STOCHASTIC=key is not None, ALIGNED=lie.length % 4 == 0 or lie.group_rows == 1, PRUNED=factor is not None, FOLD=fold,
        MASK=mask is not None, MANTISSA=mantissa, BIAS=bias, ROWS=tile.rows, COLUMNS=tile.columns,
    )  # fmt: skip
