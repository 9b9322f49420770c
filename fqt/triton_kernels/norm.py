"""Batch normalization of int16 accumulators or floats, as `fqt.reference.norm` specifies it, in few passes.

Sums are float64 in the stated order: a program adds the rows of a block one after the other, then one adds the blocks.
Signs and masks leave packed; neither z nor the accumulators' float values are written.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fqt.reference.norm import BLOCK_ROWS, Source, Windows
from fqt.triton_kernels import plan
from fqt.triton_kernels.codes import packed
from fqt.triton_kernels.launch import launch

_UNROLLED = 8


@triton.jit
def _value(y_ptr, scale_ptr, offset_ptr, row, c, ok, channels, CODES: tl.constexpr, OFFSET: tl.constexpr):
    """y of rows and channels, in float32; 0 where not `ok`."""
    y = tl.load(y_ptr + row[:, None] * channels + c[None, :], mask=ok, other=0).to(tl.float32)
    if CODES:
        y = y * tl.load(scale_ptr + c, mask=c < channels, other=0.0)[None, :]
        if OFFSET:
            y = y + tl.load(offset_ptr + c, mask=c < channels, other=0.0)[None, :]
        y = tl.where(ok, y, 0.0)
    return y


@triton.jit
def _largest(
    y_ptr, scale_ptr, offset_ptr, affine_ptr, pooled, c, ok, channels, height, width, kh, kw,
    CODES: tl.constexpr, OFFSET: tl.constexpr, POOLS: tl.constexpr,
):  # fmt: skip
    """z of the first largest pixel of windows (counted through all images), its y, and its number; NaN is largest."""
    a = tl.load(affine_ptr + c, mask=c < channels, other=0.0)[None, :]
    b = tl.load(affine_ptr + channels + c, mask=c < channels, other=0.0)[None, :]
    first = pooled
    if POOLS:  # else a window is a pixel, and no division by a size that is known late is needed to find it
        across = tl.cdiv(width, kw)
        down = tl.cdiv(height, kh)
        image = pooled // (across * down)
        h = pooled % (across * down) // across * kh
        w = pooled % across * kw
        first = (image * height + h) * width + w
    best_y = _value(y_ptr, scale_ptr, offset_ptr, first, c, ok, channels, CODES, OFFSET)
    best = best_y * a + b
    number = tl.zeros_like(best).to(tl.int32)
    if POOLS:
        for k in range(1, kh * kw):
            inside = ok & ((h + k // kw < height) & (w + k % kw < width))[:, None]
            row = first + k // kw * width + k % kw
            y = _value(y_ptr, scale_ptr, offset_ptr, row, c, inside, channels, CODES, OFFSET)
            z = y * a + b
            better = inside & ((z > best) | (z != z))
            best = tl.where(better, z, best)
            best_y = tl.where(better, y, best_y)
            number = tl.where(better, k, number)
    return best, best_y, number


@triton.jit
def _block_sums(
    g_ptr, kept_ptr, y_ptr, scale_ptr, offset_ptr, affine_ptr, out_ptr, rows, channels, pooled_positions,
    height, width, kh, kw, CODES: tl.constexpr, OFFSET: tl.constexpr, GRADIENT: tl.constexpr, KEPT: tl.constexpr,
    POOLS: tl.constexpr, BLOCK: tl.constexpr, UNROLLED: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Over a block of rows, in order: y and its squares, or the gradient and its product with x. (blocks, 2, C) float64."""
    c = tl.program_id(1) * C + tl.arange(0, C)
    c_ok = (c < channels)[None, :]
    one = tl.zeros((1, C), tl.float64)
    two = tl.zeros((1, C), tl.float64)
    begin = tl.program_id(0).to(tl.int64) * BLOCK + tl.zeros((1,), tl.int64)
    for first in range(0, BLOCK, UNROLLED):
        for step in tl.static_range(UNROLLED):
            row = begin + first + step
            ok = (row < rows)[:, None] & c_ok
            if GRADIENT:
                _, y, _ = _largest(
                    y_ptr, scale_ptr, offset_ptr, affine_ptr, row, c, ok, channels, height, width, kh, kw, CODES, OFFSET, POOLS
                )  # fmt: skip
                x = y - tl.load(affine_ptr + 2 * channels + c, mask=c < channels, other=0.0)[None, :]
                x = x * tl.load(affine_ptr + 3 * channels + c, mask=c < channels, other=0.0)[None, :]
                if KEPT:
                    kept = tl.load(kept_ptr + row // pooled_positions, mask=row < rows, other=0) != 0
                    x = tl.where(kept[:, None], x, 0.0)
                g = tl.load(g_ptr + row[:, None] * channels + c[None, :], mask=ok, other=0.0).to(tl.float64)
                one += g
                two += tl.where(ok, g * x.to(tl.float64), 0.0)
            else:
                y = _value(y_ptr, scale_ptr, offset_ptr, row, c, ok, channels, CODES, OFFSET).to(tl.float64)
                one += y
                two += y * y
    at = tl.program_id(0).to(tl.int64) * 2 * channels + c[None, :]
    tl.store(out_ptr + at, one, mask=c_ok)
    tl.store(out_ptr + at + channels, two, mask=c_ok)


@triton.jit
def _add_blocks(blocks_ptr, out_ptr, blocks, size, UNROLLED: tl.constexpr, SIZE: tl.constexpr):
    """(blocks, size) float64 added in order."""
    e = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), tl.float64)
    for first in range(0, blocks, UNROLLED):
        for step in tl.static_range(UNROLLED):
            block = tl.zeros((), tl.int64) + first + step
            total += tl.load(blocks_ptr + block * size + e, mask=(e < size) & (block < blocks), other=0.0)
    tl.store(out_ptr + e, total, mask=e < size)


