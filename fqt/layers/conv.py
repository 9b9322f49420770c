"""QuantConv2d: nn.Conv2d with a recipe."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fqt import functional
from fqt.geometry import Geometry
from fqt.layers.base import QuantizedLayer


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """nn.Conv2d whose three products follow `recipe`: any stride, padding and padding mode, dilation and groups."""

    kind = "conv"

    def compute(self, input: Tensor) -> Tensor:
        left, right, top, bottom = self._padding()
        if self.padding_mode != "zeros" and (left or right or top or bottom):
            input = _pad(input, [left, right, top, bottom], self.padding_mode)
            left = right = top = bottom = 0
        return functional.conv2d(
            input,
            self.weight,
            self.bias,
            self.recipe,
            stride=(self.stride[0], self.stride[1]),
            padding=(top, bottom, left, right),
            dilation=(self.dilation[0], self.dilation[1]),
            groups=self.groups,
            training=self.training,
            defer=self.fuse,
            backend=self.backend,
        )

    def window(self) -> Geometry:
        """The convolution's geometry, over an image of unknown size (0 x 0): what a kernel is chosen by before a forward."""
        left, right, top, bottom = self._padding()
        return Geometry(
            0,
            0,
            (self.kernel_size[0], self.kernel_size[1]),
            (self.stride[0], self.stride[1]),
            (top, bottom, left, right),
            (self.dilation[0], self.dilation[1]),
            self.groups,
        )

    def _padding(self) -> tuple[int, int, int, int]:
        """Left, right, top, bottom; "same" puts the odd one right and bottom, as torch does."""
        if not isinstance(self.padding, str):
            return self.padding[1], self.padding[1], self.padding[0], self.padding[0]
        if self.padding == "valid":
            return 0, 0, 0, 0
        total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2


def _pad(x: Tensor, padding: list[int], mode: str) -> Tensor:
    if mode == "circular" or not functional.keeps_graph(x):
        return F.pad(x, padding, mode)
    return _MirrorPad.apply(x, padding, mode)


class _MirrorPad(torch.autograd.Function):
    """F.pad with "reflect" or "replicate", without keeping the float input, of which torch's backward needs the shape only."""

    @staticmethod
    def forward(x: Tensor, padding: list[int], mode: str) -> Tensor:
        return F.pad(x, padding, mode)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, ctx.padding, ctx.mode = inputs
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx, g: Tensor):
        ops = {
            "reflect": torch.ops.aten.reflection_pad2d_backward,
            "replicate": torch.ops.aten.replication_pad2d_backward,
        }
        return ops[ctx.mode](g, g.new_empty(1).expand(ctx.shape), ctx.padding), None, None
