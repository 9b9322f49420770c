"""The products of signs and of b-bit codes by signs, behind the signatures of the reference.

Codes become planes of bits along the axis that is summed (planes.cu), a GEMM adds what their words have in common (gemm_*.cu),
and floats come last, in the reference's order. What pruning dropped is never read: its slots come last in the index, on the
device, and blocks that begin there return. The host knows shapes alone, so nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fqt.cuda_kernels import plan, runtime
from fqt.cuda_kernels.runtime import Kernel
from fqt.formats import Format, Shape3
from fqt.geometry import Geometry
from fqt.qtensor import QTensor

_ROWS, _COLUMNS, _SUMS = (Kernel("planes", name) for name in ("planes_of_rows", "planes_of_columns", "sums_of_rows"))
_WEIGHT = Kernel("weight", "finish_weight")
_MOST = 2**30  # twice a sum of codes fits 31 bits


@dataclass(frozen=True)
class _Bits:
    """Rows of words. data: (planes, rows, words) int32, contiguous; or a format's own bytes, where they lie that way."""

    data: Tensor
    planes: int
    rows: int
    words: int

    @property
    def plane_bytes(self) -> int:
        return self.rows * self.words * 4

    def sums(self, slices: int = 1) -> Tensor:
        """(slices, rows) int32: the sum of the codes of every slice of a row."""
        sums = self.data.new_empty((slices, self.rows), dtype=torch.int32)
        arguments = [self.data, sums, self.rows, self.planes, slices, self.words, self.words // slices]
        runtime.launch(_SUMS, _blocks(self.rows * slices * 32), 1, arguments)
        return sums


@dataclass(frozen=True)
class _Window:
    """Which pixel of an image of height x width a position meets under a tap: (position * mul + tap * step + base) / div."""

    out_width: int
    height: int
    width: int
    mul: tuple[int, int]
    step: tuple[int, int]
    base: tuple[int, int]
    div: tuple[int, int] = (1, 1)
    kernel_width: int = 1
    taps: int = 1

    @staticmethod
    def forward(g: Geometry) -> _Window:
        """The image's pixels that an output position sees."""
        taps, base = g.kernel[0] * g.kernel[1], (-g.padding[0], -g.padding[2])
        return _Window(g.output_size[1], g.height, g.width, g.stride, g.dilation, base, (1, 1), g.kernel[1], taps)

    @staticmethod
    def backward(g: Geometry) -> _Window:
        """The output's positions that see a pixel of the image."""
        taps, step = g.kernel[0] * g.kernel[1], (-g.dilation[0], -g.dilation[1])
        base = (g.padding[0], g.padding[2])
        return _Window(g.width, *g.output_size, (1, 1), step, base, g.stride, g.kernel[1], taps)

    @staticmethod
    def row(positions: int) -> _Window:
        """Positions as they lie: no window."""
        return _Window(1, positions, 1, (1, 1), (0, 0), (0, 0))

    def image(self) -> tuple[int, ...]:
        """What kernels are told of it, but for its taps and `div`."""
        return self.out_width, self.height, self.width, *self.mul, *self.step, *self.base


def output(x: QTensor, w: QTensor, bias: Tensor | None, geometry: Geometry | None, *, rules: plan.Rules = plan.RULES) -> Tensor:
    """As `fqt.reference.output`, of signs or unsigned codes by signs."""
    return _forward(x, w, None if bias is None else bias.float().contiguous(), geometry, torch.float32, rules)


def accumulate(x: QTensor, w: QTensor, geometry: Geometry | None, *, rules: plan.Rules = plan.RULES) -> Tensor:
    """As `fqt.reference.accumulate`, of signs."""
    return _forward(x, w, None, geometry, torch.int16, rules)


def _forward(
    x: QTensor, w: QTensor, bias: Tensor | None, geometry: Geometry | None, dtype: torch.dtype, rules: plan.Rules
) -> Tensor:
    n, positions, channels = x.shape
    outputs, taps, _ = w.shape
    window = _Window.forward(geometry or _column(positions))
    size = positions if geometry is None else geometry.output_size[0] * geometry.output_size[1]
    y = x.scale.new_empty((n, size, outputs), dtype=dtype)
    words = plan.words_of(channels)
    a = _planes_of_rows(x, n, positions, None, words)
    b = _planes_of_rows(w, outputs * taps, 1, None, words)
    _multiply(a, _Bits(b.data, 1, outputs, taps * words), x, w, None, bias, None, window, channels, y, rules)
    return y


def grad_input(
    g: QTensor,
    w: QTensor,
    mask: Tensor | None,
    geometry: Geometry | None,
    x_shape: Shape3,
    *,
    rules: plan.Rules = plan.RULES,
) -> Tensor:
    """As `fqt.reference.grad_input`, of unsigned codes and signs."""
    n, positions, channels = x_shape
    outputs, taps, _ = w.shape
    index = g.index if g.format.axes == "N" else None
    grad = g.scale.new_zeros(x_shape) if index is not None else g.scale.new_empty(x_shape)
    words = plan.words_of(outputs)
    a = _planes_of_rows(g, n, g.shape[1], index, words)
    # w turned round: a row an input channel, in it the output channels of every tap
    taken = _Window(1, outputs * taps, 1, (taps, 1), (1, 1), (0, 0), (1, 1), 1, taps)
    b = _planes_of_columns(w, channels, taken, (1, 1, outputs), None, words, tap_words=words, row_words=taps * words)
    window = _Window.backward(geometry or _column(positions))
    _multiply(a, b, g, w, index, None, None if mask is None else mask.contiguous(), window, outputs, grad, rules)
    return grad


def grad_weight(g: QTensor, x: QTensor, geometry: Geometry | None, *, rules: plan.Rules = plan.RULES) -> Tensor:
    """As `fqt.reference.grad_weight`, of unsigned codes and signs.

    Raises:
        ValueError: more positions than 31 bits can add codes of.
    """
    n, size, outputs = g.shape
    channels, axes = x.shape[2], g.format.axes
    taps = geometry.kernel[0] * geometry.kernel[1] if geometry else 1
    by_sample = "N" in axes
    index = g.index if axes in ("N", "C") else None
    most = (size if by_sample else n * size) * g.format.code_range[1]
    if most >= _MOST:
        raise ValueError(
            f"grad_weight adds up to {most:,} in 31 bits: {n * size:,} positions of {g.format.bits}-bit codes are too many for "
            f"the backend 'cuda'; take a smaller batch or the backend 'reference'"
        )
    grad = g.scale.new_zeros((outputs, taps, channels))
    if not grad.numel() or (by_sample and n == 0):
        return grad
    slices, together = (n, 1) if by_sample else (1, n)
    cut = (slices, together, size)
    words = plan.words_of(together * size, whole=True)
    samples = index if axes == "N" else None
    if axes in ("C", "NC"):  # each channel's codes lie side by side already
        rows = outputs * slices
        planes = _planes_of_codes(g.codes, g.format, rows, 1, index if axes == "C" else None, words)
        a = _Bits(planes.data, planes.planes, outputs, slices * words)
    else:
        a = _planes_of_columns(g, outputs, _Window.row(size), cut, samples, words, 0, slices * words)
    window = _Window.forward(geometry or _column(size))
    b = _planes_of_columns(x, channels, window, cut, samples, words, channels * slices * words, slices * words, inside=True)
    _multiply_slices(a, b, g, x, index, words // 4, grad, rules)
    return grad


def _column(positions: int) -> Geometry:
    """A linear layer as a convolution: a 1x1 window over a column of positions."""
    return Geometry(positions, 1, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)


def _blocks(threads: int) -> int:
    return -(-threads // _ROWS.threads)


def _planes_of_rows(q: QTensor, samples: int, positions: int, index: Tensor | None, words: int) -> _Bits:
    """Every (sample, position) of codes that are packed along their channels; with an index, of kept samples alone."""
    rows = samples * positions
    bytes_as_words = q.codes.shape[-1] == words * 4 and q.codes.data_ptr() % 16 == 0
    if q.format.bits == 1 and index is None and q.codes.is_contiguous() and bytes_as_words:
        return _Bits(q.codes, 1, rows, words)
    return _planes_of_codes(q.codes, q.format, rows, positions, index, words)


def _planes_of_codes(codes: Tensor, format: Format, rows: int, positions: int, index: Tensor | None, words: int) -> _Bits:
    planes = codes.new_empty((format.bits, rows, words), dtype=torch.int32)
    arguments = [
        codes.contiguous(), index, planes, rows, positions, codes.shape[-1], format.storage_bits, format.bits, words,
    ]  # fmt: skip
    runtime.launch(_ROWS, _blocks(rows * words), 1, arguments)
    return _Bits(planes, format.bits, rows, words)


def _planes_of_columns(
    q: QTensor,
    channels: int,
    window: _Window,
    cut: tuple[int, int, int],
    index: Tensor | None,
    words: int,
    tap_words: int,
    row_words: int,
    inside: bool = False,
) -> _Bits:
    """Channels turned into rows of positions, a row a tap and channel (or, with `tap_words` < `row_words`, a channel).

    Args:
        cut: slices; samples of a slice; positions of a sample.
        words: of a slice and tap.
        inside: with a row more for each tap: which positions it meets.
    """
    slices, together, positions = cut
    rows = channels if tap_words < row_words else window.taps * channels
    planes = q.codes.new_empty((q.format.bits, rows + (window.taps if inside else 0), row_words), dtype=torch.int32)
    codes = q.codes.contiguous()
    row_bytes = codes.shape[-1]
    arguments = [
        codes, index, planes, rows * row_words if inside else -1, slices, together, max(1, positions), row_bytes,
        q.format.storage_bits, q.format.bits, channels, words, planes.shape[1] * row_words, row_words, tap_words, words,
        window.taps, window.kernel_width, *window.image(),
    ]  # fmt: skip
    runtime.launch(_COLUMNS, _blocks(window.taps * -(-row_bytes // 4) * slices * words * 32), 1, arguments)
    return _Bits(planes, q.format.bits, planes.shape[1], row_words)


def _multiply(
    a: _Bits,
    b: _Bits,
    left: QTensor,
    right: QTensor,
    index: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    window: _Window,
    channels: int,
    y: Tensor,
    rules: plan.Rules,
) -> None:
    """`output` and `grad_input`: windows of A's image by B's rows, and the float part, into y (N, positions, columns)."""
    n, positions, columns = y.shape
    unit = plan.unit_of(b.words // window.taps)
    device = runtime.of(y)
    tile = rules.tile(device, n * positions, columns)
    scale_sample, scale_position = {"": (0, 0), "N": (1, 0), "NP": (positions, 1)}[left.format.axes]
    integers = y.dtype == torch.int16
    units = b.words * 4 // unit
    arguments = [
        a.data, b.data, a.sums(), b.sums(window.taps), index, None, *((None, y) if integers else (y, None)),
        left.scale, left.offset, right.scale, bias, mask, a.planes, a.plane_bytes, int(left.format.grid == "sign"),
        n * positions, positions, columns, a.words * 4, b.words * 4, units, units, 0, units // window.taps, channels,
        window.kernel_width, window.taps, *window.image(), *window.div, scale_sample, scale_position,
        int(right.format.axes == "O"), -(-columns // tile.columns),
    ]  # fmt: skip
    runtime.launch(runtime.gemm(tile, unit), tile.blocks(n * positions, columns) if y.numel() else 0, 1, arguments)


def _multiply_slices(
    a: _Bits, b: _Bits, g: QTensor, x: QTensor, index: Tensor | None, sample_units: int, grad: Tensor, rules: plan.Rules
) -> None:
    """`grad_weight`: integers of slices of the sum, then the float part. sample_units: of 16 bytes, in a sample's slice."""
    outputs, taps, channels = grad.shape
    by_sample, units = "N" in g.format.axes, a.words // 4
    device, slots = runtime.of(grad), g.shape[0] if by_sample else 1
    x_sums = b.sums(slots)
    if by_sample:
        length, slices = sample_units, slots
        together = min(slots, rules.samples_together(outputs, b.rows))
    else:
        length = plan.slice_units(units, rules.splits(device, outputs, b.rows, units))
        together = slices = -(-units // length)
    tile = rules.tile(device, outputs, b.rows, together)
    partial = a.data.new_empty((together, outputs, b.rows))
    scale_channel, scale_sample = {"": (0, 0), "N": (0, 1), "C": (1, 0), "NC": (g.shape[0], 1)}[g.format.axes]
    samples, kept = (index, None) if by_sample else (None, index)
    for first in range(0, slices, together):
        count = min(together, slices - first)
        a_part, b_part = (bits.data.flatten()[first * length * 4 :] for bits in (a, b))
        part = kept if samples is None else samples[first:]
        arguments = [
            a_part, b_part, None, None, part, partial, *[None] * 7, a.planes, a.plane_bytes, 0,
            outputs, 1, b.rows, a.words * 4, b.words * 4, min(count * length, units), length, int(by_sample), units, 0,
            1, 1, *_Window.row(1).image(), 1, 1, 0, 0, 0, -(-b.rows // tile.columns),
        ]  # fmt: skip
        runtime.launch(runtime.gemm(tile, 16), tile.blocks(outputs, b.rows), count, arguments)
        arguments = [
            partial, x_sums[first:] if by_sample else x_sums, kept, samples, g.scale, g.offset, x.scale, grad, count, first,
            outputs, taps, channels, scale_channel, scale_sample, int(by_sample),
        ]  # fmt: skip
        runtime.launch(_WEIGHT, _blocks(outputs * taps * channels), 1, arguments)
