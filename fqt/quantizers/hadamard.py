"""A random Hadamard transform of both operands of a product, along the axis that it sums over (Xi et al., arXiv 2306.11987,
section 4.2; QuIP#, arXiv 2402.04396, section 3).

    a^T b = (H D a)^T (H D b) / size        H: a Hadamard matrix of +-1, H^T H = size; D: random signs, the same for both

A value that is large stands out among its neighbours and makes their codes coarse; H spreads it over `size` of them. The signs
keep what is not random in the data from lining up with a row of H. The left operand is multiplied by H D, the right by
H D / size: a power of two, so the product of the unquantized operands is the same but for the rounding of the additions.

The axis is cut into blocks of `size`; what is left over at its end is transformed in blocks of smaller powers of two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fqt.philox import uniform_u24
from fqt.quantizers.stages import ProductTransform, register_transform


@register_transform("hadamard")
@dataclass(frozen=True)
class Hadamard(ProductTransform):
    """The transform, drawn anew with every call of a layer.

    Attributes:
        size: of the blocks, a power of two from 2 to 1024.
    """

    size: int = 32
    random = True

    def __post_init__(self) -> None:
        if type(self.size) is not int or not 2 <= self.size <= 1024 or self.size & (self.size - 1):
            raise ValueError(f"size {self.size!r} is not a power of two from 2 to 1024")

    def apply(self, a_T: Tensor, side: int, key: Tensor | None, stream: int) -> Tensor:
        assert key is not None, "the signs are drawn with the call's key"
        terms = a_T.shape[-1]
        draws = uniform_u24(torch.zeros(1, dtype=torch.int64, device=a_T.device), terms, key, stream)[0]
        return self._mixed(a_T * torch.where(draws < 1 << 23, 1.0, -1.0), side)

    def inverse(self, a_T: Tensor, side: int, key: Tensor, stream: int) -> Tensor:
        """What `apply` was given, but for the rounding of additions; exact where these are."""
        terms = a_T.shape[-1]
        draws = uniform_u24(torch.zeros(1, dtype=torch.int64, device=a_T.device), terms, key, stream)[0]
        return self._mixed(a_T, 1 - side) * torch.where(draws < 1 << 23, 1.0, -1.0)

    def _mixed(self, a_T: Tensor, side: int) -> Tensor:
        """H, or for side 1 H / size, block by block."""
        parts, first, terms = [], 0, a_T.shape[-1]
        size = self.size
        while first < terms:
            while size > terms - first:
                size //= 2
            count = (terms - first) // size * size
            part = walsh(a_T[..., first : first + count].unflatten(-1, (-1, size)))
            parts.append((part / size if side else part).flatten(-2))
            first += count
        return torch.cat(parts, -1) if parts else a_T


def walsh(a: Tensor) -> Tensor:
    """The fast Walsh-Hadamard transform of the last axis, a power of two long, unscaled."""
    size, half = a.shape[-1], 1
    while half < size:
        pairs = a.unflatten(-1, (-1, 2, half))
        a = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2).flatten(-3)
        half *= 2
    return a
