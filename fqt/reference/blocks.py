"""Products whose scales vary along the summed axis in blocks: codes are added up within a block, floats between blocks.

The terms of a sum are taken in a fixed order: tap by tap, and within a tap by input channel (`output`), output channel
(`grad_input`), or sample and position (`grad_weight`). They are cut wherever one operand passes from one group to another, or
across the border of the image. The codes' products of each piece are accumulated exactly and scaled as `fqt.reference.products`
says; the pieces are then added in float32, in ascending order. Bias or mask come last.

A window is unfolded: (N, P, C) is gathered to what each position of the result meets under each tap.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fqt.geometry import Geometry
from fqt.qtensor import QTensor
from fqt.reference.packing import spread, unpack


def has_blocks(*operands: QTensor) -> bool:
    """Whether a product goes through this module."""
    return any(q.format.block for q in operands)


def output(x: QTensor, w: QTensor, geometry: Geometry | None) -> Tensor:
    """Y = X * W, (N, P', O) float32, without its bias."""
    met = _met(geometry, x.shape[1])
    groups = 1 if geometry is None else geometry.groups
    a, b = _Terms.of(x), _Terms.of(w)
    n, channels, taps = x.shape[0], x.shape[2] // groups, w.shape[1]
    parts = []
    for group in range(groups):
        mine, out = slice(group * channels, (group + 1) * channels), w.shape[0] // groups
        total = x.scale.new_zeros(n * met.shape[0], out)
        for tap in range(taps):
            left = a.gathered(met[:, tap]).map(lambda v, mine=mine: v[..., mine].flatten(0, 1))  # (N*P', C)
            right = b.map(lambda v, tap=tap, group=group, out=out: v[group * out : (group + 1) * out, tap])  # (O, I)
            total = _add(total, left, right)
        parts.append(total.view(n, met.shape[0], out))
    return torch.cat(parts, 2)


def grad_input(g: QTensor, w: QTensor, geometry: Geometry | None, positions: int) -> Tensor:
    """dX = G * W, (N, P, C) float32, without its mask."""
    met = _reached(_met(geometry, positions), positions)
    groups = 1 if geometry is None else geometry.groups
    a, b = _Terms.of(g), _Terms.of(w)
    n, channels, taps = g.shape[0], g.shape[2] // groups, w.shape[1]
    parts = []
    for group in range(groups):
        mine = slice(group * channels, (group + 1) * channels)
        total = g.scale.new_zeros(n * positions, w.shape[2])
        for tap in range(taps):
            left = a.gathered(met[:, tap]).map(lambda v, mine=mine: v[..., mine].flatten(0, 1))  # (N*P, O)
            right = b.map(lambda v, tap=tap, mine=mine: v[mine, tap].T)  # (I, O)
            total = _add(total, left, right)
        parts.append(total.view(n, positions, w.shape[2]))
    return torch.cat(parts, 2)


def grad_weight(g: QTensor, x: QTensor, geometry: Geometry | None) -> Tensor:
    """dW = G^T * X, (O, K, I) float32."""
    met = _met(geometry, x.shape[1])
    groups = 1 if geometry is None else geometry.groups
    a, b = _Terms.of(g), _Terms.of(x)
    out, channels = g.shape[2] // groups, x.shape[2] // groups
    grad = x.scale.new_zeros(g.shape[2], met.shape[1], channels)
    for group in range(groups):
        mine, rows = slice(group * channels, (group + 1) * channels), slice(group * out, (group + 1) * out)
        for tap in range(met.shape[1]):
            left = a.map(lambda v, rows=rows: v[..., rows].flatten(0, 1).T)  # (O, N*P')
            right = b.gathered(met[:, tap]).map(lambda v, mine=mine: v[..., mine].flatten(0, 1).T)  # (I, N*P')
            grad[rows, tap] = _add(grad[rows, tap], left, right)
    return grad


class _Terms:
    """An operand with each code's scale, offset and group beside it, all of one shape. Outside the image the group is -1."""

    def __init__(self, codes: Tensor, scale: Tensor, offset: Tensor | None, group: Tensor, inside: Tensor) -> None:
        self.codes, self.scale, self.offset, self.group, self.inside = codes, scale, offset, group, inside

    @staticmethod
    def of(q: QTensor) -> _Terms:
        codes = unpack(q.codes, q.format, q.shape).double()
        group = spread(torch.arange(q.scale.numel(), device=codes.device, dtype=torch.float64), q)
        offset = None if q.offset is None else spread(q.offset, q).expand(q.shape)
        return _Terms(codes, spread(q.scale, q).expand(q.shape), offset, group.expand(q.shape).long(), torch.ones_like(codes))

    def map(self, cut) -> _Terms:
        offset = None if self.offset is None else cut(self.offset)
        return _Terms(cut(self.codes), cut(self.scale), offset, cut(self.group), cut(self.inside))

    def gathered(self, places: Tensor) -> _Terms:
        """(N, P, C) as (N, P', C): what stands at these positions, 0 where there is none (-1)."""
        there = (places >= 0).view(1, -1, 1)
        found = self.map(lambda v: torch.where(there, v[:, places.clamp(min=0)], torch.zeros_like(v[:1, :1, :1])))
        found.group = torch.where(there, found.group, -1)
        return found


def _add(total: Tensor, a: _Terms, b: _Terms) -> Tensor:
    """total (M, R) plus the sum over the last axis of a (M, T) times b (R, T), piece by piece."""
    terms = a.codes.shape[1]
    if terms == 0:
        return total
    ends = torch.zeros(terms + 1, dtype=torch.bool, device=total.device)
    ends[-1] = True
    for side in (a, b):
        ends[1:-1] |= (side.group[:, 1:] != side.group[:, :-1]).any(0)
    first = 0
    for end in ends.nonzero()[:, 0].tolist():
        part = slice(first, end)
        inside = a.inside[:, part], b.inside[:, part]
        a_scale, b_scale = (_one(side.scale[:, part], within) for side, within in zip((a, b), inside, strict=True))
        a_scale, b_scale = a_scale[:, None], b_scale[None]
        t = (a.codes[:, part] @ b.codes[:, part].T).float() * a_scale * b_scale
        if b.offset is not None:
            b_offset = _one(b.offset[:, part], inside[1])[None]
            t = t + (a.codes[:, part] @ inside[1].T).float() * a_scale * b_offset
        if a.offset is not None:
            a_offset = _one(a.offset[:, part], inside[0])[:, None]
            t = t + (inside[0] @ b.codes[:, part].T).float() * b_scale * a_offset
            if b.offset is not None:
                t = t + (inside[0] @ inside[1].T).float() * a_offset * _one(b.offset[:, part], inside[1])[None]
        total = total + t
        first = end
    return total


def _one(values: Tensor, inside: Tensor) -> Tensor:
    """The one value of each row, among those inside the image; 0 for a row that has none."""
    return values.gather(1, inside.argmax(1, keepdim=True))[:, 0]


def _met(geometry: Geometry | None, positions: int) -> Tensor:
    """(P', K) int64: the position of the input that each one of the output meets under each tap, -1 outside the image."""
    if geometry is None:
        return torch.arange(positions).view(-1, 1)
    (top, _, left, _), (height, width) = geometry.padding, geometry.output_size
    rows = torch.arange(height).view(-1, 1) * geometry.stride[0] - top + torch.arange(geometry.kernel[0]) * geometry.dilation[0]
    columns = (
        torch.arange(width).view(-1, 1) * geometry.stride[1] - left + torch.arange(geometry.kernel[1]) * geometry.dilation[1]
    )
    y, x = rows.view(height, 1, -1, 1), columns.view(1, width, 1, -1)
    inside = (y >= 0) & (y < geometry.height) & (x >= 0) & (x < geometry.width)
    return torch.where(inside, y * geometry.width + x, -1).view(height * width, -1)


def _reached(met: Tensor, positions: int) -> Tensor:
    """(P, K) int64: the way back, which position of the output meets each one of the input under each tap, or -1."""
    back = torch.full((positions + 1, met.shape[1]), -1)
    for tap in range(met.shape[1]):
        back[met[:, tap], tap] = torch.arange(met.shape[0])  # -1 is the last row, which is cut off
    return back[:positions]
