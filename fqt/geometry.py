"""Geometry: how a convolution's window meets its image; None stands for a linear layer everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """A 2-d convolution over images of `height` x `width`, zero-padded by top, bottom, left, right."""

    height: int
    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def output_size(self) -> tuple[int, int]:
        top, bottom, left, right = self.padding
        spans = [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        return (
            (self.height + top + bottom - spans[0]) // self.stride[0] + 1,
            (self.width + left + right - spans[1]) // self.stride[1] + 1,
        )

    def flat(self) -> list[int]:
        """As the integers that cross an operator's schema; `unflatten` is the inverse."""
        return [
            self.height, self.width, *self.kernel, *self.stride, *self.padding, *self.dilation, self.groups,
        ]  # fmt: skip

    @staticmethod
    def unflatten(flat: Sequence[int]) -> Geometry | None:
        if not flat:
            return None
        h, w, kh, kw, sh, sw, top, bottom, left, right, dh, dw, groups = flat
        return Geometry(h, w, (kh, kw), (sh, sw), (top, bottom, left, right), (dh, dw), groups)

    def image(self, x_NPC: Tensor) -> Tensor:
        """(N, H*W, C) as a zero-padded (N, C, H', W') in channels_last, a view where nothing is padded."""
        n, _, c = x_NPC.shape
        top, bottom, left, right = self.padding
        x_NCHW = x_NPC.reshape(n, self.height, self.width, c).permute(0, 3, 1, 2)
        return F.pad(x_NCHW, (left, right, top, bottom)) if any(self.padding) else x_NCHW

    @property
    def own_padding(self) -> tuple[int, int]:
        """What torch's convolutions can pad by themselves, rows and columns, sparing a copy: equal zeros on both sides."""
        top, bottom, left, right = self.padding
        return (top, left) if top == bottom and left == right else (0, 0)

    def operand(self, x_NPC: Tensor) -> Tensor:
        """As `image`, for a convolution that pads by `own_padding`."""
        return (replace(self, padding=(0, 0, 0, 0)) if any(self.own_padding) else self).image(x_NPC)

    def crop(self, x_NCHW: Tensor) -> Tensor:
        """The inverse of `operand`: the border away, back to (N, H*W, C)."""
        top, left = (self.padding[0] - self.own_padding[0], self.padding[2] - self.own_padding[1])
        inner = x_NCHW[:, :, top : top + self.height, left : left + self.width]
        return inner.permute(0, 2, 3, 1).reshape(inner.shape[0], self.height * self.width, inner.shape[1])

    def window(self, w_OKI: Tensor) -> Tensor:
        """(O, kh*kw, I) as (O, I, kh, kw)."""
        o, _, i = w_OKI.shape
        return w_OKI.reshape(o, *self.kernel, i).permute(0, 3, 1, 2)

    def gradient(self, g_NPO: Tensor) -> Tensor:
        """(N, H'*W', O) as (N, O, H', W')."""
        return g_NPO.reshape(g_NPO.shape[0], *self.output_size, g_NPO.shape[2]).permute(0, 3, 1, 2)
