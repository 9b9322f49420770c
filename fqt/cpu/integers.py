"""The products of integers of at most 8 bits, and of at most 16 in two's complement, behind the signatures of the reference."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fqt.cpu.library import empty, operators
from fqt.cpu.signs import column
from fqt.formats import Shape3
from fqt.geometry import Geometry
from fqt.qtensor import QTensor
from fqt.reference import spread

_FEWEST_ZERO_ROWS = 4
FEW = 16
"""Rows of a result up to which a product takes no longer than to look for `busy_rows`."""
SMALL = 1 << 15
"""Bytes of a weight's codes below which `busy_rows` does not look."""


def output(x: QTensor, w: QTensor, bias: Tensor | None, geometry: Geometry | None) -> Tensor:
    """As `fqt.reference.output`, of any integers of at most 8 bits, or 16 in two's complement."""
    n, positions, channels = x.shape
    height, width = geometry.output_size if geometry else (positions, 1)
    busy = busy_rows(w, geometry) if n * height * width > FEW else None
    if busy is not None and x.offset is None:
        part = output(x, _rows(w, busy), None if bias is None else bias[busy], geometry)
        zero = 0.0 * spread(x.scale, x) * spread(w.scale, w).permute(1, 2, 0)  # NaN where the reference's is
        y = (zero if bias is None else zero + bias.float()).expand(n, height * width, w.shape[0])
        return y.contiguous().index_copy_(2, busy, part)
    y = empty(n, height * width, w.shape[0])
    sizes = [n, channels, w.shape[0], *(geometry or column(positions)).flat()]
    bias = None if bias is None else bias.float().contiguous()
    operators().integer_gather(*_coded(x), *_by_row(x), *_coded(w), *_by_row(w), bias, None, None, sizes, True, y)
    return y


def grad_input(g: QTensor, w: QTensor, mask: Tensor | None, geometry: Geometry | None, x_shape: Shape3) -> Tensor:
    """As `fqt.reference.grad_input`, of the integers of `output`."""
    n, positions, channels = x_shape
    busy = busy_rows(w, geometry) if g.format.storage_bits >= 8 and "C" not in g.format.axes else None
    if busy is not None:
        short = (g.shape[0], g.shape[1], busy.numel())
        g, w = replace(g, codes=g.codes[..., busy], shape=short), _rows(w, busy)
    kept, grad = None, empty(*x_shape)
    if g.index is not None and g.format.axes == "N":
        kept = g.index[g.index >= 0]
        grad.zero_()
    sizes = [n, channels, w.shape[0], *(geometry or column(positions)).flat()]
    mask = None if mask is None else mask.contiguous()
    operators().integer_gather(*_coded(g), *_by_row(g), *_coded(w), *_by_row(w), None, mask, kept, sizes, False, grad)
    return grad


def grad_weight(g: QTensor, x: QTensor, geometry: Geometry | None) -> Tensor:
    """As `fqt.reference.grad_weight`, of the integers of `output`, of at most 30 bits in both operands together."""
    n, positions, out = g.shape
    geometry = geometry or column(positions)
    grad = empty(out, geometry.kernel[0] * geometry.kernel[1], x.shape[2] // geometry.groups)
    samples, channels = None, torch.arange(out, dtype=torch.int32)
    if g.index is not None and g.format.axes == "N":
        samples = g.index[g.index >= 0]
    elif g.index is not None and g.format.axes == "C" and geometry.groups == 1:
        channels = g.index[g.index >= 0]
        grad.zero_()
    scale, offset = (None if v is None else spread(v, g)[:, 0] for v in (g.scale, g.offset))
    operators().integer_grad_weight(
        *_coded(g), g.format.axes, scale, offset, samples, channels, *_coded(x), x.scale, x.offset,
        [n, x.shape[2], out, *geometry.flat()], grad,
    )  # fmt: skip
    return grad


def busy_rows(w: QTensor, geometry: Geometry | None) -> Tensor | None:
    """The output channels whose weights are not all zero, (O',) int64, where `output` and `grad_input` leave the others out.

    None where they do not: the weight is so small that to look costs more; fewer than one channel in `_FEWEST_ZERO_ROWS` is
    zero, since leaving out costs a copy of the result; or all are; or codes that are zero do not mean the value 0; or channels
    come in groups.
    """
    if w.format.grid not in ("int", "fixed", "ternary") or (geometry is not None and geometry.groups > 1):
        return None
    if w.codes.numel() < SMALL:
        return None
    busy = w.codes.flatten(1).view(torch.uint8).any(1).nonzero()[:, 0]  # of bytes: torch has a fast loop for them
    zero = w.shape[0] - busy.numel()
    return busy if busy.numel() and zero * _FEWEST_ZERO_ROWS >= w.shape[0] else None


def _rows(w: QTensor, rows: Tensor) -> QTensor:
    scale = w.scale[rows] if w.format.axes == "O" else w.scale
    return replace(w, codes=w.codes[rows], scale=scale, shape=(rows.numel(), *w.shape[1:]))


def _coded(q: QTensor) -> tuple[Tensor, str, int]:
    return q.codes.contiguous(), q.format.grid, q.format.bits


def _by_row(q: QTensor) -> tuple[Tensor | None, ...]:
    """Scale and offset by the first two axes, either of which may be 1."""
    lead = q.format.grouping.lead
    sizes = (q.shape[0] if lead > 0 else 1, q.shape[1] if lead > 1 else 1)
    return tuple(None if v is None else v.view(sizes) for v in (q.scale, q.offset))
