"""PackedWeight: a weight whose codes were made once, which is what a frozen layer has in place of its float weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fqt.formats import Format, Shape3
from fqt.qtensor import QTensor
from fqt.reference.packing import pack, spread, stored, unpack


class PackedWeight(nn.Module):
    """Codes, scales and offsets as buffers, so that copies, `.to()` and state dicts treat them as any module's.

    Scales and offsets are float32 for good: `.to(torch.bfloat16)` and the like move them, and round the rest of a model.

    Attributes:
        format: what the codes mean.
        shape: of the weight as `fqt.functional` takes it, (O, I) or (O, I / groups, kh, kw).
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None

    def __init__(self, q: QTensor, shape: Sequence[int]) -> None:
        super().__init__()
        self.format, self.shape = q.format, tuple(shape)
        for name in ("codes", "scale", "offset"):
            self.register_buffer(name, getattr(q, name))

    def dim(self) -> int:
        """Of the weight, as a tensor's."""
        return len(self.shape)

    def qtensor(self) -> QTensor:
        """The codes as an operand, logical (O, K, I)."""
        return QTensor(self.codes, self.scale, self.offset, None, self.format, logical_shape(self.shape))

    def extra_repr(self) -> str:
        return f"{self.format.name}, shape={self.shape}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        def moved(tensor: Tensor) -> Tensor:  # as integers floats are moved and not rounded
            return fn(tensor.view(torch.int32)).view(torch.float32) if tensor.is_floating_point() else fn(tensor)

        return super()._apply(moved, recurse)


Weight = Tensor | PackedWeight
"""What `fqt.functional` multiplies by."""


def logical_shape(shape: Sequence[int]) -> Shape3:
    """(O, K, I) of a weight (O, I) or (O, I / groups, kh, kw)."""
    return (shape[0], math.prod(shape[2:]), shape[1])


def canonical(weight: Weight) -> Any:
    """(O, I) or (O, I / groups, kh, kw) as (O, K, I), a differentiable view; of a packed weight its `QTensor`."""
    if isinstance(weight, PackedWeight):
        return weight.qtensor()
    return weight.unsqueeze(1) if weight.dim() == 2 else weight.flatten(2).transpose(1, 2)


def joined(parts: Sequence[QTensor], places: Sequence[Tensor], whole: Tensor) -> QTensor:
    """One quantized tensor of several whose formats agree, with a scale for each output channel and tap.

    Args:
        places: of each part, in its own shape (O', K', I), where its elements lie in the flat weight; int64.
        whole: the same of all, (O, K, I). The elements of an output channel and tap come of one part.
    """
    format: Format = replace(parts[0].format, axes="OK")
    codes, scale, offset = (parts[0].scale.new_zeros(whole.numel(), dtype=torch.float64) for _ in range(3))
    for q, place in zip(parts, places, strict=True):
        codes[place] = unpack(q.codes, q.format, q.shape).double()
        scale[place] = spread(q.scale, q).expand(q.shape).double()
        if q.offset is not None:
            offset[place] = spread(q.offset, q).expand(q.shape).double()
    o, k, i = whole.shape
    rows, bits = whole.reshape(o * k, i), replace(format, block=0)
    first = rows[:, :: format.block or i].reshape(-1)
    scales = scale[rows].float()
    packed = torch.where(scales.isnan(), 0, stored(codes[rows], bits, scale.new_zeros(o * k)))
    return QTensor(
        pack(packed, bits, (o, k, i)),
        scale[first].float(),
        offset[first].float() if format.offset else None,
        None,
        format,
        (o, k, i),
    )
