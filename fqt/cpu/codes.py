"""Quantizing and decoding on a CPU, behind the signatures of the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from fqt.cpu import library
from fqt.cpu.library import empty, operators
from fqt.formats import Format
from fqt.qtensor import QTensor, codes_dtype

_BIT = Format("sign", 1)


def refuses_codes(formats: tuple[Format, ...]) -> str | None:
    """Why `quantize` or `decode` cannot serve a request, or None."""
    if (reason := library.refuses()) is not None:
        return reason
    (format,) = formats
    if format.is_float:
        return "codes of 8-bit floats are not vectorized"
    return None


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
    """As `fqt.reference.quantize`."""
    shape = (x_NPC.shape[0], x_NPC.shape[1], x_NPC.shape[2])
    groups = format.groups(shape)
    codes = torch.empty(format.packed_shape(shape), dtype=codes_dtype(format))
    scale = torch.empty(groups, dtype=torch.float32)
    offset = torch.empty(groups, dtype=torch.float32) if format.offset else None
    index = torch.empty(groups, dtype=torch.int32) if prune else None
    mask = None if pass_range is None else torch.empty(_BIT.packed_shape(shape), dtype=torch.uint8)
    low, high = (v.contiguous() for v in ranges) if ranges else (None, None)
    operators().quantize(
        x_NPC if x_NPC.dtype in (torch.float32, torch.bfloat16) else x_NPC.float(),
        None if fold is None else fold.float().expand(shape),
        key, low, high, format.grid, format.bits, format.axes, calibrate, *limits, stochastic, prune, keep_one_in, stream,
        *(pass_range or (0.0, 0.0)), codes, scale, offset, index, mask,
    )  # fmt: skip
    return QTensor(codes, scale, offset, index, format, shape), mask


def decode(q: QTensor) -> Tensor:
    """As `fqt.reference.decode`."""
    values = empty(*q.shape)
    offset = None if q.offset is None else q.offset.contiguous()
    operators().decode(q.codes.contiguous(), q.format.grid, q.format.bits, q.format.axes, q.scale.contiguous(), offset, values)
    return values
