"""Codes in memory, and back: packing, unpacking, decoding, and the estimator's mask of bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fqt.formats import GRIDS, Format, Grid, Shape3
from fqt.qtensor import QTensor, codes_dtype

_FLOAT8_DTYPE = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def stored(codes_GE: Tensor, format: Format, scale: Tensor) -> Tensor:
    """Codes as the integers that are stored: bit 1 = +1 for sign, else two's complement in `storage_bits` bits."""
    bad = scale.isnan().unsqueeze(1)
    if bool(bad.any()):
        codes_GE = codes_GE.masked_fill(bad, 0.0)
    if format.grid == "sign":
        return (codes_GE > 0).to(torch.uint8)
    if format.is_float:
        return _float_bits(codes_GE, GRIDS[format.grid])
    bits = format.storage_bits
    if bits > 8:
        return codes_GE.to(torch.int64).to(codes_dtype(format))
    if format.grid == "uint":
        return codes_GE.to(torch.uint8)
    return (codes_GE.to(torch.int32) & (2**bits - 1)).to(torch.uint8)


def pack(stored_GE: Tensor, format: Format, shape: Shape3) -> Tensor:
    """(G, E) stored integers to `format.packed_shape(shape)`, the first code in the lowest bits of its byte."""
    bits, grouping = format.storage_bits, format.grouping
    packed_shape = format.packed_shape(shape)
    if grouping.block:  # a last, shorter block was filled up
        stored_GE = stored_GE.reshape(-1, grouping.blocks(shape) * grouping.block)[:, : grouping.together(shape)]
    last = grouping.rows(shape)[2]
    codes = stored_GE.reshape(*packed_shape[:2], last)
    if bits >= 8:
        return codes.contiguous()
    lanes = 8 // bits
    lane = F.pad(codes, (0, -last % lanes)).reshape(*packed_shape, lanes)
    packed = lane[..., 0].clone(memory_format=torch.contiguous_format)
    for i in range(1, lanes):
        packed |= lane[..., i] << (i * bits)
    return packed


def unpack(codes: Tensor, format: Format, shape: Shape3) -> Tensor:
    """Packed codes to (N, P, C) float32 (float64 above 24 bits), a view of what is stored channel-major."""
    if format.storage_bits > 8:
        codes = codes.int() & 0xFFFF if format.grid == "uint" else codes  # 16-bit codes fill int16's sign bit
        values = codes.to(torch.float64 if format.bits > 24 else torch.float32)
    else:
        values = F.embedding(codes.int(), _byte_table(format, codes.device)).flatten(-2)
    grouping = format.grouping
    return _unstored(values[..., : grouping.rows(shape)[2]].reshape(grouping.stored(shape)), format)


def _unstored(values: Tensor, format: Format) -> Tensor:
    """A tensor with the axes in stored order, seen in its own."""
    a, b, c = format.grouping.order
    return values if format.grouping.in_order else values.permute([(a, b, c).index(axis) for axis in range(3)])


def _byte_table(format: Format, device: torch.device) -> Tensor:
    """(256, codes a byte) float32: the codes that each byte holds."""
    bits = format.storage_bits
    byte = torch.arange(256, device=device)
    if format.grid in _FLOAT8_DTYPE:
        return byte.to(torch.uint8).view(_FLOAT8_DTYPE[format.grid]).float().unsqueeze(1)
    lane = (byte.unsqueeze(1) >> torch.arange(0, 8, bits, device=device)) & (2**bits - 1)
    if format.grid == "sign":
        return (2 * lane - 1).float()
    if format.is_float:
        return _float_values(lane, GRIDS[format.grid])
    negative = (lane >= 2 ** (bits - 1)) & (format.grid != "uint")
    return torch.where(negative, lane - 2**bits, lane).float()


def _float_bits(codes: Tensor, grid: Grid) -> Tensor:
    """Values of a grid of small floats as sign, exponent and mantissa, uint8."""
    if grid.name in _FLOAT8_DTYPE:
        return codes.to(_FLOAT8_DTYPE[grid.name]).view(torch.uint8)
    size = codes.abs()
    least = 1 - grid.bias
    exponent = torch.where(size > 0, torch.frexp(size).exponent - 1, least).clamp(min=least)
    fraction = torch.ldexp(size, grid.mantissa - exponent).int()  # in steps; from 2^mantissa on it is a normal number
    bits = ((exponent + grid.bias - 1) << grid.mantissa) + fraction
    return (bits | (codes.signbit().int() << (grid.exponent + grid.mantissa))).to(torch.uint8)


def _float_values(bits: Tensor, grid: Grid) -> Tensor:
    """The inverse of `_float_bits`, float32."""
    exponent = (bits >> grid.mantissa) & (2**grid.exponent - 1)
    fraction = (bits & (2**grid.mantissa - 1)) + ((exponent > 0).int() << grid.mantissa)
    size = torch.ldexp(fraction.float(), exponent.clamp(min=1) - grid.bias - grid.mantissa)
    return torch.where(bits >> (grid.exponent + grid.mantissa) > 0, -size, size)


def decode(q: QTensor) -> Tensor:
    """Values, (N, P, C) float32 contiguous: `scale * code + offset`, in that order."""
    values = unpack(q.codes, q.format, q.shape) * spread(q.scale, q)
    if q.offset is not None:
        values = values + spread(q.offset, q)
    return values.float().contiguous()


def spread(scale_G: Tensor, q: QTensor) -> Tensor:
    """A value for each group as a tensor that broadcasts against (N, P, C)."""
    grouping = q.format.grouping
    stored = grouping.stored(q.shape)
    if grouping.block:
        scale_G = scale_G.view(-1, grouping.blocks(q.shape)).repeat_interleave(grouping.block, 1)
        return _unstored(scale_G[:, : grouping.together(q.shape)].reshape(stored), q.format)
    return _unstored(scale_G.view([size if i < grouping.lead else 1 for i, size in enumerate(stored)]), q.format)


def pass_mask(x_NPC: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Where the clipped straight-through estimator passes the gradient, low <= x <= high: (N, P, ceil(C/8)) uint8 bits.

    low, high: numbers, or tensors that broadcast to x.
    """
    bit = Format("sign", 1)
    x_NPC = x_NPC.float()  # else the limits would be rounded to a narrower dtype
    inside = ((x_NPC >= low) & (x_NPC <= high)).to(torch.uint8)
    return pack(inside, bit, (inside.shape[0], inside.shape[1], inside.shape[2]))


def apply_mask(g_NPC: Tensor, mask: Tensor) -> Tensor:
    """`g_NPC` where the mask of `pass_mask` is set, 0 elsewhere."""
    shape = (g_NPC.shape[0], g_NPC.shape[1], g_NPC.shape[2])
    return torch.where(unpack(mask, Format("sign", 1), shape) > 0, g_NPC, 0.0)
