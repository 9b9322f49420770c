"""The three products in exact arithmetic, without torch: see `oracle` for the codes."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from fqt.formats import Format
from fqt.geometry import Geometry
from fqt.qtensor import QTensor
from tests.fqt.oracle import FLOAT8, float8_grid, group_places, pack, spread_groups


@dataclass
class Operand:
    """A quantized tensor taken apart: integer codes and float32 scale and offset, all (N, P, C)."""

    codes: np.ndarray
    scale: np.ndarray
    offset: np.ndarray | None
    q: QTensor

    @property
    def values(self) -> np.ndarray:
        """Decoded, float32: one rounding a product, one a sum."""
        values = (self.codes.astype(np.float64) * self.scale).astype(np.float32)
        return values if self.offset is None else values + self.offset


def random_operand(rng: np.random.Generator, format: Format, shape: tuple[int, int, int], keep: float | None = None) -> Operand:
    """Codes drawn from the format's whole range, scales and offsets from floats with full mantissas.

    keep: fraction of groups kept; the pruned have scale 0, stored bits 0 and are not in the index.
    """
    groups = group_places(format, shape)
    count = len(groups)
    low, high = format.code_range
    if format.grid == "sign":
        codes = rng.choice([-1, 1], shape).astype(np.float64)
    elif format.grid in FLOAT8:
        codes = rng.choice(np.array(float8_grid(format.grid)), shape)
    else:
        codes = rng.integers(low, high, shape, endpoint=True).astype(np.float64)
    scale = np.exp(rng.normal(size=count)).astype(np.float32)
    offset = rng.normal(size=count).astype(np.float32) if format.offset else None
    index = None
    if keep is not None:
        kept = np.flatnonzero(rng.random(count) < keep)
        index = np.full(count, -1, np.int32)
        index[: len(kept)] = kept
        for group in set(range(count)) - set(kept.tolist()):
            scale[group] = 0
            if offset is not None:
                offset[group] = 0
            for place in groups[group]:
                codes[place] = -1 if format.grid == "sign" else 0
    q = QTensor(
        torch.from_numpy(pack(codes, format).copy()),
        torch.from_numpy(scale),
        None if offset is None else torch.from_numpy(offset),
        None if index is None else torch.from_numpy(index),
        format,
        shape,
    )
    spread = spread_groups(scale.tolist(), format, shape)
    spread_offset = None if offset is None else spread_groups(offset.tolist(), format, shape)
    return Operand(codes, spread, spread_offset, q)


def terms(x_shape: tuple[int, int, int], w_shape: tuple[int, int, int], geometry: Geometry | None):
    """Each tap of a layer's forward that lies inside the image: (output position, position, tap, outputs, inputs).

    The last two are slices, the output channels of a group and its input channels.
    """
    if geometry is None:
        for p in range(x_shape[1]):
            yield p, p, 0, slice(None), slice(None)
        return
    top, _, left, _ = geometry.padding
    out_h, out_w = geometry.output_size
    o_each, c_each = w_shape[0] // geometry.groups, x_shape[2] // geometry.groups
    for oh, ow, i, j, group in itertools.product(
        range(out_h), range(out_w), *map(range, geometry.kernel), range(geometry.groups)
    ):
        h = oh * geometry.stride[0] + i * geometry.dilation[0] - top
        w = ow * geometry.stride[1] + j * geometry.dilation[1] - left
        if 0 <= h < geometry.height and 0 <= w < geometry.width:
            yield (
                oh * out_w + ow,
                h * geometry.width + w,
                i * geometry.kernel[1] + j,
                slice(group * o_each, (group + 1) * o_each),
                slice(group * c_each, (group + 1) * c_each),
            )


def accumulate_output(x: np.ndarray, w: np.ndarray, geometry: Geometry | None, positions: int) -> np.ndarray:
    """(N, P', O), in the arrays' own arithmetic."""
    y = np.zeros((x.shape[0], positions, w.shape[0]), x.dtype)
    for out, position, tap, o, c in terms(x.shape, w.shape, geometry):
        y[:, out, o] += x[:, position, c] @ w[o, tap].T
    return y


def accumulate_grad_input(g: np.ndarray, w: np.ndarray, geometry: Geometry | None, x_shape) -> np.ndarray:
    """(N, P, C)."""
    grad = np.zeros((g.shape[0], *x_shape[1:]), g.dtype)
    for out, position, tap, o, c in terms(x_shape, w.shape, geometry):
        grad[:, position, c] += g[:, out, o] @ w[o, tap]
    return grad


def accumulate_grad_weight(g: np.ndarray, x: np.ndarray, geometry: Geometry | None, w_shape) -> np.ndarray:
    """(N, O, K, I), a term for each sample."""
    grad = np.zeros((g.shape[0], *w_shape), g.dtype)
    for out, position, tap, o, c in terms(x.shape, w_shape, geometry):
        grad[:, o, tap] += g[:, out, o, None] * x[:, position, None, c]
    return grad


def dequantize(total, a: Operand, b: Operand, a_scale, b_scale, a_offset, b_offset) -> np.ndarray:
    """fqt.reference's order of floats, literally; `total(a codes, b codes)` accumulates int64 codes."""
    ones_a, ones_b = np.ones_like(a.codes), np.ones_like(b.codes)

    def accumulator(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return _to_float32(total(_exact(x, a.q.format), _exact(y, b.q.format)), a.q.format, b.q.format)

    t = accumulator(a.codes, b.codes) * a_scale
    t = t * b_scale
    if b_offset is not None:
        t = t + (accumulator(a.codes, ones_b) * a_scale) * b_offset
    if a_offset is not None:
        t = t + (accumulator(ones_a, b.codes) * b_scale) * a_offset
    if a_offset is not None and b_offset is not None:
        t = t + (accumulator(ones_a, ones_b) * a_offset) * b_offset
    assert t.dtype == np.float32
    return t


def _unit(format: Format) -> int:
    """Codes times 2^unit are integers."""
    return {"e4m3": 9, "e5m2": 16}.get(format.grid, 0)


def _exact(codes: np.ndarray, format: Format) -> np.ndarray:
    """int64, or for float8 Python's integers of any length."""
    if format.grid not in FLOAT8:
        return codes.astype(np.int64)
    return (codes * 2.0 ** _unit(format)).astype(np.int64).astype(object)


def _to_float32(total: np.ndarray, *formats: Format) -> np.ndarray:
    """One rounding."""
    unit = sum(_unit(format) for format in formats)
    if unit == 0:
        return total.astype(np.int64).astype(np.float32)
    return np.vectorize(lambda i: fraction_to_f32(Fraction(int(i), 2**unit)), otypes=[np.float32])(total)


def fraction_to_f32(value: Fraction) -> np.float32:
    """The float32 nearest to a fraction, ties to even (float64 first would round twice)."""
    near = np.float32(float(value))
    around = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))]
    return min(around, key=lambda f: (abs(Fraction(float(f)) - value), int(f.view(np.int32)) & 1))


