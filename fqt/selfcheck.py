"""A native kernel against the reference, on a handful of small random cases: what is asked of it before it first serves.

The tests ask far more (tests/fqt/test_kernels.py). This is for the machine that runs it: another processor, compiler or torch.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch.utils._python_dispatch import _disable_current_modes

from fqt import reference
from fqt.formats import Format, Shape3
from fqt.geometry import Geometry
from fqt.qtensor import QTensor, Scales
from fqt.reference import norm
from fqt.reference.rows import NORM
from fqt.rows import LETTERS, Kernel
from fqt.testing import assert_same_codes, assert_same_values

_CASES = 24  # of a row


def compare(row: Kernel, function: Callable) -> int:
    """Raise AssertionError unless a kernel equals the reference in cases of everything that its row says it serves; return how
    many those are.

    The kernel runs on the row's device, the reference on the CPU. Whatever the kernel raises surfaces. Neither torch's
    generators nor its modes have a part in it.
    """
    specification = norm if row.operator in NORM else reference
    count = 0
    with _disable_current_modes(), torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
        for name, make in _cases(row):
            args, options = make(torch.Generator().manual_seed(count))
            expected = getattr(specification, row.operator)(*args, **options)
            moved = {key: _moved(value, row.device) for key, value in options.items()}
            actual = _moved(function(*(_moved(value, row.device) for value in args), **moved), "cpu")
            try:
                _assert_same(actual, expected)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
            count += 1
    return count


def _cases(row: Kernel) -> Iterator[tuple[str, Callable]]:
    """(what is compared, function of a generator that makes arguments and options)."""
    if row.operator in NORM:
        yield from (("norm", make) for make in _norm_cases(row.operator))
        return
    for formats, geometry in row.examples(_CASES):
        name = " by ".join(format.name for format in formats) + (" under a window" if geometry else "")
        if row.operator in LETTERS:
            yield name, functools.partial(_product_case, row.operator, formats, geometry)
        elif row.operator == "decode":
            yield name, lambda generator, format=formats[0]: ((_coded(format, _SHAPE, generator),), {})
        else:
            for stochastic, prune in ((False, ""), (True, ""), (True, "bernoulli")):
                if (prune == "" or formats[0].axes) and not (stochastic and formats[0].grid == "sign"):
                    yield name, functools.partial(_codes_case, row.operator, formats[0], stochastic, prune)


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
    if isinstance(expected, tuple) and isinstance(expected[0], torch.Tensor):
        for one, other in zip(actual, expected, strict=True):
            assert_same_values(one, other)
        return None
    if isinstance(expected, Scales):
        for one, other in zip(actual.tensors(), expected.tensors(), strict=True):
            assert_same_values(one, other)
        return None
    assert_same_codes(actual[0], expected[0])
    assert (actual[1] is None) == (expected[1] is None), "a mask that is missing, or was not asked for"
    return None if expected[1] is None else assert_same_values(actual[1], expected[1])


_SHAPE = (5, 19, 37)


def calibration(format: Format) -> dict:
    """A calibration that fits a format: keywords of `fqt.reference.calibrate`."""
    if format.grid in ("sign", "ternary"):
        return {"calibrate": "absmean"}
    if format.grid == "fixed" or (format.grid == "uint" and not format.offset):
        return {"calibrate": "none", "limits": (-2.0, 1.9375) if format.grid == "fixed" else (0.0, 1.0)}
    return {"calibrate": "minmax" if format.offset else "absmax"}


def _codes_case(operator: str, format: Format, stochastic: bool, prune: str, generator: torch.Generator) -> tuple[tuple, dict]:
    x_NPC = torch.randn(_SHAPE, generator=generator, dtype=torch.float32)
    drawn = {"key": torch.tensor(-77), "stream": 2}
    made = {**calibration(format), "prune": prune, "keep_one_in": 2 if prune else 1}
    if operator == "calibrate":
        return (x_NPC, format), {**made, **drawn}
    if operator == "quantize":
        inside = (-1.0, 1.0) if format.grid in ("sign", "uint") else None
        return (x_NPC, format), {**made, **drawn, "stochastic": stochastic, "pass_range": inside}
    scales = reference.calibrate(x_NPC, format, **made, **drawn)
    return (x_NPC, scales, format), {"key": drawn["key"] if stochastic else None, "stream": 2}


def _product_case(
    operator: str, formats: tuple[Format, ...], geometry: Geometry | None, generator: torch.Generator
) -> tuple[tuple, dict]:
    positions, outputs, taps = (20, 12, 9) if geometry else (3, 3, 1)
    shapes = {"x": (5, positions, 37), "w": (18, taps, 37), "g": (5, outputs, 18)}
    operands = [_coded(f, shapes[letter], generator) for f, letter in zip(formats, LETTERS[operator], strict=True)]
    rest = {"output": (None, geometry), "grad_input": (None, geometry, shapes["x"])}.get(operator, (geometry,))
    return (*operands, *rest), {}


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

        yield make


def _coded(format: Format, shape: Shape3, generator: torch.Generator) -> QTensor:
    """Codes of random numbers, as the reference makes them."""
    x_NPC = torch.randn(shape, generator=generator, dtype=torch.float32)
    return reference.quantize(x_NPC, format, **calibration(format))[0]
