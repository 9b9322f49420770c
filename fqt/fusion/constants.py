"""What does not change from one evaluation to the next: a BatchNorm's constants, and the accumulators at which signs change.

The sign of z = (code * scale + offset) * a + b, in the arithmetic of `fqt.reference.norm`, is an integer comparison: every step
rounds, and none changes the order of two codes. So a kernel compares the int16 accumulators with one integer a channel, found
once, by bisection of that very arithmetic: no rounded threshold, but where the sign does change.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fqt.cpu.library import operators
from fqt.formats import Format
from fqt.ops import Request, select
from fqt.qtensor import QTensor
from fqt.reference import pack
from fqt.reference.norm import Source, Windows, value

_BIT = Format("sign", 1)
_MOST = 32767
"""No accumulator is larger: a product whose sums might be is not accumulated in 16 bits."""


@dataclass(frozen=True)
class Thresholds:
    """Of channels: the sign is +1 where (code > above) differs from `flipped`.

    Attributes:
        scale, offset: of the codes that these are for; the offset may be None.
        above: (C,) int16.
        flipped: (C / 8,) uint8, packed as signs are. Both None where a value is not finite: then floats have to decide.
    """

    scale: Tensor
    offset: Tensor | None
    above: Tensor | None
    flipped: Tensor | None

    def are_for(self, source: Source) -> bool:
        """Whether they are those of this source's scale and offset."""
        assert source.scale is not None
        return _equal(self.scale, source.scale) and _equal(self.offset, source.offset)

    @staticmethod
    def of(source: Source, affine: Tensor) -> Thresholds:
        """By bisection, 16 steps for all channels at once."""
        scale, offset = source.scale, source.offset
        assert scale is not None

        def z(code: Tensor) -> Tensor:
            return value(Source(code, scale, offset)) * affine[0] + affine[1]

        low, high = (torch.full(scale.shape, end, dtype=torch.int32, device=scale.device) for end in (-_MOST - 1, _MOST))
        first, last = z(low), z(high)
        if not (first.isfinite() & last.isfinite()).all():
            return Thresholds(scale, offset, None, None)
        before, after = first >= 0, last >= 0
        for _ in range(16):  # Where the ends differ, z(low) always has the sign `before`, and z(high) the other one.
            middle = (low + high) // 2
            same = (z(middle) >= 0) == before
            low, high = torch.where(same, middle, low), torch.where(same, high, middle)
        falls, always = before & ~after, before & after
        above = torch.where(before == after, torch.where(always, -_MOST - 1, _MOST), low)
        flipped = pack(falls.to(torch.uint8).unsqueeze(0), _BIT, (1, 1, scale.numel())).flatten()
        return Thresholds(scale, offset, above.to(torch.int16), flipped)


@dataclass
class Constants:
    """Of a BatchNorm in evaluation, and of what it was last given.

    Attributes:
        given: running mean and variance, weight and bias, as they were.
        eps: of the module.
        affine: (4, C) float32, rows a, b, mean and inv of `fqt.reference.norm`.
        thresholds: None before the first signs.
    """

    given: tuple[Tensor, ...]
    eps: float
    affine: Tensor
    thresholds: Thresholds | None = field(default=None)

    def signs(self, source: Source, windows: Windows, backend: str) -> QTensor | None:
        """The signs of z, pooled; None where they are left to floats: where another kernel serves, or a value is not finite."""
        y = source.y
        if source.scale is None or y.device.type != "cpu":
            return None
        if select("norm_sign", Request("cpu", (), None, backend))[0].function != "fqt.cpu.norm:norm_sign":
            return None
        found = self.thresholds
        if found is None or not found.are_for(source):
            found = self.thresholds = Thresholds.of(source, self.affine)
        if found.above is None:
            return None
        height, width = windows.pooled_size
        shape = (y.shape[0], height * width, y.shape[2])
        codes = torch.empty(_BIT.packed_shape(shape), dtype=torch.uint8)
        operators().norm_above(y, found.above, found.flipped, windows.flat(), codes)
        return QTensor(codes, torch.ones(1), None, None, _BIT, shape)


@dataclass(frozen=True)
class Norm:
    """A batch normalization with its statistics, ready to be applied.

    Attributes:
        affine: (4, C) float32, rows a, b, mean and inv of `fqt.reference.norm`.
        weight, bias: (C,) gamma and beta, with their graph.
        batch: whether the statistics are the batch's, and the gradient flows through them.
        backend: the one that must serve, "" for the fastest that does.
        constants: in an evaluation without gradients.
    """

    affine: Tensor
    weight: Tensor
    bias: Tensor
    batch: bool
    backend: str
    constants: Constants | None = None


_kept: WeakKeyDictionary[nn.Module, Constants] = WeakKeyDictionary()


def affine_of(norm: nn.modules.batchnorm._BatchNorm, mean: Tensor, var: Tensor) -> Tensor:
    """Rows a, b, mean and inv, (4, C) float32, of statistics in float64."""
    mean, inv = mean.float(), (var + norm.eps).sqrt().reciprocal().float()
    a = norm.weight * inv
    return torch.stack([a, norm.bias - mean * a, mean, inv])


def constants_of(norm: nn.modules.batchnorm._BatchNorm) -> Constants:
    """Of a module on the CPU and its running statistics, found anew where one of them has another value than the last time."""
    assert norm.running_mean is not None and norm.running_var is not None
    given = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    kept = _kept.get(norm)
    if kept is None or kept.eps != norm.eps or not all(map(_equal, kept.given, given)):
        affine = affine_of(norm, norm.running_mean.double(), norm.running_var.double())
        kept = _kept[norm] = Constants(tuple(tensor.detach().clone() for tensor in given), norm.eps, affine)
    return kept


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors of the CPU hold the same values."""
    return a is b if a is None or b is None else torch.equal(a, b)
