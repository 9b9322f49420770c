"""A native kernel against the reference, on a handful of small random cases: what is asked of it before it first serves.

The tests ask far more (tests/fqt/test_kernels.py). This is for the machine that runs it: another processor, compiler or torch.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import torch
from torch.utils._python_dispatch import _disable_current_modes

from fqt import reference
from fqt.formats import Format, Shape3
from fqt.geometry import Geometry
from fqt.qtensor import QTensor
from fqt.reference import norm
from fqt.testing import assert_same_codes, assert_same_values

_QUANTIZE = (
    ("sign", {"calibrate": "none", "pass_range": (-1.0, 1.0)}),
    ("sign:O", {"calibrate": "absmean"}),
    ("uint2", {"calibrate": "none", "limits": (0.0, 1.0), "pass_range": (0.0, 1.0)}),
    ("uint4+:N", {"calibrate": "minmax", "stochastic": True}),
    ("uint4+:N", {"calibrate": "minmax", "stochastic": True, "prune": "bernoulli", "keep_one_in": 2}),
    ("uint4+:C", {"calibrate": "minmax", "stochastic": True}),
    ("uint6+:NC", {"calibrate": "minmax", "stochastic": True}),
    ("int8:N", {"calibrate": "absmax", "stochastic": True}),
    ("fixed14", {"calibrate": "none", "limits": (-2.0, 2.0 - 2.0**-12), "stochastic": True}),
    ("fixed29", {"calibrate": "none", "limits": (-2.0, 2.0 - 2.0**-27), "stochastic": True}),
)
_DECODE = ("sign:O", "ternary", "int4:NC", "uint6+:N", "int8:C", "int13:NP", "fixed21", "fixed29")
_GRADIENTS = ("uint1+:{}", "uint4+:{}", "uint6+:{}", "int8:{}")
_OTHERS = ("sign", "uint2", "int4", "int8", "fixed12")
_PRODUCTS = {
    "output": ((*_OTHERS, "sign:N", "int8:N", "fixed16"), (*_OTHERS, "sign:O", "int8:O", "fixed16")),
    "accumulate": (("sign",), ("sign:O",)),
    "grad_input": ([name.format("N") for name in _GRADIENTS], _OTHERS),
    "grad_weight": ([name.format(axes) for name in _GRADIENTS for axes in ("C", "NC")], _OTHERS),
}
_WINDOW = Geometry(5, 4, (3, 3), (2, 1), (1, 1, 1, 1), (1, 1), 1)

Accepts = Callable[[str, tuple[Format, ...], Geometry | None], bool]
"""Whether the kernel says that it serves: device, formats, geometry."""


def compare(operator: str, function: Callable, accepts: Accepts, device: str = "cpu") -> int:
    """Raise AssertionError unless a kernel equals the reference in every case that it accepts; return how many those are.

    The kernel runs on `device`, the reference on the CPU. Whatever the kernel raises surfaces. Neither torch's generators nor
    its modes have a part in it.
    """
    specification = norm if operator.startswith("norm") else reference
    if operator in _PRODUCTS:
        cases = _product_cases(operator)
    else:
        made = {"quantize": _quantize_cases, "decode": _decode_cases}.get(operator)
        cases = _norm_cases(operator) if made is None else made()
    count = 0
    with _disable_current_modes(), torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
        for formats, geometry, make in cases:
            if not accepts(device, formats, geometry):
                continue
            args, options = make(torch.Generator().manual_seed(count))
            expected = getattr(specification, operator)(*args, **options)
            moved = {name: _moved(value, device) for name, value in options.items()}
            actual = _moved(function(*(_moved(value, device) for value in args), **moved), "cpu")
            try:
                _assert_same(actual, expected)
            except AssertionError as error:
                names = " by ".join(format.name for format in formats)
                raise AssertionError(f"{names}{' under a window' if geometry else ''}: {error}") from None
            count += 1
    return count


def _moved(value, device: str):
    """Tensors, and what holds some, on a device; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _moved(getattr(value, field.name), device) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **fields)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _assert_same(actual, expected) -> None:
    if isinstance(expected, torch.Tensor):
        return assert_same_values(actual, expected)
    if isinstance(expected[0], torch.Tensor):
        for one, other in zip(actual, expected, strict=True):
            assert_same_values(one, other)
        return None
    assert_same_codes(actual[0], expected[0])
    assert (actual[1] is None) == (expected[1] is None), "a mask that is missing, or was not asked for"
    return None if expected[1] is None else assert_same_values(actual[1], expected[1])


def _quantize_cases() -> Iterator:
    for name, options in _QUANTIZE:
        format = Format.parse(name)

        def make(generator: torch.Generator, format=format, options=options):
            x_NPC = torch.randn(5, 19, 37, generator=generator, dtype=torch.float32)
            return (x_NPC, format), {**options, "key": torch.tensor(-77), "stream": 2}

        yield (format,), None, make


def _decode_cases() -> Iterator:
    for format in map(Format.parse, _DECODE):
        yield (format,), None, lambda generator, format=format: ((_coded(format, (5, 19, 37), generator),), {})


def _product_cases(operator: str) -> Iterator:
    for (left, right), geometry in itertools.product(itertools.product(*_PRODUCTS[operator]), (None, _WINDOW)):
        formats = (Format.parse(left), Format.parse(right))

        def make(generator: torch.Generator, formats=formats, geometry=geometry):
            positions, outputs, taps = (20, 12, 9) if geometry else (3, 3, 1)
            x, w, g = (5, positions, 37), (18, taps, 37), (5, outputs, 18)
            first, second = {"output": (x, w), "accumulate": (x, w), "grad_input": (g, w), "grad_weight": (g, x)}[operator]
            operands = (_coded(formats[0], first, generator), _coded(formats[1], second, generator))
            rest = {"output": (None, geometry), "grad_input": (None, geometry, x)}.get(operator, (geometry,))
            return (*operands, *rest), {}

        yield formats, geometry, make


def _norm_cases(operator: str) -> Iterator:
    for codes, kernel in itertools.product((False, True), ((1, 1), (2, 2))):

        def make(generator: torch.Generator, codes=codes, kernel=kernel):
            y_NPC, windows = torch.randn(5, 20, 37, generator=generator, dtype=torch.float32), norm.Windows(4, 5, kernel)
            source = norm.Source((y_NPC * 9).short(), y_NPC[0, 0].contiguous()) if codes else norm.Source(y_NPC)
            affine = torch.randn(4, 37, generator=generator, dtype=torch.float32)
            height, width = windows.pooled_size
            g = torch.randn(5, height * width, 37, generator=generator, dtype=torch.float32)
            return {
                "norm_sums": (source,),
                "norm_value": (source, affine, windows),
                "norm_sign": (source, affine, windows, -1.0, 1.0),
                "norm_grad_sums": (g, None, source, affine, windows),
                "norm_grad": (g, None, source, affine, windows, affine[:2]),
            }[operator], {}

        yield (), None, make


def _coded(format: Format, shape: Shape3, generator: torch.Generator) -> QTensor:
    """Codes of random numbers, as the reference makes them."""
    x_NPC = torch.randn(shape, generator=generator, dtype=torch.float32)
    calibrate = {"sign": "absmean", "int": "absmax"}.get(format.grid, "minmax" if format.offset else "none")
    limits = (0.0, 1.0) if calibrate == "none" and format.grid == "uint" else (-1.0, 1.0)
    return reference.quantize(x_NPC, format, calibrate=calibrate, limits=limits)[0]
