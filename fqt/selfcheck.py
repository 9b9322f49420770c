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
from fqt.testing import assert_same_codes, assert_same_scales, assert_same_values

_SHAPE = (5, 19, 37)
_STRIDE = 5


def compare(row: Kernel, function: Callable) -> int:
    """Raise AssertionError unless a kernel equals the reference in every example of what its row says it serves; return how
    many were compared. With each of the row's settings every `_STRIDE`th example is compared once more.

    The kernel runs on the row's device, the reference on the CPU. Whatever the kernel raises surfaces. Neither torch's
    generators nor its modes and default device have a part in it.
    """
    specification = norm if row.operator in NORM else reference
    count, settings = 0, tuple(row.settings())
    no_autocast = torch.autocast("cpu", enabled=False)
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad(), no_autocast:
        for number, (name, args, options) in enumerate(_cases(row)):
            expected = getattr(specification, row.operator)(*args, **options)
            args, options = moved(args, row.device), {key: moved(value, row.device) for key, value in options.items()}
            for setting in ({}, *(settings if number % _STRIDE == 0 else ())):
                actual = moved(function(*args, **options, **setting), "cpu")
                try:
                    _assert_same(actual, expected)
                except AssertionError as error:
                    where = "".join(f" with {key}={value}" for key, value in setting.items())
                    raise AssertionError(f"{name}{where}: {error}") from None
                count += 1
    return count


def _cases(row: Kernel) -> Iterator[tuple[str, tuple, dict]]:
    """(what is compared, arguments, options) of every case, made one at a time."""
    generator = torch.Generator().manual_seed(0)
    if row.operator in NORM:
        yield from _norm_cases(row.operator, generator)
        return
    coded = functools.cache(functools.partial(_coded, generator=generator))  # many cases share an operand
    for formats, geometry in row.examples():
        name = " by ".join(format.name for format in formats) + (" under a window" if geometry else "")
        if row.operator in LETTERS:
            yield name, _product(row.operator, formats, geometry, coded), {}
        elif row.operator == "decode":
            yield name, (coded(formats[0], _SHAPE),), {}
        else:
            for args, options in _codes_cases(row.operator, formats[0], generator):
                yield name, args, options


def moved(value, device: str):
    """Tensors, and what holds some, on a device; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(moved(part, device) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: moved(getattr(value, field.name), device) for field in dataclasses.fields(value) if field.init}
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
        return assert_same_scales(actual, expected)
    assert_same_codes(actual[0], expected[0])
    assert (actual[1] is None) == (expected[1] is None), "a mask that is missing, or was not asked for"
    return None if expected[1] is None else assert_same_values(actual[1], expected[1])


def _calibrations(format: Format) -> list[dict]:
    """Calibrations that fit a format, the usual one first: keywords of `fqt.reference.calibrate`."""
    if format.grid == "fixed":
        step = 2.0 ** (2 - format.bits)
        return [{"calibrate": "none", "limits": (-2.0, 2.0 - step)}]
    given = {"calibrate": "none", "limits": (0.0, 1.0) if format.grid == "uint" else (-1.0, 1.0)}
    if format.grid in ("sign", "ternary"):
        return [{"calibrate": "absmean"}, given]
    if format.offset:
        return [{"calibrate": "minmax"}]
    return [given] if format.grid == "uint" else [{"calibrate": "absmax"}]


def _codes_cases(operator: str, format: Format, generator: torch.Generator) -> Iterator[tuple[tuple, dict]]:
    """Calibrating, encoding or both: every calibration that fits, and pruning where the format is a gradient's."""
    x_NPC = torch.randn(_SHAPE, generator=generator, dtype=torch.float32)
    drawn = {"key": torch.tensor(-77), "stream": 2}
    stochastic = format.grid != "sign"
    made = [{**calibration, "prune": ""} for calibration in _calibrations(format)]
    if format.offset and format.axes:
        made.append({**made[0], "prune": "bernoulli", "keep_one_in": 2})
    for calibration in made:
        if operator == "calibrate":
            yield (x_NPC, format), {**calibration, **drawn}
        elif operator == "quantize":
            inside = calibration["limits"] if calibration["calibrate"] == "none" else None
            yield (x_NPC, format), {**calibration, **drawn, "stochastic": stochastic, "pass_range": inside}
        else:
            scales = reference.calibrate(x_NPC, format, **calibration, **drawn)
            for key in (drawn["key"], None) if stochastic else (None,):
                yield (x_NPC, scales, format), {"key": key, "stream": 2}


def _product(operator: str, formats: tuple[Format, ...], geometry: Geometry | None, coded: Callable) -> tuple:
    """Arguments of a product."""
    positions, outputs, taps = (20, 12, 9) if geometry else (3, 3, 1)
    shapes = {"x": (5, positions, 37), "w": (18, taps, 37), "g": (5, outputs, 18)}
    operands = [coded(format, shapes[letter]) for format, letter in zip(formats, LETTERS[operator], strict=True)]
    rest = {"output": (None, geometry), "grad_input": (None, geometry, shapes["x"])}.get(operator, (geometry,))
    return (*operands, *rest)


def _norm_cases(operator: str, generator: torch.Generator) -> Iterator[tuple[str, tuple, dict]]:
    for codes, kernel in itertools.product((False, True), ((1, 1), (2, 2))):
        y_NPC, windows = torch.randn(5, 20, 37, generator=generator, dtype=torch.float32), norm.Windows(4, 5, kernel)
        source = norm.Source((y_NPC * 9).short(), y_NPC[0, 0].contiguous()) if codes else norm.Source(y_NPC)
        affine = torch.randn(4, 37, generator=generator, dtype=torch.float32)
        height, width = windows.pooled_size
        g = torch.randn(5, height * width, 37, generator=generator, dtype=torch.float32)
        args = {
            "norm_sums": (source,),
            "norm_value": (source, affine, windows),
            "norm_sign": (source, affine, windows, -1.0, 1.0),
            "norm_grad_sums": (g, None, source, affine, windows),
            "norm_grad": (g, None, source, affine, windows, affine[:2]),
        }[operator]
        yield f"{'int16' if codes else 'float32'} under a window of {kernel}", args, {}


def _coded(format: Format, shape: Shape3, generator: torch.Generator) -> QTensor:
    """Codes of random numbers, as the reference makes them."""
    x_NPC = torch.randn(shape, generator=generator, dtype=torch.float32)
    return reference.quantize(x_NPC, format, **_calibrations(format)[0])[0]
