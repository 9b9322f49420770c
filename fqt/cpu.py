"""The CPU backend: the C++ kernels of fqt/csrc behind the signatures of the reference.

The extension is optional: where it was not built every row refuses with the reason, and the reference serves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fqt.formats import FLOAT8_MAX, Format, Shape3
from fqt.geometry import Geometry
from fqt.native import refuse_truncated
from fqt.norm import Source, Windows
from fqt.qtensor import QTensor, codes_dtype
from fqt.reference import spread

_LIBRARY = Path(__file__).parent / "_cpu.so"
_BIT = Format("sign", 1)
_FEWEST_ZERO_ROWS = 4
_MOST_WEIGHT_BITS = 30  # of more, columns are taken apart (kFewTerms in integers.h), which grad_weight does not do
_large: float = 1 << 20  # bytes from which page faults are felt

BUILD = "python setup.py build_ext --inplace"
_NOT_BUILT = f"the C++ kernels are not built: {BUILD}"


@functools.cache
def _exists(library: Path) -> bool:
    """Asked with every call: looked up once."""
    return library.exists()


def refuses_codes(formats: tuple[Format, ...]) -> str | None:
    """Why `quantize` or `decode` cannot serve a request, or None."""
    if not _exists(_LIBRARY):
        return _NOT_BUILT
    (format,) = formats
    if format.grid in FLOAT8_MAX:
        return "codes of 8-bit floats are not vectorized"
    return None


def refuses_output(formats: tuple[Format, ...], geometry: Geometry | None) -> str | None:
    """Why `output` cannot serve a request, or None."""
    if not _exists(_LIBRARY):
        return _NOT_BUILT
    x, w = formats
    if x.grid != "sign" or w.grid != "sign":
        return f"the kernel multiplies signs by signs, not {x.name} by {w.name}"
    if x.axes not in _leaving(geometry) or w.axes not in ("", "O"):
        return f"scales {x.axes!r} of x and {w.axes!r} of w vary along the summed axes"
    return None


def refuses_grad_input(formats: tuple[Format, ...], geometry: Geometry | None) -> str | None:
    """Why `grad_input` cannot serve a request, or None."""
    g, w = formats
    return _refuses_gradient(g, w, (*_leaving(geometry),))


def refuses_grad_weight(formats: tuple[Format, ...]) -> str | None:
    """Why `grad_weight` cannot serve a request, or None."""
    g, x = formats
    return _refuses_gradient(g, x, ("", "N", "C", "NC"))


def refuses_norm() -> str | None:
    """Why the operators of `fqt.norm` cannot be served, or None."""
    return None if _exists(_LIBRARY) else _NOT_BUILT


def _leaving(geometry: Geometry | None) -> tuple[str, ...]:
    """The axes of scales that leave `output` and `grad_input`: a convolution's window mixes positions."""
    return ("", "N", "NP") if geometry is None else ("", "N")


def _refuses_gradient(g: Format, other: Format, axes: tuple[str, ...]) -> str | None:
    if not _exists(_LIBRARY):
        return _NOT_BUILT
    if g.grid != "uint" or g.bits > 8 or other.grid != "sign":
        return f"the kernel multiplies unsigned codes of 1 to 8 bits by signs, not {g.name} by {other.name}"
    if g.axes not in axes or other.axes:
        return f"scales {g.axes!r} of g and {other.axes!r} of the other operand vary along the summed axes"
    return None


def refuses_integers(operator: str, formats: tuple[Format, ...], geometry: Geometry | None, bits: int) -> str | None:
    """Why a product of integers of at most `bits` bits, 8 or 16, cannot serve a request, or None."""
    if not _exists(_LIBRARY):
        return _NOT_BUILT
    a, b = formats
    for format in formats:
        if format.bits > bits or format.grid in FLOAT8_MAX:
            return f"the kernel multiplies integers of at most {bits} bits, not {a.name} by {b.name}"
        if format.grid == "uint" and format.bits > 8:
            return f"the kernel multiplies 9 to 16 bits in two's complement, not {a.name} by {b.name}"
    if bits > 8 and max(a.bits, b.bits) <= 8:
        return f"the kernel is for words of 9 to {bits} bits, not {a.name} by {b.name}"
    if operator == "grad_weight" and a.bits + b.bits > _MOST_WEIGHT_BITS:
        return f"sums of {a.name} by {b.name} overflow 32 bits at once: {_MOST_WEIGHT_BITS} bits in both together"
    a_axes = ("", "N", "C", "NC") if operator == "grad_weight" else _leaving(geometry)
    if a.axes not in a_axes or b.axes not in (("", "O") if operator == "output" else ("",)):
        left, right = {"output": "xw", "grad_input": "gw", "grad_weight": "gx"}[operator]
        return f"scales {a.axes!r} of {left} and {b.axes!r} of {right} vary along the summed axes"
    return None


