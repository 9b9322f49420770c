"""Codes in memory, and back: packing, unpacking, decoding, and the estimator's mask of bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fqt.formats import FLOAT8_MAX, Format, Shape3
from fqt.qtensor import QTensor, codes_dtype

_FLOAT8_DTYPE = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def stored(codes_GE: Tensor, format: Format, scale: Tensor) -> Tensor:
    """Codes as the integers that are stored: bit 1 = +1 for sign, else two's complement in `storage_bits` bits."""
    bad = scale.isnan().unsqueeze(1)
    if bool(bad.any()):
        codes_GE = codes_GE.masked_fill(bad, 0.0)
    if format.grid == "sign":
        return (codes_GE > 0).to(torch.uint8)
    if format.grid in FLOAT8_MAX:
        return codes_GE.to(_FLOAT8_DTYPE[format.grid]).view(torch.uint8)
    bits = format.storage_bits
    if bits > 8:
        return codes_GE.to(torch.int64).to(codes_dtype(format))
    if format.grid == "uint":
        return codes_GE.to(torch.uint8)
    return (codes_GE.to(torch.int32) & (2**bits - 1)).to(torch.uint8)


def pack(stored_GE: Tensor, format: Format, shape: Shape3) -> Tensor:
    """(G, E) stored integers to `format.packed_shape(shape)`, the first code in the lowest bits of its byte."""
    bits = format.storage_bits
    packed_shape = format.packed_shape(shape)
    last = shape[0] * shape[1] if format.axes == "C" else format.rows(shape)[2]
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
    a, b, c = format.rows(shape)
    values = values[..., : b * c if format.axes == "C" else c].reshape(a, b, c)
    return values.permute(1, 2, 0) if format.channel_major else values


def _byte_table(format: Format, device: torch.device) -> Tensor:
    """(256, codes a byte) float32: the codes that each byte holds."""
    bits = format.storage_bits
    byte = torch.arange(256, device=device)
    if format.grid in FLOAT8_MAX:
        return byte.to(torch.uint8).view(_FLOAT8_DTYPE[format.grid]).float().unsqueeze(1)
    lane = (byte.unsqueeze(1) >> torch.arange(0, 8, bits, device=device)) & (2**bits - 1)
    if format.grid == "sign":
        return (2 * lane - 1).float()
    negative = (lane >= 2 ** (bits - 1)) & (format.grid != "uint")
    return torch.where(negative, lane - 2**bits, lane).float()


def decode(q: QTensor) -> Tensor:
    """Values, (N, P, C) float32 contiguous: `scale * code + offset`, in that order."""
    values = unpack(q.codes, q.format, q.shape) * spread(q.scale, q)
    if q.offset is not None:
        values = values + spread(q.offset, q)
    return values.float().contiguous()


def spread(scale_G: Tensor, q: QTensor) -> Tensor:
    """A value for each group as a tensor that broadcasts against (N, P, C)."""
    n, p, c = q.shape
    if q.format.axes == "NC":
        return scale_G.view(c, n).T.unsqueeze(1)
    shapes = {"": (1, 1, 1), "N": (n, 1, 1), "O": (n, 1, 1), "NP": (n, p, 1), "C": (1, 1, c)}
    return scale_G.view(shapes[q.format.axes])


def pass_mask(x_NPC: Tensor, low: float, high: float) -> Tensor:
    """Where the clipped straight-through estimator passes the gradient, low <= x <= high: (N, P, ceil(C/8)) uint8 bits."""
    bit = Format("sign", 1)
    x_NPC = x_NPC.float()  # else the limits would be rounded to a narrower dtype
    inside = ((x_NPC >= low) & (x_NPC <= high)).to(torch.uint8)
    return pack(inside, bit, (inside.shape[0], inside.shape[1], inside.shape[2]))


def apply_mask(g_NPC: Tensor, mask: Tensor) -> Tensor:
    """`g_NPC` where the mask of `pass_mask` is set, 0 elsewhere."""
    shape = (g_NPC.shape[0], g_NPC.shape[1], g_NPC.shape[2])
    return torch.where(unpack(mask, Format("sign", 1), shape) > 0, g_NPC, 0.0)
