"""QuantConvTranspose2d and QuantConvTranspose1d: transposed convolutions with a recipe, as ordinary ones over every phase.

With a stride s each output pixel sees only every s-th tap of the window: the pixels j with the same j mod s, a phase, are an
ordinary convolution of the input by these taps turned around. So s x s convolutions (in a 2 x 2 window with stride 2 they are
1 x 1) multiply every weight once, and no zeros between pixels, which a sign could not stand for. Each takes the scales of
its own taps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from fqt import functional
from fqt.geometry import Geometry
from fqt.layers.base import QuantizedLayer, register_layer
from fqt.packed import Weight

_OPTIONS = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "output_padding", "groups", "dilation", "padding_mode",
)  # fmt: skip


@dataclass(frozen=True)
class Phase:
    """The outputs `start`, `start + stride`, ... along one axis, as a convolution.

    Attributes:
        taps: of the window, in the order in which the convolution reads the input; empty where none is seen.
        dilation: of these.
        before, behind: zeros around the input, or inputs that are left away where negative.
        count: outputs.
    """

    start: int
    taps: tuple[int, ...]
    dilation: int
    before: int
    behind: int
    count: int


def taps_of(start: int, kernel: int, stride: int, padding: int, dilation: int) -> tuple[int, ...]:
    """The taps of the window that the outputs from `start` on see, in the order in which the convolution reads the input."""
    return tuple(tap for tap in reversed(range(kernel)) if (start + padding - tap * dilation) % stride == 0)


def phases(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> list[Phase]:
    """The phases of an axis of `size` inputs and `out` outputs."""
    found = []
    common = math.gcd(stride, dilation)
    for start in range(min(stride, out)):
        taps = taps_of(start, kernel, stride, padding, dilation)
        count = -(-(out - start) // stride)
        step = dilation // common
        # the last tap reads the first input: output m sees input m + offset of the last tap, and so on
        before = -(start + padding - taps[0] * dilation) // stride if taps else 0
        behind = count - size - before + step * (len(taps) - 1)
        found.append(Phase(start, taps, step, before, behind, count))
    return found


class _Transposed(QuantizedLayer):
    """What both have in common; one axis is two, the first of one pixel."""

    kind = "conv"
    options = _OPTIONS
    in_channels: int
    out_channels: int
    groups: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As the plain layer's. ValueError for an output size that the input cannot have."""
        if output_size is None:
            return super().forward(input)
        axes = len(self.kernel_size)
        sizes = (list(self.stride), list(self.padding), list(self.kernel_size), axes, list(self.dilation))
        more = self._output_padding(input, output_size, *sizes)  # type: ignore[operator]
        return self._transposed(input, more)

    def compute(self, input: Tensor) -> Tensor:
        return self._transposed(input, list(self.output_padding))

    def _transposed(self, input: Tensor, more: list[int]) -> Tensor:
        axes = len(self.kernel_size)
        batched = input if input.dim() == axes + 2 else input.unsqueeze(0)
        flat = axes == 1
        x = batched.unsqueeze(2) if flat else batched
        weights = dict(zip(self._taps(), self.weights(), strict=True))
        along = []
        for axis in range(axes):
            kernel, stride, padding, dilation = (
                getattr(self, name)[axis] for name in ("kernel_size", "stride", "padding", "dilation")
            )
            size = batched.shape[2 + axis]
            out = (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + more[axis] + 1
            if out < 1:
                raise ValueError(
                    f"{type(self).__name__}: padding {padding} leaves no output of the input's {size} pixels: enlarge the input"
                )
            along.append((phases(size, out, kernel, stride, padding, dilation), out, stride))
        rows, columns = along if not flat else [([Phase(0, (0,), 1, 0, 0, 1)], 1, 1), *along]
        y: Tensor | None = None
        for row in rows[0]:
            for column in columns[0]:
                part = self._phase(x, weights.get((row.start, column.start)), row, column)
                if y is None:
                    y = part.new_empty(*part.shape[:2], rows[1], columns[1])
                y[:, :, row.start :: rows[2], column.start :: columns[2]] = part
        assert y is not None
        y = y.squeeze(2) if flat else y
        return y if batched is input else y.squeeze(0)

    def _phase(self, x: Tensor, w: Weight | None, row: Phase, column: Phase) -> Tensor:
        if w is None:
            empty = x.new_zeros(x.shape[0], self.out_channels, row.count, column.count)
            return empty if self.bias is None else empty + self.bias.to(empty.dtype).view(1, -1, 1, 1)
        for axis, phase in ((2, row), (3, column)):
            away = (max(-phase.before, 0), max(-phase.behind, 0))
            x = x.narrow(axis, away[0], x.shape[axis] - sum(away)) if any(away) else x
        return functional.conv2d(
            x,
            w,
            self.bias,
            self.recipe,
            padding=(max(row.before, 0), max(row.behind, 0), max(column.before, 0), max(column.behind, 0)),
            dilation=(row.dilation, column.dilation),
            groups=self.groups,
            training=self.training,
            states=self.states,
            backend=self.backend,
        )

    def _taps(self) -> dict[tuple[int, int], tuple[list[int], list[int]]]:
        """First output row and column of each phase that sees taps -> these, along both axes."""
        along = [{0: [0]}] if len(self.kernel_size) == 1 else []
        for kernel, stride, padding, dilation in zip(self.kernel_size, self.stride, self.padding, self.dilation, strict=True):
            seen = {start: list(taps_of(start, kernel, stride, padding, dilation)) for start in range(stride)}
            along.append({start: taps for start, taps in seen.items() if taps})
        rows, columns = along
        return {(row, column): (rows[row], columns[column]) for row in rows for column in columns}

    def split(self, weight: Tensor) -> list[Tensor]:
        """By phases: (I, O / groups, kh, kw) as (O, I / groups, taps, taps)."""
        w = weight.unsqueeze(2) if len(self.kernel_size) == 1 else weight
        w = w.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        return [w[:, :, rows][:, :, :, columns] for rows, columns in self._taps().values()]

    def weight_OKI(self) -> Tensor:
        return self.weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(2).transpose(1, 2)

    def window(self) -> Geometry:
        kernel = [-(-size // stride) for size, stride in zip(self.kernel_size, self.stride, strict=True)]
        height, width = kernel if len(kernel) == 2 else (1, kernel[0])
        return Geometry(0, 0, (height, width), (1, 1), (0, 0, 0, 0), (1, 1), self.groups)

    def canonical(self, y: Tensor) -> Tensor:
        return (y if y.dim() == len(self.kernel_size) + 2 else y.unsqueeze(0)).flatten(2).transpose(1, 2)

    def multiply_adds(self, output: Tensor) -> int:
        inputs = 1
        for axis, out in enumerate(output.shape[-len(self.kernel_size) :]):
            reach = self.dilation[axis] * (self.kernel_size[axis] - 1) + self.output_padding[axis] + 1
            inputs *= (out + 2 * self.padding[axis] - reach) // self.stride[axis] + 1
        return inputs * self.weight.numel()


@register_layer(nn.ConvTranspose2d)
class QuantConvTranspose2d(_Transposed, nn.ConvTranspose2d):  # type: ignore[misc]
    """nn.ConvTranspose2d whose three products follow `recipe`: any stride, padding, output padding, dilation and groups."""

    images = True


@register_layer(nn.ConvTranspose1d)
class QuantConvTranspose1d(_Transposed, nn.ConvTranspose1d):  # type: ignore[misc]
    """nn.ConvTranspose1d whose three products follow `recipe`: any stride, padding, output padding, dilation and groups."""