@functools.cache
def operators():
    """The extension's own operators. OSError where the file is no library that this torch can load."""
    refuse_truncated(_LIBRARY)
    torch.ops.load_library(_LIBRARY)
    return torch.ops.fqt_cpu


def quantize(
    x_NPC: Tensor,
    format: Format,
    *,
    calibrate: str,
    limits: tuple[float, float] = (-1.0, 1.0),
    stochastic: bool = False,
    prune: str = "",
    keep_one_in: int = 1,
    fold: Tensor | None = None,
    key: Tensor | None = None,
    stream: int = 0,
    pass_range: tuple[float, float] | None = None,
    ranges: tuple[Tensor, Tensor] | None = None,
) -> tuple[QTensor, Tensor | None]:
    """As `fqt.reference.quantize`."""
    shape = (x_NPC.shape[0], x_NPC.shape[1], x_NPC.shape[2])
    groups = format.groups(shape)
    codes = torch.empty(format.packed_shape(shape), dtype=codes_dtype(format))
    scale = torch.empty(groups, dtype=torch.float32)
    offset = torch.empty(groups, dtype=torch.float32) if format.offset else None
    index = torch.empty(groups, dtype=torch.int32) if prune else None
    mask = None if pass_range is None else torch.empty(_BIT.packed_shape(shape), dtype=torch.uint8)
    low, high = (v.contiguous() for v in ranges) if ranges else (None, None)
    operators().quantize(
        x_NPC if x_NPC.dtype in (torch.float32, torch.bfloat16) else x_NPC.float(),
        None if fold is None else fold.float().expand(shape),
        key, low, high, format.grid, format.bits, format.axes, calibrate, *limits, stochastic, prune, keep_one_in, stream,
        *(pass_range or (0.0, 0.0)), codes, scale, offset, index, mask,
    )  # fmt: skip
    return QTensor(codes, scale, offset, index, format, shape), mask


def decode(q: QTensor) -> Tensor:
    """As `fqt.reference.decode`."""
    values = _empty(*q.shape)
    offset = None if q.offset is None else q.offset.contiguous()
    operators().decode(*_coded(q), q.format.axes, q.scale.contiguous(), offset, values)
    return values


def output(x: QTensor, w: QTensor, bias: Tensor | None, geometry: Geometry | None) -> Tensor:
    """As `fqt.reference.output`, of signs: xor and popcount."""
    n, positions, _ = x.shape
    geometry = geometry or _column(positions)
    height, width = geometry.output_size
    y = _empty(n, height * width, w.shape[0])
    operators().sign_output(
        x.codes.contiguous(),
        spread(x.scale, x)[:, :, 0],
        w.codes.contiguous(),
        spread(w.scale, w)[:, :, 0],
        None if bias is None else bias.float().contiguous(),
        [n, x.shape[2], w.shape[0], *geometry.flat()],
        y,
    )
    return y


def accumulate(x: QTensor, w: QTensor, geometry: Geometry | None) -> Tensor:
    """As `fqt.reference.accumulate`, of signs."""
    n, positions, _ = x.shape
    geometry = geometry or _column(positions)
    height, width = geometry.output_size
    sums = _empty(n, height * width, w.shape[0], dtype=torch.int16)
    sizes = [n, x.shape[2], w.shape[0], *geometry.flat()]
    operators().sign_accumulate(x.codes.contiguous(), w.codes.contiguous(), sizes, sums)
    return sums


def grad_input(g: QTensor, w: QTensor, mask: Tensor | None, geometry: Geometry | None, x_shape: Shape3) -> Tensor:
    """As `fqt.reference.grad_input`, of unsigned codes and signs: subset sums looked up by four weights."""
    n, _, channels = x_shape
    samples = torch.arange(n, dtype=torch.int32)
    grad = _empty(*x_shape)
    if g.index is not None and g.format.axes == "N":
        samples = g.index[g.index >= 0]
        grad.zero_()
    operators().sign_grad_input(
        g.codes.contiguous(),
        g.format.bits,
        spread(g.scale, g)[:, :, 0],
        None if g.offset is None else spread(g.offset, g)[:, :, 0],
        samples,
        w.codes.contiguous(),
        w.scale,
        None if mask is None else mask.contiguous(),
        [n, channels, w.shape[0], *(geometry or _column(x_shape[1])).flat()],
        grad,
    )
    return grad


