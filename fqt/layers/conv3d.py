"""QuantConv3d: nn.Conv3d with a recipe, as convolutions of frames: one for each step of the window in depth.

Each of these takes the frames that its step sees as samples of their own, and the scales of its own taps; their outputs are
added in float. So no frame of zeros stands beyond the ends, which a sign could not express.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from fqt import functional
from fqt.geometry import Geometry
from fqt.layers.base import QuantizedLayer, register_layer
from fqt.layers.conv import CONV_OPTIONS, pad, padding_of
from fqt.packed import Weight


@register_layer(nn.Conv3d)
class QuantConv3d(QuantizedLayer, nn.Conv3d):
    """nn.Conv3d whose three products follow `recipe`: any stride, padding and padding mode, dilation and groups."""

    kind = "conv"
    options = CONV_OPTIONS

    def compute(self, input: Tensor) -> Tensor:
        (front, back), *others = padding_of(self)
        sides = [side for pair in others for side in pair]
        if self.padding_mode != "zeros" and any((front, back, *sides)):
            input = pad(input, [*sides[2:], *sides[:2], front, back], self.padding_mode)
            front = back = 0
            sides = [0, 0, 0, 0]
        x = input if input.dim() == 5 else input.unsqueeze(0)
        steps, stride, dilation = self.kernel_size[0], self.stride[0], self.dilation[0]
        depth = x.shape[2]
        out = (depth + front + back - dilation * (steps - 1) - 1) // stride + 1
        if out < 1:
            raise ValueError(
                f"conv3d: a window of {steps} frames (dilation {dilation}) does not fit {depth} padded by {front + back}: "
                f"give more frames, or more padding"
            )
        weights = self.weights()  # once: a parametrization computes it
        y: Tensor | None = None
        for step in range(steps):
            seen = [frame for frame in range(out) if 0 <= frame * stride - front + step * dilation < depth]
            if not seen:
                continue
            start = seen[0] * stride - front + step * dilation
            frames = x[:, :, start : start + (len(seen) - 1) * stride + 1 : stride]
            part = self._frames(frames, weights[step], sides)
            if y is None:
                y = part.new_zeros(part.shape[0], out, *part.shape[2:])
            y[:, seen[0] : seen[-1] + 1] += part
        assert y is not None
        y = y.transpose(1, 2)
        y = y if self.bias is None else y + self.bias.to(y.dtype).view(-1, 1, 1, 1)
        return y if input.dim() == 5 else y.squeeze(0)

    def _frames(self, x_NIFHW: Tensor, w_OIHW: Weight, sides: list[int]) -> Tensor:
        """The convolution of each frame with one step of the window, (N, F, O, H', W')."""
        y = functional.conv2d(
            x_NIFHW.transpose(1, 2).flatten(0, 1),
            w_OIHW,
            None,
            self.recipe,
            stride=(self.stride[1], self.stride[2]),
            padding=(sides[0], sides[1], sides[2], sides[3]),
            dilation=(self.dilation[1], self.dilation[2]),
            groups=self.groups,
            training=self.training,
            states=self.states,
            backend=self.backend,
        )
        return y.unflatten(0, (x_NIFHW.shape[0], x_NIFHW.shape[2]))

    def split(self, weight: Tensor) -> list[Tensor]:
        return list(weight.unbind(2))

    def weight_OKI(self) -> Tensor:
        return self.weight.flatten(2).transpose(1, 2)

    def window(self) -> Geometry:
        _, (top, bottom), (left, right) = padding_of(self)
        _, *kernel = self.kernel_size
        _, *stride = self.stride
        _, *dilation = self.dilation
        return Geometry(
            0,
            0,
            (kernel[0], kernel[1]),
            (stride[0], stride[1]),
            (top, bottom, left, right),
            (dilation[0], dilation[1]),
            self.groups,
        )

    def canonical(self, y: Tensor) -> Tensor:
        return (y if y.dim() == 5 else y.unsqueeze(0)).flatten(2).transpose(1, 2)

    def multiply_adds(self, output: Tensor) -> int:
        return math.prod(output.shape[-3:]) * self.weight.numel()
