"""Independent models of what fqt specifies, in Python integers, fractions and numpy.

Of fqt they use the fields of Format and Geometry alone. A float32 operation is modelled in float64, exact enough for
the rounding to float32 that follows to be the correct one.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist

import numpy as np

from fqt.formats import Format
from fqt.qtensor import QTensor

ONE = 1 << 24
MASK = 0xFFFFFFFF
FALSE_ALARM = 1e-6  # of one statistical test over all its comparisons, were the seed not fixed


def f32(value: float) -> float:
    """One rounding to float32."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))


# --- Philox 4x32-10, from the paper's text ---------------------------------------------------------------------------


def philox(counter: tuple[int, int, int, int], key: int) -> tuple[int, int, int, int]:
    c0, c1, c2, c3 = counter
    k0, k1 = key & MASK, (key >> 32) & MASK
    for _ in range(10):
        high_0, low_0 = divmod(c0 * 0xD2511F53, 1 << 32)
        high_1, low_1 = divmod(c2 * 0xCD9E8D57, 1 << 32)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


@functools.cache
def _words(block: int, group: int, stream: int, key: int) -> tuple[int, int, int, int]:
    return philox((block, group, stream, 0), key)


def u24(element: int, group: int, stream: int, key: int) -> int:
    """The 24 bits that decide about an element."""
    return _words(element // 4, group, stream, key)[element % 4] >> 8


# --- groups and packed codes, from the table of fqt.formats ----------------------------------------------------------


def group_places(format: Format, shape: tuple[int, int, int]) -> list[list[tuple[int, int, int]]]:
    """For each group, in order, the places (n, p, c) of its elements, in order."""
    n, p, c = (range(size) for size in shape)
    match format.axes:
        case "":
            return [list(itertools.product(n, p, c))]
        case "N" | "O":
            return [[(i, j, k) for j in p for k in c] for i in n]
        case "NP":
            return [[(i, j, k) for k in c] for i in n for j in p]
        case "C":
            return [[(i, j, k) for i in n for j in p] for k in c]
        case "NC":
            return [[(i, j, k) for j in p] for k in c for i in n]
    raise AssertionError(format)


def spread_groups(values: list[float], format: Format, shape: tuple[int, int, int]) -> np.ndarray:
    """A value a group as (N, P, C)."""
    out = np.zeros(shape, np.float32)
    for value, places in zip(values, group_places(format, shape), strict=True):
        for place in places:
            out[place] = value
    return out


def storage(format: Format) -> int:
    return min(s for s in (1, 2, 4, 8, 16, 32) if s >= format.bits)


def stored_integer(code: float, format: Format) -> int:
    """A code as the bits that stand for it."""
    if format.grid == "sign":
        return int(code > 0)
    if format.grid in FLOAT8:
        return float8_byte(code, format.grid)
    return int(code) & (2 ** storage(format) - 1)


def pack(codes: np.ndarray, format: Format) -> np.ndarray:
    """(N, P, C) codes as they are stored: each line one long integer, the first code in its lowest bits."""
    bits = storage(format)
    if format.axes == "C":
        lines = [[codes[:, :, k].reshape(-1)] for k in range(codes.shape[2])]
        lines_shape = (codes.shape[2], 1, codes.shape[0] * codes.shape[1])
    elif format.axes == "NC":
        lines = [[codes[i, :, k] for i in range(codes.shape[0])] for k in range(codes.shape[2])]
        lines_shape = (codes.shape[2], codes.shape[0], codes.shape[1])
    else:
        lines = [[codes[i, j] for j in range(codes.shape[1])] for i in range(codes.shape[0])]
        lines_shape = codes.shape
    line_bytes = -(-lines_shape[2] * bits // 8)
    packed = bytearray()
    for line in itertools.chain.from_iterable(lines):
        whole = sum(stored_integer(code, format) << (bits * i) for i, code in enumerate(line))
        packed += whole.to_bytes(line_bytes, "little")
    dtype = {16: "<i2", 32: "<i4"}.get(bits, "u1")
    return np.frombuffer(bytes(packed), dtype).reshape(*lines_shape[:2], line_bytes * 8 // max(bits, 8))


# --- float8, from the OCP standard -----------------------------------------------------------------------------------

FLOAT8 = {"e4m3": (4, 3, 7), "e5m2": (5, 2, 15)}  # exponent bits, mantissa bits, bias


def float8_value(byte: int, grid: str) -> float:
    """The value of an 8-bit float; NaN and infinities as such."""
    exponent_bits, mantissa_bits, bias = FLOAT8[grid]
    sign = -1.0 if byte >> 7 else 1.0
    exponent, mantissa = (byte >> mantissa_bits) & (2**exponent_bits - 1), byte & (2**mantissa_bits - 1)
    if grid == "e4m3" and byte & 0x7F == 0x7F:
        return math.nan
    if grid == "e5m2" and exponent == 31:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


@functools.cache
def float8_grid(grid: str) -> tuple[float, ...]:
    """The finite values from the smallest to the largest, zero once."""
    return tuple(sorted({float8_value(byte, grid) for byte in range(256) if math.isfinite(float8_value(byte, grid))}))


@functools.cache
def _float8_bytes(grid: str) -> dict[tuple[float, float], int]:
    return {(value, math.copysign(1, value)): byte for byte in range(256) if math.isfinite(value := float8_value(byte, grid))}


def float8_byte(value: float, grid: str) -> int:
    return _float8_bytes(grid)[value, math.copysign(1, value)]


def float8_neighbours(y: float, grid: str) -> tuple[float, float]:
    """The grid's largest value <= y and smallest value >= y, for y within the grid."""
    values = float8_grid(grid)
    return max(v for v in values if v <= y), min(v for v in values if v >= y)


def float8_nearest(y: float, grid: str) -> float:
    """The nearest value, ties to the even mantissa, the sign of zero kept."""
    low, high = float8_neighbours(y, grid)
    down, up = Fraction(y) - Fraction(low), Fraction(high) - Fraction(y)
    if down == up:
        best = low if float8_byte(low, grid) % 2 == 0 else high
    else:
        best = low if down < up else high
    return math.copysign(best, y) if best == 0 else best


# --- quantize --------------------------------------------------------------------------------------------------------


@dataclass
class Model:
    """What quantize should return, unpacked."""

    codes: np.ndarray  # (N, P, C) float64
    scale: list[float]
    offset: list[float] | None
    format: Format

    def check(self, q: QTensor) -> None:
        """Compare codes as stored, scales and offsets with ==."""
        assert q.format == self.format
        np.testing.assert_array_equal(q.codes.numpy(), pack(self.codes, self.format))
        np.testing.assert_array_equal(q.scale.numpy(), np.array(self.scale, np.float32))
        if self.offset is None:
            assert q.offset is None
        else:
            assert q.offset is not None
            np.testing.assert_array_equal(q.offset.numpy(), np.array(self.offset, np.float32))


def round_code(y: float, format: Format, u: int | None) -> float:
    """A scaled value within the range of codes to a code; u: 24 random bits, None = to nearest."""
    if format.grid in FLOAT8:
        if u is None:
            return float8_nearest(y, format.grid)
        low, high = float8_neighbours(y, format.grid)
        part = f32((y - low) / (high - low)) if high > low else 0.0
        return high if u < part * ONE else low
    low = math.floor(y)
    part = y - low if format.bits > 24 else f32(y - low)
    if u is None:
        up = part > 0.5 or (part == 0.5 and low % 2 == 1)
        return float(low + up)
    return float(low + (u < part * ONE))


def quantize(
    x: np.ndarray,
    format: Format,
    calibrate: str,
    limits: tuple[float, float] = (-1.0, 1.0),
    key: int | None = None,
    stream: int = 0,
) -> Model:
    """The whole of fqt.reference.quantize but pruning, for float32 (N, P, C); key: None = to nearest."""
    shape = (x.shape[0], x.shape[1], x.shape[2])
    low_code, high_code = format.code_range
    steps = high_code if low_code < 0 else high_code - low_code
    codes = np.zeros(shape, np.float64)
    scales, offsets = [], []
    for group, places in enumerate(group_places(format, shape)):
        values = [float(x[place]) for place in places]
        scale, inverse, offset = _calibrate(values, format, calibrate, limits, steps)
        scales.append(scale)
        offsets.append(offset)
        if math.isnan(scale):  # stored as bits 0, whatever code that is
            for place in places:
                codes[place] = -1 if format.grid == "sign" else 0
            continue
        for element, (place, value) in enumerate(zip(places, values, strict=True)):
            if format.grid == "sign":
                codes[place] = 1 if value >= 0 else -1
                continue
            shifted = f32(value - offset) if format.offset else value
            y = shifted * inverse if format.bits > 24 else f32(shifted * inverse)
            y = min(max(y, low_code), high_code)
            codes[place] = round_code(y, format, None if key is None else u24(element, group, stream, key))
    return Model(codes, scales, offsets if format.offset else None, format)


def _calibrate(
    values: list[float], format: Format, calibrate: str, limits: tuple[float, float], steps: float
) -> tuple[float, float, float]:
    """Scale, reciprocal and offset of a group."""
    if not values:
        return 0.0, 0.0, 0.0
    nan = any(math.isnan(v) for v in values)
    low_code, _ = format.code_range
    if calibrate == "none":
        low, high = f32(limits[0]), f32(limits[1])
        if format.grid == "fixed":
            scale, inverse = f32(low / low_code), f32(low_code / low)
        else:
            span = high if low_code < 0 else f32(high - low)
            scale, inverse = f32(span / steps), f32(steps / span)
        return (math.nan, 0.0, 0.0) if nan else (scale, inverse, low)
    infinite = any(math.isinf(v) for v in values)
    if nan or infinite:
        return math.nan, 0.0, 0.0
    offset = 0.0
    if calibrate == "minmax":
        offset = min(values)
        span = f32(max(values) - offset)
    elif calibrate == "absmean":
        span, steps = f32(_tree_sum([abs(v) for v in values]) / len(values)), 1.0
    else:
        span = max(abs(v) for v in values)
        if format.offset:
            offset = -span if span >= 2.0**-100 else 0.0
            span = f32(2 * span)
    if math.isinf(span):
        return math.nan, 0.0, 0.0
    if span < 2.0**-100:
        return 0.0, 0.0, offset
    return f32(span / steps), f32(steps / span), offset


def _tree_sum(values: list[float]) -> float:
    """Neighbours added two by two in float64, until one is left."""
    while len(values) > 1:
        values = [a + b for a, b in itertools.zip_longest(values[0::2], values[1::2], fillvalue=0.0)]
    return values[0]


def agp_probabilities(ranges: list[Fraction], b: int) -> list[Fraction]:
    """min(1, c R_i) with c such that they sum to max(1, G/b): water filling in exact fractions."""
    budget = max(Fraction(len(ranges), b), Fraction(1))
    order = sorted((i for i, r in enumerate(ranges) if r > 0), key=lambda i: -ranges[i])
    p = [Fraction(0)] * len(ranges)
    for sure in range(len(order) + 1):
        rest = order[sure:]
        total = sum((ranges[i] for i in rest), Fraction(0))
        left = budget - sure
        if not rest or left * ranges[rest[0]] <= total:
            for i in order[:sure]:
                p[i] = Fraction(1)
            for i in rest:
                p[i] = left * ranges[i] / total
            return p
    raise AssertionError


# --- statistics ------------------------------------------------------------------------------------------------------


def z_limit(comparisons: int, false_alarm: float = FALSE_ALARM) -> float:
    """|z| that one of so many normal comparisons exceeds with probability `false_alarm` (Bonferroni)."""
    return NormalDist().inv_cdf(1 - false_alarm / (2 * comparisons))


def assert_mean(
    total: np.ndarray,
    draws: int,
    mean: np.ndarray,
    variance: np.ndarray,
    *,
    slack: np.ndarray | float = 0.0,
    independent: bool = True,
) -> None:
    """z-test, elementwise, of sums of `draws` independent draws of known mean and variance.

    Each element alone, and if the elements are `independent` their chi-square too; FALSE_ALARM holds for all together.
    slack: what float32's own roundings may add to every draw, the same way each time.
    """
    total, mean, variance, slack = np.broadcast_arrays(*(np.asarray(a, np.float64) for a in (total, mean, variance, slack)))
    total, mean, variance, slack = (a.reshape(-1) for a in (total, mean, variance, slack))
    off = np.maximum(np.abs(total - draws * mean) - draws * slack, 0)
    sure = variance <= 0
    assert (off[sure] <= 1e-9 * draws * np.abs(mean[sure])).all(), "a certain value varies"
    z = off[~sure] / np.sqrt(draws * variance[~sure])
    if z.size == 0:
        return
    worst, limit = int(z.argmax()), z_limit(z.size, FALSE_ALARM / 2)
    assert z[worst] < limit, f"biased: |z| = {z[worst]:.1f} in comparison {worst} of {z.size}, limit {limit:.1f}"
    if independent:  # Wilson and Hilferty: the cube root of a chi-square is nearly normal
        ninth = 2 / (9 * z.size)
        chi = (np.cbrt(np.square(z).mean()) - (1 - ninth)) / math.sqrt(ninth)
        assert chi < z_limit(1, FALSE_ALARM), f"biased: together the comparisons are {chi:.1f} sigma too far off"
