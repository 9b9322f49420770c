"""Codes in registers and in memory: what every kernel family shares on the device.

A byte holds 8 / bits codes, the first in its lowest bits. In registers a code is a signed byte (an 8-bit float: itself).
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fqt.formats import Format
from fqt.qtensor import QTensor
from fqt.triton_kernels import plan
from fqt.triton_kernels.launch import launch

FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@triton.jit
def decoded(stored, GRID: tl.constexpr, BITS: tl.constexpr):
    """Stored bits, int32 in [0, 2^bits), as signed bytes. 8 unsigned bits are centred: less 128."""
    if GRID == "sign":
        codes = 2 * stored - 1
    elif GRID == "uint":
        codes = stored - 128 if BITS == 8 else stored
    else:
        codes = (stored << (32 - BITS)) >> (32 - BITS)
    return codes.to(tl.int8)


@triton.jit
def load_codes(
    base, row_offset, row_ok, first, length, GRID: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Codes first .. first + COLUMNS of rows that begin at byte `row_offset`, (ROWS, COLUMNS); 0 from `length` on.

    BITS: those in memory; 8 stands for bytes that are codes already, or 8-bit floats. `first` begins a byte.
    """
    if BITS == 8:
        at = first + tl.arange(0, COLUMNS)
        ok = row_ok[:, None] & (at < length)[None, :]
        codes = tl.load(base + row_offset[:, None] + at[None, :], mask=ok, other=0.0)
    else:
        lanes: tl.constexpr = 8 // BITS
        width: tl.constexpr = COLUMNS // lanes
        at = first // lanes + tl.arange(0, width)
        ok = row_ok[:, None] & (at * lanes < length)[None, :]
        byte = tl.load(base + row_offset[:, None] + at[None, :], mask=ok, other=0).to(tl.int32)
        lane = (byte[:, :, None] >> (tl.arange(0, lanes) * BITS)[None, None, :]) & ((1 << BITS) - 1)
        codes = decoded(tl.reshape(lane, (ROWS, COLUMNS)), GRID, BITS)
        inside = row_ok[:, None] & (first + tl.arange(0, COLUMNS) < length)[None, :]
        codes = tl.where(inside, codes, 0)
    return codes


@triton.jit
def packed(stored, BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) int32 stored bits as bytes, (ROWS, COLUMNS * BITS / 8)."""
    lanes: tl.constexpr = 8 // BITS
    lane = tl.reshape(stored, (ROWS, COLUMNS // lanes, lanes)) << (tl.arange(0, lanes) * BITS)[None, None, :]
    return tl.sum(lane, axis=2).to(tl.uint8)


@triton.jit
def dequantized(
    total, a_sum, b_sum, terms, a_scale, b_scale, a_offset, b_offset,
    A_OFFSET: tl.constexpr, B_OFFSET: tl.constexpr, A_CENTRE: tl.constexpr, B_CENTRE: tl.constexpr,
):  # fmt: skip
    """The float part of a product, in the order that `fqt.reference` states, from sums of centred codes.

    sum(a b) = sum((a - A)(b - B)) + B sum(a) + A sum(b) - A B terms, with the centres A and B, in integers.
    """
    if B_CENTRE:
        total += a_sum.to(total.dtype) * B_CENTRE
    if A_CENTRE:
        total += b_sum.to(total.dtype) * A_CENTRE
    if A_CENTRE and B_CENTRE:
        total -= terms.to(total.dtype) * (A_CENTRE * B_CENTRE)
    t = total.to(tl.float32) * a_scale
    t = t * b_scale
    if B_OFFSET:
        t = t + (a_sum.to(tl.float32) * a_scale) * b_offset
    if A_OFFSET:
        t = t + (b_sum.to(tl.float32) * b_scale) * a_offset
    if A_OFFSET and B_OFFSET:
        t = t + (terms.to(tl.float32) * a_offset) * b_offset
    return t


@triton.jit
def _expand(
    codes_ptr, out_ptr, rows, length, row_bytes, row_split, split, r0, r1, l0, l1,
    GRID: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Packed rows to one signed byte a code, wherever the strides put them."""
    columns = tl.cdiv(length, COLUMNS)
    r = tl.program_id(0) // columns * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) % columns * COLUMNS
    lanes: tl.constexpr = 8 // BITS
    at = first // lanes + tl.arange(0, COLUMNS // lanes)
    ok = (r < rows)[:, None] & (at < row_bytes)[None, :]
    byte = tl.load(codes_ptr + r.to(tl.int64)[:, None] * row_bytes + at[None, :], mask=ok, other=0).to(tl.int32)
    lane = (byte[:, :, None] >> (tl.arange(0, lanes) * BITS)[None, None, :]) & ((1 << BITS) - 1)
    codes = decoded(tl.reshape(lane, (ROWS, COLUMNS)), GRID, BITS)
    i = first + tl.arange(0, COLUMNS)
    to_row = (r // row_split).to(tl.int64) * r0 + (r % row_split).to(tl.int64) * r1
    to_column = (i // split).to(tl.int64) * l0 + (i % split).to(tl.int64) * l1
    inside = (r < rows)[:, None] & (i < length)[None, :]
    tl.store(out_ptr + to_row[:, None] + to_column[None, :], codes, mask=inside)


def expanded(q: QTensor, axes: tuple[int, int, int] = (0, 1, 2)) -> Tensor:
    """The codes as bytes, less `plan.centre`, contiguous (N, P, C) permuted by `axes`; 8-bit floats as their own dtype."""
    if q.format.storage_bits == 8 and not plan.centre(q.format):  # they are bytes already
        n, p, c = q.shape
        codes = q.codes.view(FLOAT8.get(q.format.grid, torch.int8))
        canonical = codes.view(n, p, c) if q.format.grouping.in_order else codes.view(c, n, p).permute(1, 2, 0)
        return canonical.permute(axes).contiguous()
    out = torch.empty([q.shape[axis] for axis in axes], dtype=torch.int8, device=q.codes.device)
    strides = [0, 0, 0]
    for axis, stride in zip(axes, out.stride(), strict=True):
        strides[axis] = stride
    lie, bits = plan.stored(q.format, q.shape), q.format.storage_bits
    tile = plan.elementwise(lie)
    grid = (plan.ceil_div(lie.rows, tile.rows) * plan.ceil_div(lie.length, tile.columns),)
    launch(
        _expand, grid, q.codes, out, lie.rows, lie.length, row_bytes(q.format, lie), lie.row_split, lie.split,
        *lie.strides(*strides), GRID=q.format.grid, BITS=bits, ROWS=tile.rows, COLUMNS=tile.columns,
    )  # fmt: skip
    return out


def row_bytes(format: Format, lie: plan.Stored) -> int:
    """Bytes of a stored row."""
    return plan.ceil_div(lie.length * format.storage_bits, 8)
