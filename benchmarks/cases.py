"""What kernels are measured on: random codes of any format, and formats such that no row of the table goes unmeasured."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fqt import ops, reference
from fqt.formats import Format, Shape3
from fqt.ops import Request
from fqt.qtensor import QTensor, codes_dtype

Product = tuple[str, str, str, float]
"""Operator, the formats of its operands, and the fraction of the left one's groups that is kept."""


def covering(products: Sequence[Product], device: str) -> list[Product]:
    """These products, and one more for each row of a device that serves none of them: of the first formats that it serves."""
    found = list(products)
    for row in ops.KERNELS:
        if row.operator not in ops.PRODUCTS or row.device != device:
            continue
        asked = ((Format.parse(left), Format.parse(right)) for operator, left, right, _ in found if operator == row.operator)
        if any(row.refuses(Request(device, formats)) is None for formats in asked):
            continue
        for formats, geometry in row.examples():
            if geometry is None and row.refuses(Request(device, formats)) is None:
                found.append((row.operator, formats[0].name, formats[1].name, 1.0))
                break
    return found


def coded(name: str, shape: Shape3, keep: float = 1.0, device: str = "cpu") -> QTensor:
    """Random codes of a format, a fraction `keep` of the groups kept."""
    format = Format.parse(name)
    groups = format.groups(shape)
    low, high = format.code_range
    if format.is_float:
        values = torch.randn(shape, device=device)
        codes = reference.quantize(values, format, calibrate="absmax")[0].codes
    elif high - low + 1 == 2**format.storage_bits or format.grid == "sign":  # every pattern of bits is a code
        whole = torch.iinfo(codes_dtype(format))
        codes = torch.randint(whole.min, whole.max + 1, format.packed_shape(shape), dtype=codes_dtype(format), device=device)
    else:
        limits, numbers = (int(low), int(high) + 1), (groups, math.prod(shape) // groups)
        rows = torch.randint(*limits, numbers, dtype=torch.int16 if format.bits < 16 else torch.int32, device=device)
        stored = rows if format.bits > 8 else rows % 2**format.storage_bits
        codes = reference.pack(stored.to(codes_dtype(format)), format, shape)
    scale, index = torch.rand(groups, device=device) + 0.1, None
    offset = torch.randn(groups, device=device) if format.offset else None
    if keep < 1:
        kept = torch.randperm(groups, device=device)[: max(1, int(groups * keep))].sort().values
        index = torch.full((groups,), -1, dtype=torch.int32, device=device)
        index[: kept.numel()] = kept.int()
        there = torch.zeros(groups, dtype=torch.bool, device=device).index_fill_(0, kept, True)
        scale, offset = scale * there, None if offset is None else offset * there
    return QTensor(codes, scale, offset, index, format, shape)