def grad_weight(g: QTensor, x: QTensor, geometry: Geometry | None) -> Tensor:
    """As `fqt.reference.grad_weight`, of unsigned codes and signs: subset sums looked up by the signs of four positions."""
    n, positions, out = g.shape
    groups = geometry.groups if geometry else 1
    taps = geometry.kernel[0] * geometry.kernel[1] if geometry else 1
    grad = _empty(out, taps, x.shape[2] // groups).zero_()
    samples, channels = torch.arange(n, dtype=torch.int32), torch.arange(out, dtype=torch.int32)
    scale, offset = (None if v is None else spread(v, g)[:, 0] for v in (g.scale, g.offset))
    assert scale is not None
    if g.index is not None and g.format.axes in ("N", "C"):
        kept = g.index[g.index >= 0]
        if g.format.axes == "N":
            samples = kept
        else:
            channels = kept
            if groups > 1:  # as the reference, which multiplies these by scale 0: NaN where x's scale is
                grad += 0.0 * x.scale
    operators().sign_grad_weight(
        g.codes.contiguous(), g.format.bits, g.format.axes, scale, offset, samples, channels, x.codes.contiguous(), x.scale,
        [n, x.shape[2], out, *(geometry or _column(positions)).flat()], grad,
    )  # fmt: skip
    return grad


def norm_sums(source: Source) -> Tensor:
    """As `fqt.norm.norm_sums`."""
    sums = torch.empty(2, source.y.shape[2], dtype=torch.float64)
    operators().norm_sums(*source.tensors(), sums)
    return sums


def norm_value(source: Source, affine: Tensor, windows: Windows) -> Tensor:
    """As `fqt.norm.norm_value`."""
    height, width = windows.pooled_size
    z = _empty(source.y.shape[0], height * width, source.y.shape[2])
    operators().norm_value(*source.tensors(), affine, windows.flat(), z)
    return z


def norm_sign(source: Source, affine: Tensor, windows: Windows, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `fqt.norm.norm_sign`."""
    height, width = windows.pooled_size
    codes, mask = torch.empty(2, source.y.shape[0], height * width, -(-source.y.shape[2] // 8), dtype=torch.uint8)
    if operators().norm_sign(*source.tensors(), affine, windows.flat(), low, high, codes, mask):
        return codes.zero_(), mask, torch.full((1,), torch.nan, dtype=torch.float32)
    return codes, mask, torch.ones(1, dtype=torch.float32)


def norm_grad_sums(g: Tensor, kept: Tensor | None, source: Source, affine: Tensor, windows: Windows) -> Tensor:
    """As `fqt.norm.norm_grad_sums`."""
    sums = torch.empty(2, g.shape[2], dtype=torch.float64)
    operators().norm_grad_sums(g, kept, *source.tensors(), affine, windows.flat(), sums)
    return sums


def norm_grad(
    g: Tensor, kept: Tensor | None, source: Source, affine: Tensor, windows: Windows, means: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fqt.norm.norm_grad`."""
    dy = _empty(*source.y.shape)
    low, high = torch.empty(2, source.y.shape[0], source.y.shape[2], dtype=torch.float32)
    operators().norm_grad(g, kept, *source.tensors(), affine, windows.flat(), means, dy, low, high)
    return dy, low, high


@contextmanager
def fresh_memory() -> Iterator[None]:
    """Within the block every tensor is new memory from torch."""
    global _large
    before, _large = _large, math.inf
    try:
        yield
    finally:
        _large = before


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """As torch.empty; large tensors are made of memory that was used before, whose pages the system need not bring in again."""
    if math.prod(shape) * dtype.itemsize < _large:
        return torch.empty(shape, dtype=dtype)
    return operators().empty(shape, dtype)


def output_integers(x: QTensor, w: QTensor, bias: Tensor | None, geometry: Geometry | None) -> Tensor:
    """As `fqt.reference.output`, of any integers of at most 8 bits, or 16 in two's complement."""
    n, positions, channels = x.shape
    height, width = geometry.output_size if geometry else (positions, 1)
    busy = busy_rows(w, geometry)
    if busy is not None and x.offset is None:
        part = output_integers(x, _rows(w, busy), None if bias is None else bias[busy], geometry)
        zero = 0.0 * spread(x.scale, x) * spread(w.scale, w).permute(1, 2, 0)  # NaN where the reference's is
        y = (zero if bias is None else zero + bias.float()).expand(n, height * width, w.shape[0])
        return y.contiguous().index_copy_(2, busy, part)
    y = _empty(n, height * width, w.shape[0])
    sizes = [n, channels, w.shape[0], *(geometry or _column(positions)).flat()]
    bias = None if bias is None else bias.float().contiguous()
    operators().integer_gather(*_coded(x), *_by_row(x), *_coded(w), *_by_row(w), bias, None, None, sizes, True, y)
    return y


def grad_input_integers(g: QTensor, w: QTensor, mask: Tensor | None, geometry: Geometry | None, x_shape: Shape3) -> Tensor:
    """As `fqt.reference.grad_input`, of the integers of `output_integers`."""
    n, positions, channels = x_shape
    busy = busy_rows(w, geometry) if g.format.storage_bits >= 8 and "C" not in g.format.axes else None
    if busy is not None:
        short = (g.shape[0], g.shape[1], busy.numel())
        g, w = replace(g, codes=g.codes[..., busy], shape=short), _rows(w, busy)
    kept, grad = None, _empty(*x_shape)
    if g.index is not None and g.format.axes == "N":
        kept = g.index[g.index >= 0]
        grad.zero_()
    sizes = [n, channels, w.shape[0], *(geometry or _column(positions)).flat()]
    mask = None if mask is None else mask.contiguous()
    operators().integer_gather(*_coded(g), *_by_row(g), *_coded(w), *_by_row(w), None, mask, kept, sizes, False, grad)
    return grad


def grad_weight_integers(g: QTensor, x: QTensor, geometry: Geometry | None) -> Tensor:
    """As `fqt.reference.grad_weight`, of the integers of `output_integers`, of at most 30 bits in both operands together."""
    n, positions, out = g.shape
    geometry = geometry or _column(positions)
    grad = _empty(out, geometry.kernel[0] * geometry.kernel[1], x.shape[2] // geometry.groups)
    samples, channels = None, torch.arange(out, dtype=torch.int32)
    if g.index is not None and g.format.axes == "N":
        samples = g.index[g.index >= 0]
    elif g.index is not None and g.format.axes == "C" and geometry.groups == 1:
        channels = g.index[g.index >= 0]
        grad.zero_()
    scale, offset = (None if v is None else spread(v, g)[:, 0] for v in (g.scale, g.offset))
    operators().integer_grad_weight(
        *_coded(g), g.format.axes, scale, offset, samples, channels, *_coded(x), x.scale, x.offset,
        [n, x.shape[2], out, *geometry.flat()], grad,
    )  # fmt: skip
    return grad


def busy_rows(w: QTensor, geometry: Geometry | None) -> Tensor | None:
    """The output channels whose weights are not all zero, (O',) int64, where `output` and `grad_input` leave the others out.

    None where they do not: fewer than one channel in `_FEWEST_ZERO_ROWS` is zero, since leaving out costs a copy of the result;
    or all are; or codes that are zero do not mean the value 0; or channels come in groups.
    """
    if w.format.grid not in ("int", "fixed", "ternary") or (geometry is not None and geometry.groups > 1):
        return None
    busy = w.codes.flatten(1).view(torch.uint8).any(1).nonzero()[:, 0]  # of bytes: torch has a fast loop for them
    zero = w.shape[0] - busy.numel()
    return busy if busy.numel() and zero * _FEWEST_ZERO_ROWS >= w.shape[0] else None


def _rows(w: QTensor, rows: Tensor) -> QTensor:
    scale = w.scale[rows] if w.format.axes == "O" else w.scale
    return replace(w, codes=w.codes[rows], scale=scale, shape=(rows.numel(), *w.shape[1:]))


def _coded(q: QTensor) -> tuple[Tensor, str, int]:
    return q.codes.contiguous(), q.format.grid, q.format.bits


def _by_row(q: QTensor) -> tuple[Tensor | None, ...]:
    """Scale and offset by the first two axes, either of which may be 1."""
    return tuple(None if v is None else spread(v, q)[:, :, 0] for v in (q.scale, q.offset))


def _column(positions: int) -> Geometry:
    """A linear layer as a convolution: a 1x1 window over a column of positions."""
    return Geometry(positions, 1, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