@triton.jit
def _normalized(
    y_ptr, scale_ptr, offset_ptr, affine_ptr, z_ptr, codes_ptr, mask_ptr, flag_ptr, rows, channels, row_bytes,
    height, width, kh, kw, low, high, CODES: tl.constexpr, OFFSET: tl.constexpr, POOLS: tl.constexpr,
    SIGN: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """z, or its signs and mask in bits; a NaN is flagged."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * C + tl.arange(0, C)
    ok = (row < rows)[:, None] & (c < channels)[None, :]
    z, _, _ = _largest(
        y_ptr, scale_ptr, offset_ptr, affine_ptr, row, c, ok, channels, height, width, kh, kw, CODES, OFFSET, POOLS
    )
    if SIGN:
        byte = tl.program_id(1) * (C // 8) + tl.arange(0, C // 8)
        at = row[:, None] * row_bytes + byte[None, :]
        byte_ok = (row < rows)[:, None] & (byte < row_bytes)[None, :]
        tl.store(codes_ptr + at, packed((ok & (z >= 0)).to(tl.int32), 1, ROWS, C), mask=byte_ok)
        tl.store(mask_ptr + at, packed((ok & (z >= low) & (z <= high)).to(tl.int32), 1, ROWS, C), mask=byte_ok)
        bad = tl.max(tl.max((ok & (z != z)).to(tl.int32), axis=1), axis=0)
        tl.atomic_max(flag_ptr, bad, mask=bad > 0, sem="relaxed")
    else:
        tl.store(z_ptr + row[:, None] * channels + c[None, :], z, mask=ok)


@triton.jit
def _settle_signs(flag_ptr, codes_ptr, scale_ptr, size, SIZE: tl.constexpr):
    """The signs' scale; where a NaN was seen it is NaN, and their bits are 0."""
    spoilt = tl.load(flag_ptr) > 0
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, tl.where(spoilt, float("nan"), 1.0))
    if spoilt:
        at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
        tl.store(codes_ptr + at, tl.zeros((SIZE,), tl.uint8), mask=at < size)


