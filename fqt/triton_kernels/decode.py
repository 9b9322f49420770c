"""decode: codes back to floats, in one read and one write."""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fqt import reference
from fqt.formats import GRIDS
from fqt.qtensor import QTensor
from fqt.triton_kernels import plan
from fqt.triton_kernels.codes import row_bytes
from fqt.triton_kernels.launch import launch


@triton.jit
def _number(stored, GRID: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """Stored bits, int32, as the number that they stand for, float32."""
    if GRID == "sign":
        number = (2 * stored - 1).to(tl.float32)
    elif GRID == "uint":
        number = stored.to(tl.float32)
    elif GRID == "e4m3" or GRID == "e5m2":
        exponent = (stored & 127) >> MANTISSA
        fraction = (stored & ((1 << MANTISSA) - 1)) + ((exponent > 0).to(tl.int32) << MANTISSA)
        step = ((tl.maximum(exponent, 1) - BIAS - MANTISSA + 127) << 23).to(tl.float32, bitcast=True)
        size = fraction.to(tl.float32) * step
        number = tl.where(stored > 127, -size, size)
    else:
        number = ((stored << (32 - BITS)) >> (32 - BITS)).to(tl.float32)
    return number


@triton.jit
def _decode(
    codes_ptr, scale_ptr, offset_ptr, y_ptr, rows, length, group_rows, row_bytes, row_split, split, r0, r1, l0, l1,
    GRID: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of stored rows, scaled, to where the strides of y put it."""
    columns = tl.cdiv(length, COLUMNS)
    r = tl.program_id(0) // columns * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) % columns * COLUMNS
    i = first + tl.arange(0, COLUMNS)
    inside = (r < rows)[:, None] & (i < length)[None, :]
    if BITS >= 8:
        stored = tl.load(codes_ptr + r.to(tl.int64)[:, None] * length + i[None, :], mask=inside, other=0).to(tl.int32)
        stored = stored & ((1 << BITS) - 1)
    else:
        lanes: tl.constexpr = 8 // BITS
        at = first // lanes + tl.arange(0, COLUMNS // lanes)
        ok = (r < rows)[:, None] & (at < row_bytes)[None, :]
        byte = tl.load(codes_ptr + r.to(tl.int64)[:, None] * row_bytes + at[None, :], mask=ok, other=0).to(tl.int32)
        lane = (byte[:, :, None] >> (tl.arange(0, lanes) * BITS)[None, None, :]) & ((1 << BITS) - 1)
        stored = tl.reshape(lane, (ROWS, COLUMNS))
    y = _number(stored, GRID, BITS, MANTISSA, BIAS)
    y = y * tl.load(scale_ptr + r // group_rows, mask=r < rows, other=0.0)[:, None]
    if OFFSET:
        y = y + tl.load(offset_ptr + r // group_rows, mask=r < rows, other=0.0)[:, None]
    to_row = (r // row_split).to(tl.int64) * r0 + (r % row_split).to(tl.int64) * r1
    to_column = (i // split).to(tl.int64) * l0 + (i % split).to(tl.int64) * l1
    tl.store(y_ptr + to_row[:, None] + to_column[None, :], y, mask=inside)


def decode(q: QTensor) -> Tensor:
    """As `fqt.reference.decode`."""
    if 0 in q.shape:  # nothing to launch
        return reference.decode(q)
    y = torch.empty(q.shape, dtype=torch.float32, device=q.codes.device)
    lie, grid = plan.stored(q.format, q.shape), GRIDS[q.format.grid]
    tile = plan.elementwise(lie)
    offset = q.scale if q.offset is None else q.offset
    mantissa, bias = (grid.mantissa, grid.bias) if grid.is_float else (0, 0)
    launch(
        _decode, (plan.ceil_div(lie.rows, tile.rows) * plan.ceil_div(lie.length, tile.columns),),
        q.codes.contiguous(), q.scale.contiguous(), offset.contiguous(), y, lie.rows, lie.length, lie.group_rows,
        row_bytes(q.format, lie), lie.row_split, lie.split, *lie.strides(*y.stride()),
        GRID=q.format.grid, BITS=q.format.storage_bits, OFFSET=q.offset is not None, MANTISSA=mantissa, BIAS=bias,
        ROWS=tile.rows, COLUMNS=tile.columns,
    )  # fmt: skip
    return y
