"""QTensor: packed codes with their scales; Scales: what encodes them. Plain containers, not torch.Tensor subclasses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fqt.formats import Format, Shape3


@dataclass(frozen=True)
class QTensor:
    """A quantized tensor: `value = scale * code + offset`, group by group.

    Attributes:
        codes: packed, of shape `format.packed_shape(shape)`; uint8 up to 8 bits, else int16 or int32.
        scale: (G,) float32, one a group. A group whose values are not all representable (NaN, or an infinite range) has
            scale NaN, so it decodes to NaN; a pruned group has scale 0.
        offset: (G,) float32, or None when the format has none.
        index: (G,) int32 or None: after pruning the numbers of the kept groups in ascending order, then -1.
        format: what the codes mean.
        shape: logical (N, P, C) or (O, K, I).
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    index: Tensor | None
    format: Format
    shape: Shape3

    def parts(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Codes, scale, offset and index; `QTensor(*parts, format, shape)` is the inverse."""
        return self.codes, self.scale, self.offset, self.index

    def tensors(self) -> list[Tensor]:
        """As `parts`, with an empty tensor for each that is absent: what crosses an operator's schema."""
        empty = self.scale.new_empty(0)
        return [
            self.codes,
            self.scale,
            empty if self.offset is None else self.offset,
            empty.int() if self.index is None else self.index,
        ]

    @staticmethod
    def from_tensors(tensors: Sequence[Tensor], format: Format, shape: Shape3) -> QTensor:
        """The inverse of `tensors`."""
        codes, scale, offset, index = tensors
        pruned = index.numel() > 0
        return QTensor(codes, scale, offset if format.offset else None, index if pruned else None, format, shape)

    @property
    def nbytes(self) -> int:
        """Bytes that this tensor occupies, codes, scales, offsets and index together."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def decode(self) -> Tensor:
        """The values, (N, P, C) or (O, K, I) float32, contiguous."""
        return torch.ops.fqt.decode(self.tensors(), self.format.name, self.shape)


@dataclass(frozen=True)
class Scales:
    """How the values of each group become codes, `code = rounded((value - offset) * inverse)`, and what codes then stand for.

    Attributes:
        scale: (G,) float32; NaN for a group that cannot be encoded, whose stored bits are then 0. A group that holds a NaN has
            scale NaN: what `encode` makes of a NaN at a finite scale is not specified.
        inverse: (G,) float32, the reciprocal of scale, by one division; 0 where a group is constant or cannot be encoded.
        offset: (G,) float32, or None when the format has none.
        factor: (G,) float32 or None: what pruning multiplies a group's values by, 0 where it leaves the group out.
        index: (G,) int32 or None: with a factor, the numbers of the kept groups in ascending order, then -1.
    """

    scale: Tensor
    inverse: Tensor
    offset: Tensor | None = None
    factor: Tensor | None = None
    index: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """[scale, inverse, offset, factor, index], an empty tensor for each that is absent: what crosses a schema."""
        offset, factor = (self.scale.new_empty(0) if v is None else v for v in (self.offset, self.factor))
        index = self.scale.new_empty(0, dtype=torch.int32) if self.index is None else self.index
        return [self.scale, self.inverse, offset, factor, index]

    @staticmethod
    def from_tensors(tensors: Sequence[Tensor], format: Format) -> Scales:
        """The inverse of `tensors`."""
        scale, inverse, offset, factor, index = tensors
        pruned = factor.numel() > 0
        return Scales(scale, inverse, offset if format.offset else None, *((factor, index) if pruned else (None, None)))

    def of(self, codes: Tensor, format: Format, shape: Shape3) -> QTensor:
        """The codes that were made with these, as a quantized tensor of logical `shape`."""
        scale, offset = self.scale, self.offset
        if self.factor is not None:
            scale, offset = (None if v is None else torch.where(self.factor > 0, v * self.factor, 0.0) for v in (scale, offset))
            assert scale is not None
        return QTensor(codes, scale, offset, self.index, format, shape)


def codes_dtype(format: Format) -> torch.dtype:
    """In which codes are stored: uint8 up to 8 bits, else int16 or int32."""
    return {16: torch.int16, 32: torch.int32}.get(format.storage_bits, torch.uint8)


def check(q: QTensor) -> None:
    """Raise AssertionError unless `q` keeps the invariants that its docstring states."""
    f, groups = q.format, q.format.groups(q.shape)
    assert q.codes.dtype == codes_dtype(f) and tuple(q.codes.shape) == f.packed_shape(q.shape), (q.codes.dtype, q.codes.shape)
    assert q.scale.dtype == torch.float32 and q.scale.shape == (groups,), (q.scale.dtype, q.scale.shape)
    assert (q.offset is not None) == f.offset
    if q.offset is not None:
        assert q.offset.dtype == torch.float32 and q.offset.shape == (groups,)
    if q.index is not None:
        kept = q.index[q.index >= 0]
        assert q.index.dtype == torch.int32 and q.index.shape == (groups,)
        assert bool((q.index[kept.numel() :] == -1).all()) and bool((kept.diff() > 0).all())
        pruned = torch.ones(groups, dtype=torch.bool, device=q.scale.device)
        pruned[kept.long()] = False
        assert not bool(q.scale[pruned].any()), "a pruned group must have scale 0"