def _reduced(scale: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """The scale with the axes that are summed cut to one: it must be constant along them."""
    for axis in axes:
        first = scale.take([0], axis)
        assert np.array_equal(np.broadcast_to(first, scale.shape), scale), "the scale varies within the sum"
        scale = first
    return scale


def output(x: Operand, w: Operand, bias: np.ndarray | None, geometry: Geometry | None) -> np.ndarray:
    positions = x.codes.shape[1] if geometry is None else math.prod(geometry.output_size)
    inner = (2,) if geometry is None else (1, 2)

    def outer(scale: np.ndarray | None, axes: tuple[int, ...], order: tuple[int, ...] = (0, 1, 2)) -> np.ndarray | None:
        return None if scale is None else _reduced(scale, axes).transpose(order)

    t = dequantize(
        lambda a, b: accumulate_output(a, b, geometry, positions),
        x,
        w,
        outer(x.scale, inner),
        outer(w.scale, (1, 2), (1, 2, 0)),
        outer(x.offset, inner),
        outer(w.offset, (1, 2), (1, 2, 0)),
    )
    return t if bias is None else t + bias


def grad_input(g: Operand, w: Operand, geometry: Geometry | None, x_shape: tuple[int, int, int]) -> np.ndarray:
    inner = (2,) if geometry is None else (1, 2)
    return dequantize(
        lambda a, b: accumulate_grad_input(a, b, geometry, x_shape),
        g,
        w,
        _reduced(g.scale, inner),
        _reduced(w.scale, (0, 1, 2)),
        None if g.offset is None else _reduced(g.offset, inner),
        None if w.offset is None else _reduced(w.offset, (0, 1, 2)),
    )


def grad_weight(g: Operand, x: Operand, geometry: Geometry | None, w_shape: tuple[int, int, int]) -> np.ndarray:
    blocks = "N" in g.q.format.axes
    summed = (1,) if blocks else (0, 1)

    def total(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        by_sample = accumulate_grad_weight(a, b, geometry, w_shape)
        return by_sample if blocks else by_sample.sum(0, keepdims=True)

    def by_output(scale: np.ndarray | None) -> np.ndarray | None:
        return None if scale is None else _reduced(scale, summed).transpose(0, 2, 1)[..., None]

    def whole(scale: np.ndarray | None) -> np.ndarray | None:
        return None if scale is None else _reduced(scale, (0, 1, 2))

    terms_of_samples = dequantize(total, g, x, by_output(g.scale), whole(x.scale), by_output(g.offset), whole(x.offset))
    grad = np.zeros(w_shape, np.float32)
    for term in terms_of_samples:
        grad = grad + term
    return grad
