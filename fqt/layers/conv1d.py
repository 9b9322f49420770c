"""QuantConv1d: nn.Conv1d with a recipe, a convolution over images one pixel high."""

from __future__ import annotations

from torch import Tensor, nn

from fqt import functional
from fqt.geometry import Geometry
from fqt.layers.base import QuantizedLayer, register_layer
from fqt.layers.conv import CONV_OPTIONS, pad, padding_of


@register_layer(nn.Conv1d)
class QuantConv1d(QuantizedLayer, nn.Conv1d):
    """nn.Conv1d whose three products follow `recipe`: any stride, padding and padding mode, dilation and groups."""

    kind = "conv"
    options = CONV_OPTIONS

    def compute(self, input: Tensor) -> Tensor:
        ((left, right),) = padding_of(self)
        if self.padding_mode != "zeros" and (left or right):
            input, left, right = pad(input, [left, right], self.padding_mode), 0, 0
        return functional.conv2d(
            input.unsqueeze(-2),
            self.weights()[0],
            self.bias,
            self.recipe,
            stride=(1, self.stride[0]),
            padding=(0, 0, left, right),
            dilation=(1, self.dilation[0]),
            groups=self.groups,
            training=self.training,
            states=self.states,
            backend=self.backend,
        ).squeeze(-2)

    def split(self, weight: Tensor) -> list[Tensor]:
        return [weight.unsqueeze(-2)]

    def weight_OKI(self) -> Tensor:
        return self.weight.transpose(1, 2)

    def window(self) -> Geometry:
        ((left, right),) = padding_of(self)
        step, dilation = (1, self.stride[0]), (1, self.dilation[0])
        return Geometry(1, 0, (1, self.kernel_size[0]), step, (0, 0, left, right), dilation, self.groups)

    def canonical(self, y: Tensor) -> Tensor:
        return (y if y.dim() == 3 else y.unsqueeze(0)).transpose(1, 2)

    def multiply_adds(self, output: Tensor) -> int:
        return output.shape[-1] * self.weight.numel()
