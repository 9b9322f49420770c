"""Subclasses of torch's layers, in timm and torchvision, that compute what the plain class does: from the same numbers, from an
input padded as TensorFlow pads ("same"), or with a standardized weight.

They are known by their paths, so that their packages need not be installed, nor imported.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fqt.layers.base import QuantizedLayer, register_layer
from fqt.layers.conv import QuantConv2d, convolve, padding_of
from fqt.layers.conv3d import QuantConv3d
from fqt.layers.linear import QuantLinear

register_layer("timm.layers.linear.Linear")(QuantLinear)


@register_layer("torchvision.models.video.resnet.Conv3DSimple")
@register_layer("torchvision.models.video.resnet.Conv3DNoTemporal")
class VideoConv3d(QuantConv3d):
    """nn.Conv3d, made of other arguments."""

    def like(self, kind: type[nn.Module]) -> nn.Module:
        return super().like(QuantConv3d if issubclass(kind, QuantizedLayer) else nn.Conv3d)


@register_layer("timm.layers.conv2d_same.Conv2dSame")
class SameConv2d(QuantConv2d):
    """A convolution whose output has ceil(size / stride) pixels, the odd one of the padding behind."""

    def compute(self, input: Tensor) -> Tensor:
        return convolve(self, input, same_padding(self, input))

    def like(self, kind: type[nn.Module]) -> nn.Module:
        return _like(self, kind, 0)


@register_layer("timm.layers.std_conv.StdConv2d")
@register_layer("timm.layers.std_conv.ScaledStdConv2d")
class StandardizedConv2d(QuantConv2d):
    """A convolution whose weight is standardized by output channel before it is quantized, with a gain if it has one."""

    def compute(self, input: Tensor) -> Tensor:
        (top, bottom), (left, right) = padding_of(self)
        return convolve(self, input, (top, bottom, left, right))

    def multiplied(self) -> Tensor:
        return standardized(self)

    def weight_OKI(self) -> Tensor:
        return standardized(self).flatten(2).transpose(1, 2)

    def like(self, kind: type[nn.Module]) -> nn.Module:
        return _like(self, kind, self.padding)


@register_layer("timm.layers.std_conv.StdConv2dSame")
@register_layer("timm.layers.std_conv.ScaledStdConv2dSame")
class StandardizedSameConv2d(StandardizedConv2d):
    """Both."""

    same_pad: bool

    def compute(self, input: Tensor) -> Tensor:
        return convolve(self, input, same_padding(self, input)) if self.same_pad else super().compute(input)

    def like(self, kind: type[nn.Module]) -> nn.Module:
        return _like(self, kind, "same" if self.same_pad else self.padding)


def standardized(layer: QuantConv2d) -> Tensor:
    """The weight with mean 0 and variance 1 in each output channel, times gain and scale where the layer has these."""
    gain = (layer.gain * layer.scale).view(-1) if hasattr(layer, "gain") else None  # type: ignore[operator]
    w_1OK = layer.weight.reshape(1, layer.out_channels, -1)
    epsilon: float = layer.eps  # type: ignore[assignment]
    return F.batch_norm(w_1OK, None, None, gain, training=True, momentum=0.0, eps=epsilon).reshape_as(layer.weight)


def same_padding(layer: QuantConv2d, x: Tensor) -> tuple[int, int, int, int]:
    """Zeros at the top, bottom, left and right for which the output has ceil(size / stride) pixels."""
    sides: list[int] = []
    for size, kernel, stride, dilation in zip(x.shape[-2:], layer.kernel_size, layer.stride, layer.dilation, strict=True):
        total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
        sides += [total // 2, total - total // 2]
    return (sides[0], sides[1], sides[2], sides[3])


def _like(layer: QuantConv2d, kind: type[nn.Module], padding: object) -> nn.Module:
    sizes = (layer.in_channels, layer.out_channels, layer.kernel_size)
    return kind(*sizes, layer.stride, padding, layer.dilation, layer.groups, layer.bias is not None)
