"""Quantizing and decoding on a CPU, behind the signatures of the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from fqt.cpu.library import empty, operators
from fqt.formats import Format
from fqt.qtensor import QTensor, Scales, codes_dtype
from fqt.reference import check_kernel_mode

_BIT = Format("sign", 1)


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
    check_kernel_mode(prune)
    shape = (x_NPC.shape[0], x_NPC.shape[1], x_NPC.shape[2])
    groups = format.groups(shape)
    codes = torch.empty(format.packed_shape(shape), dtype=codes_dtype(format))
    scale = torch.empty(groups, dtype=torch.float32)
    offset = torch.empty(groups, dtype=torch.float32) if format.offset else None
    index = torch.empty(groups, dtype=torch.int32) if prune else None
    mask = None if pass_range is None else torch.empty(_BIT.packed_shape(shape), dtype=torch.uint8)
    low, high = (v.contiguous() for v in ranges) if ranges else (None, None)
    operators().quantize(
        *_values(x_NPC, fold),
        key, low, high, format.grid, format.bits, format.axes, calibrate, *limits, stochastic, prune, keep_one_in, stream,
        *(pass_range or (0.0, 0.0)), codes, scale, offset, index, mask,
    )  # fmt: skip
    return QTensor(codes, scale, offset, index, format, shape), mask


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
    check_kernel_mode(prune)
    groups = format.groups((x_NPC.shape[0], x_NPC.shape[1], x_NPC.shape[2]))
    scale, inverse = (torch.empty(groups, dtype=torch.float32) for _ in range(2))  # outputs of an operator share no memory
    offset = torch.empty(groups, dtype=torch.float32) if format.offset else None
    factor = torch.empty(groups, dtype=torch.float32) if prune else None
    index = torch.empty(groups, dtype=torch.int32) if prune else None
    low, high = (v.contiguous() for v in ranges) if ranges else (None, None)
    operators().calibrate(
        *_values(x_NPC, fold), key, low, high, format.grid, format.bits, format.axes, calibrate, *limits, prune, keep_one_in,
        stream, scale, inverse, offset, factor, index,
    )  # fmt: skip
    return Scales(scale, inverse, offset, factor, index)


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
    codes = torch.empty(format.packed_shape((x_NPC.shape[0], x_NPC.shape[1], x_NPC.shape[2])), dtype=codes_dtype(format))
    given = (scales.scale, scales.inverse, scales.offset, scales.factor)
    operators().encode(
        *_values(x_NPC, fold), key, *(None if v is None else v.contiguous() for v in given), format.grid, format.bits,
        format.axes, stream, codes,
    )  # fmt: skip
    return codes


def _values(x_NPC: Tensor, fold: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What the kernels read: float32 or bfloat16, and a factor of each element."""
    x_NPC = x_NPC if x_NPC.dtype in (torch.float32, torch.bfloat16) else x_NPC.float()
    return x_NPC, None if fold is None else fold.float().expand(x_NPC.shape)


def decode(q: QTensor) -> Tensor:
    """As `fqt.reference.decode`."""
    values = empty(*q.shape)
    offset = None if q.offset is None else q.offset.contiguous()
    operators().decode(q.codes.contiguous(), q.format.grid, q.format.bits, q.format.axes, q.scale.contiguous(), offset, values)
    return values
