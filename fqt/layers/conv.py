"""QuantConv2d: nn.Conv2d with a recipe."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fqt import functional, products
from fqt.geometry import Geometry
from fqt.layers.base import QuantizedLayer, register_layer

CONV_OPTIONS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
"""The constructor's arguments of torch's convolutions that are attributes too."""


@register_layer(nn.Conv2d)
class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """nn.Conv2d whose three products follow `recipe`: any stride, padding and padding mode, dilation and groups."""

    kind = "conv"
    options = CONV_OPTIONS
    images = True

    def compute(self, input: Tensor) -> Tensor:
        (top, bottom), (left, right) = padding_of(self)
        if self.padding_mode != "zeros" and (left or right or top or bottom):
            input = pad(input, [left, right, top, bottom], self.padding_mode)
            left = right = top = bottom = 0
        return convolve(self, input, (top, bottom, left, right))

    def weight_OKI(self) -> Tensor:
        return self.weight.flatten(2).transpose(1, 2)

    def window(self) -> Geometry:
        (top, bottom), (left, right) = padding_of(self)
        return Geometry(
            0,
            0,
            (self.kernel_size[0], self.kernel_size[1]),
            (self.stride[0], self.stride[1]),
            (top, bottom, left, right),
            (self.dilation[0], self.dilation[1]),
            self.groups,
        )

    def canonical(self, y: Tensor) -> Tensor:
        return (y if y.dim() == 4 else y.unsqueeze(0)).flatten(2).transpose(1, 2)

    def multiply_adds(self, output: Tensor) -> int:
        return output.shape[-1] * output.shape[-2] * self.weight.numel()


def convolve(layer: QuantConv2d, x: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """The layer's convolution of x, with zeros around x that may be others than its own."""
    return functional.conv2d(
        x,
        layer.weights()[0],
        layer.bias,
        layer.recipe,
        stride=(layer.stride[0], layer.stride[1]),
        padding=padding,
        dilation=(layer.dilation[0], layer.dilation[1]),
        groups=layer.groups,
        training=layer.training,
        states=layer.states,
        fusion=layer.fusion,
        backend=layer.backend,
    )


def padding_of(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[tuple[int, int]]:
    """What a convolution pads before and behind each axis of its images; "same" puts the odd one behind, as torch does."""
    if layer.padding == "valid":
        return [(0, 0) for _ in layer.kernel_size]
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [(size // 2, size - size // 2) for size in total]
    return [(int(size), int(size)) for size in layer.padding]


def pad(x: Tensor, padding: list[int], mode: str) -> Tensor:
    """F.pad by "circular", "reflect" or "replicate", without keeping x for the backward.

    Args:
        padding: as F.pad takes it: before and behind the last axis, then the one before.
    """
    if mode == "circular" or not products.keeps_graph(x):
        return F.pad(x, padding, mode)
    return _MirrorPad.apply(x, padding, mode)  # type: ignore[return-value]


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
        kind = {"reflect": "reflection", "replicate": "replication"}[ctx.mode]
        grad = getattr(torch.ops.aten, f"{kind}_pad{len(ctx.padding) // 2}d_backward")
        return grad(g, g.new_empty(1).expand(ctx.shape), ctx.padding), None, None
