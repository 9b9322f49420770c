"""Products of formats with blocks against straight loops over single codes, bit for bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fqt import reference
from fqt.formats import Format
from fqt.geometry import Geometry
from fqt.qtensor import QTensor
from fqt.reference.packing import spread, unpack

GEOMETRIES = [
    None,
    Geometry(4, 3, (3, 2), (1, 1), (1, 0, 1, 1), (1, 1), 1),
    Geometry(5, 4, (2, 2), (2, 1), (0, 1, 0, 0), (1, 2), 2),
    Geometry(3, 3, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
]
F = np.float32


def shapes(geometry: Geometry | None) -> tuple[tuple[int, int, int], ...]:
    """x, w and g."""
    if geometry is None:
        return (3, 4, 10), (6, 1, 10), (3, 4, 6)
    height, width = geometry.output_size
    taps, groups = geometry.kernel[0] * geometry.kernel[1], geometry.groups
    return (2, geometry.height * geometry.width, 10), (6, taps, 10 // groups), (2, height * width, 6)


def met(geometry: Geometry | None, position: int, tap: int) -> int | None:
    """The position of the input that one of the output meets under a tap."""
    if geometry is None:
        return position
    _, width = geometry.output_size
    y = position // width * geometry.stride[0] - geometry.padding[0] + tap // geometry.kernel[1] * geometry.dilation[0]
    x = position % width * geometry.stride[1] - geometry.padding[2] + tap % geometry.kernel[1] * geometry.dilation[1]
    return y * geometry.width + x if 0 <= y < geometry.height and 0 <= x < geometry.width else None


class Loose:
    """Codes, scales, offsets and group numbers, element by element."""

    def __init__(self, q: QTensor) -> None:
        self.codes = unpack(q.codes, q.format, q.shape).double().numpy()
        self.scale = spread(q.scale, q).expand(q.shape).numpy()
        self.offset = None if q.offset is None else spread(q.offset, q).expand(q.shape).numpy()
        self.group = spread(torch.arange(float(q.scale.numel())), q).expand(q.shape).numpy()


def total(terms: list[tuple]) -> np.float32:
    """The sum of terms ((a, place in a) or None, (b, place in b) or None, cut before it)."""
    result = F(0)
    for _, piece in itertools.groupby(terms, key=lambda term: term[2]):
        found = [(a, b) for a, b, _ in piece if a is not None and b is not None]
        if not found:
            continue
        (a, i), (b, j) = found[0]
        t = F(F(F(sum(a.codes[p] * b.codes[q] for (_, p), (_, q) in found)) * a.scale[i]) * b.scale[j])
        if b.offset is not None:
            t = F(t + F(F(F(sum(a.codes[p] for (_, p), _ in found)) * a.scale[i]) * b.offset[j]))
        if a.offset is not None:
            t = F(t + F(F(F(sum(b.codes[q] for _, (_, q) in found)) * b.scale[j]) * a.offset[i]))
            if b.offset is not None:
                t = F(t + F(F(F(len(found)) * a.offset[i]) * b.offset[j]))
        result = F(result + t)
    return result


FORMATS = {
    "output": [
        ("int4:NP/4", "int4:OK/4"),
        ("uint4+:NP/4", "int6:OK/3"),
        ("uint3+:NP/3", "uint4+:OK/5"),
        ("int8:N", "int4:OK/4"),
    ],
    "grad_input": [("int4:NP/4", "int4:KI/4"), ("uint4+:NP/5", "int8:KI/2"), ("uint4+:N", "int8:KI/4")],
    "grad_weight": [("int4:C/4", "int4:C/4"), ("uint4+:C/5", "uint2+:C/3"), ("uint4+:NC", "int8:C/4")],
}


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=["linear", "window", "groups", "1x1"])
@pytest.mark.parametrize(("operator", "names"), [(o, names) for o, pairs in FORMATS.items() for names in pairs], ids=str)
def test_blocks_are_added_up_and_scaled_one_after_the_other(operator, names, geometry):
    generator = torch.Generator().manual_seed(3)
    x_shape, w_shape, g_shape = shapes(geometry)
    left, right = {"output": (x_shape, w_shape), "grad_input": (g_shape, w_shape), "grad_weight": (g_shape, x_shape)}[operator]
    quantized = []
    for name, shape in zip(names, (left, right), strict=True):
        format = Format.parse(name)
        options = {"calibrate": "minmax" if format.offset else "absmax"}
        quantized.append(reference.quantize(torch.randn(shape, generator=generator), format, **options)[0])
    a, b = map(Loose, quantized)
    groups = 1 if geometry is None else geometry.groups
    taps, n, c = w_shape[1], x_shape[0], x_shape[2]
    out, inner = w_shape[0] // groups, c // groups
    if operator == "output":
        actual = reference.output(*quantized, None, geometry)
        expected = np.zeros(g_shape, dtype=F)
        for i, q, o in np.ndindex(g_shape):
            terms = []
            for k, ch in itertools.product(range(taps), range(inner)):
                at, channel = met(geometry, q, k), o // out * inner + ch
                cut = (k, *(side.group[place] for side, place in ((a, (0, 0, channel)), (b, (o, k, ch)))))
                terms.append((None if at is None else (a, (i, at, channel)), (b, (o, k, ch)), cut))
            expected[i, q, o] = total(terms)
    elif operator == "grad_input":
        actual = reference.grad_input(*quantized, None, geometry, x_shape)
        expected = np.zeros(x_shape, dtype=F)
        way = {(met(geometry, q, k), k): q for q in range(g_shape[1]) for k in range(taps)}
        for i, at, channel in np.ndindex(x_shape):
            terms = []
            for k, o in itertools.product(range(taps), range(out)):
                q, row = way.get((at, k)), channel // inner * out + o
                cut = (k, a.group[0, 0, row], b.group[row, k, channel % inner])
                terms.append((None if q is None else (a, (i, q, row)), (b, (row, k, channel % inner)), cut))
            expected[i, at, channel] = total(terms)
    else:
        actual = reference.grad_weight(*quantized, geometry)
        expected = np.zeros(w_shape, dtype=F)
        for o, k, ch in np.ndindex(w_shape):
            terms = []
            for i, q in itertools.product(range(n), range(g_shape[1])):
                at, channel = met(geometry, q, k), o // out * inner + ch
                cut = (a.group[i, q, o], -1.0 if at is None else b.group[i, at, channel])
                terms.append(((a, (i, q, o)), None if at is None else (b, (i, at, channel)), cut))
            expected[o, k, ch] = total(terms)
    np.testing.assert_array_equal(actual.numpy(), expected)


def test_a_block_as_large_as_all_is_no_block():
    generator = torch.Generator().manual_seed(1)
    x, w = torch.randn(3, 2, 16, generator=generator), torch.randn(5, 1, 16, generator=generator)
    plain = [reference.quantize(t, Format("int", 8, axes), calibrate="absmax")[0] for t, axes in ((x, "NP"), (w, "O"))]
    whole = [
        reference.quantize(t, Format("int", 8, axes, block=16), calibrate="absmax")[0] for t, axes in ((x, "NP"), (w, "OK"))
    ]
    assert torch.equal(plain[0].codes, whole[0].codes) and torch.equal(plain[0].scale, whole[0].scale)
    assert torch.equal(reference.output(*plain, None, None), reference.output(*whole, None, None))


@pytest.mark.parametrize("name", ["int8:NP/32", "uint4+:C/32", "sign:/7", "int4:KI/3", "fixed12:N/5"])
def test_a_last_block_that_is_shorter_packs_and_comes_back(name):
    format = Format.parse(name)
    x = torch.randn(5, 3, 37)
    options = {"calibrate": {"sign": "absmean", "fixed": "none"}.get(format.grid, "minmax" if format.offset else "absmax")}
    q, _ = reference.quantize(x, format, **options)
    assert tuple(q.codes.shape) == format.packed_shape(q.shape) and q.scale.shape == (format.groups(q.shape),)
    step = spread(q.scale, q).expand(q.shape)
    if format.grid in ("int", "uint"):
        assert bool(((reference.decode(q) - x).abs() <= 0.5001 * step).all())