@triton.jit
def _gradient(
    g_ptr, y_ptr, scale_ptr, offset_ptr, affine_ptr, means_ptr, dy_ptr, low_ptr, high_ptr, pooled_positions, channels, span,
    height, width, kh, kw, CODES: tl.constexpr, OFFSET: tl.constexpr, POOLS: tl.constexpr, ROWS: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """dy, and its range over a chunk of a sample's windows: (N, chunks, C)."""
    sample = tl.program_id(0).to(tl.int64)
    c = tl.program_id(2) * C + tl.arange(0, C)
    c_ok = c < channels
    a = tl.load(affine_ptr + c, mask=c_ok, other=0.0)[None, :]
    mean = tl.load(affine_ptr + 2 * channels + c, mask=c_ok, other=0.0)[None, :]
    inv = tl.load(affine_ptr + 3 * channels + c, mask=c_ok, other=0.0)[None, :]
    mean_g = tl.load(means_ptr + c, mask=c_ok, other=0.0)[None, :]
    mean_gx = tl.load(means_ptr + channels + c, mask=c_ok, other=0.0)[None, :]
    across = tl.cdiv(width, kw)
    low = tl.full((ROWS, C), float("inf"), tl.float32)
    high = tl.full((ROWS, C), float("-inf"), tl.float32)
    bad = tl.zeros((ROWS, C), tl.int32)
    begin = tl.program_id(1) * span
    for first in range(begin, tl.minimum(begin + span, pooled_positions), ROWS):
        p = first + tl.arange(0, ROWS)
        ok = (p < pooled_positions)[:, None] & c_ok[None, :]
        pooled = sample * pooled_positions + p
        _, _, number = _largest(
            y_ptr, scale_ptr, offset_ptr, affine_ptr, pooled, c, ok, channels, height, width, kh, kw, CODES, OFFSET, POOLS
        )  # fmt: skip
        g = tl.load(g_ptr + pooled[:, None] * channels + c[None, :], mask=ok, other=0.0)
        h = p
        w = p
        if POOLS:
            h = p // across * kh
            w = p % across * kw
        for k in range(kh * kw):
            inside = ok
            row = pooled
            if POOLS:
                inside = ok & ((h + k // kw < height) & (w + k % kw < width))[:, None]
                row = (sample * height + h + k // kw) * width + w + k % kw
            y = _value(y_ptr, scale_ptr, offset_ptr, row, c, inside, channels, CODES, OFFSET)
            x = (y - mean) * inv
            dz = tl.where(number == k, g, 0.0)
            dy = ((dz - mean_g) - x * mean_gx) * a
            tl.store(dy_ptr + row[:, None] * channels + c[None, :], dy, mask=inside)
            bad = bad | (inside & (dy != dy)).to(tl.int32)
            low = tl.minimum(low, tl.where(inside & (dy == dy), dy, float("inf")))
            high = tl.maximum(high, tl.where(inside & (dy == dy), dy, float("-inf")))
    spoilt = tl.max(bad, axis=0) > 0
    at = (sample * tl.num_programs(1) + tl.program_id(1)) * channels + c
    tl.store(low_ptr + at, tl.where(spoilt, float("nan"), tl.min(low, axis=0)), mask=c_ok)
    tl.store(high_ptr + at, tl.where(spoilt, float("nan"), tl.max(high, axis=0)), mask=c_ok)


def _source(source: Source) -> tuple[Tensor, Tensor, Tensor, dict[str, bool]]:
    """y, scale and offset (y's own memory in the place of what is absent), and which are there."""
    y = source.y.contiguous()
    scale = y if source.scale is None else source.scale.contiguous()
    offset = y if source.offset is None else source.offset.contiguous()
    return y, scale, offset, {"CODES": source.scale is not None, "OFFSET": source.offset is not None}


def _pools(windows: Windows) -> bool:
    return windows.kernel != (1, 1)


def _channels(channels: int) -> int:
    """Channels of a tile: a multiple of 8, so that bits end at a byte."""
    return min(max(plan.power_of_two(channels), 8), 128)


def _sums(
    g: Tensor | None, kept: Tensor | None, source: Source, affine: Tensor | None, windows: Windows, rows: int
) -> Tensor:  # fmt: skip
    y, scale, offset, there = _source(source)
    channels = y.shape[2]
    blocks, c = plan.ceil_div(rows, BLOCK_ROWS), _channels(channels)
    if rows * channels == 0:  # nothing to launch
        return torch.zeros(2, channels, dtype=torch.float64, device=y.device)
    partial = torch.empty(blocks, 2, channels, dtype=torch.float64, device=y.device)
    launch(
        _block_sums, (blocks, plan.ceil_div(channels, c)), y if g is None else g.contiguous(),
        y if kept is None else kept.to(torch.uint8), y, scale, offset, y if affine is None else affine.contiguous(), partial,
        rows, channels, rows // y.shape[0], *windows.flat(), GRADIENT=g is not None, KEPT=kept is not None,
        POOLS=_pools(windows), BLOCK=BLOCK_ROWS,
        UNROLLED=_UNROLLED if g is None else _UNROLLED // 4,  # a gradient's rows hold more registers
        C=c, **there,
    )  # fmt: skip
    sums = torch.empty(2, channels, dtype=torch.float64, device=y.device)
    grid = (plan.ceil_div(2 * channels, 32),)
    launch(_add_blocks, grid, partial, sums, blocks, 2 * channels, UNROLLED=_UNROLLED, SIZE=32, warps=1)
    return sums


def norm_sums(source: Source) -> Tensor:
    """As `fqt.reference.norm.norm_sums`."""
    return _sums(None, None, source, None, Windows(1, 1), source.y.shape[0] * source.y.shape[1])


def norm_grad_sums(g: Tensor, kept: Tensor | None, source: Source, affine: Tensor, windows: Windows) -> Tensor:
    """As `fqt.reference.norm.norm_grad_sums`."""
    return _sums(g.float(), kept, source, affine, windows, g.shape[0] * g.shape[1])


def norm_value(source: Source, affine: Tensor, windows: Windows) -> Tensor:
    """As `fqt.reference.norm.norm_value`."""
    return _apply(source, affine, windows, None)[0]


def norm_sign(source: Source, affine: Tensor, windows: Windows, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `fqt.reference.norm.norm_sign`."""
    codes, mask, scale = _apply(source, affine, windows, (low, high))
    return codes, mask, scale


def _apply(source: Source, affine: Tensor, windows: Windows, limits: tuple[float, float] | None) -> tuple[Tensor, ...]:
    y, scale, offset, there = _source(source)
    (n, _, channels), (height, width) = y.shape, windows.pooled_size
    rows, c, row_bytes = n * height * width, _channels(channels), plan.ceil_div(channels, 8)
    shape = (n, height * width)
    flag = torch.zeros(1, dtype=torch.int32, device=y.device)
    z = codes = mask = flag
    if limits is None:
        z = torch.empty(*shape, channels, dtype=torch.float32, device=y.device)
    else:
        codes, mask = torch.empty(2, *shape, row_bytes, dtype=torch.uint8, device=y.device)
    launch(
        _normalized, (plan.ceil_div(rows, 1024 // c), plan.ceil_div(channels, c)), y, scale, offset, affine.contiguous(), z,
        codes, mask, flag, rows, channels, row_bytes, *windows.flat(), *(limits or (0.0, 0.0)), POOLS=_pools(windows),
        SIGN=limits is not None, ROWS=1024 // c, C=c, **there,
    )  # fmt: skip
    if limits is None:
        return (z,)
    signs_scale = torch.empty(1, dtype=torch.float32, device=y.device)
    launch(_settle_signs, (max(plan.ceil_div(codes.numel(), 4096), 1),), flag, codes, signs_scale, codes.numel(), SIZE=4096)
    return codes, mask, signs_scale


def norm_grad(
    g: Tensor, kept: Tensor | None, source: Source, affine: Tensor, windows: Windows, means: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fqt.reference.norm.norm_grad`."""
    y, scale, offset, there = _source(source)
    (n, _, channels), positions, c = y.shape, g.shape[1], _channels(y.shape[2])
    rows = 512 // c
    span = plan.span(positions, rows, n * plan.ceil_div(channels, c))
    chunks = max(plan.ceil_div(positions, span), 1)
    dy = torch.empty_like(y, dtype=torch.float32)
    low, high = torch.empty(2, n, chunks, channels, dtype=torch.float32, device=y.device)
    launch(
        _gradient, (n, chunks, plan.ceil_div(channels, c)), g.float().contiguous(), y, scale, offset, affine.contiguous(),
        means.contiguous(), dy, low, high, positions, channels, span, *windows.flat(), POOLS=_pools(windows), ROWS=rows,
        C=c, **there,
    )  # fmt: skip
    return dy, low.amin(1), high.amax(1)
