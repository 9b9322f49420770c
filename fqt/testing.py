"""For tests of kernels, fqt's own and yours: comparisons without tolerance that say where the first differences are."""

from __future__ import annotations

from torch import Tensor

from fqt.qtensor import QTensor, Scales, check
from fqt.reference import unpack

_SHOWN = 10
_SCALES = ("scale", "inverse", "offset", "factor", "index")


def assert_same_codes(actual: QTensor, expected: QTensor) -> None:
    """Raise AssertionError unless two quantized tensors are the same, padding bits included.

    Format and shape, kept groups, every code, every stored byte, every scale and offset must be equal; NaN equals NaN
    and 0.0 equals -0.0. The message counts the codes that differ and shows both at the first ten places (n, p, c).
    """
    assert actual.format == expected.format, f"format {actual.format.name!r}, expected {expected.format.name!r}"
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    check(actual)
    codes, expected_codes = (unpack(q.codes.cpu(), q.format, q.shape) for q in (actual, expected))
    _assert_same("codes", codes, expected_codes)
    names = ("stored codes (only bits that pad the last byte differ)", "scale", "offset", "index")
    for name, one, other in zip(names, actual.tensors(), expected.tensors(), strict=True):
        _assert_same(name, one.cpu(), other.cpu())


def assert_same_scales(actual: Scales, expected: Scales) -> None:
    """Raise AssertionError unless what two calibrations found is the same: scales, inverses, offsets, factors, kept groups.

    As of `assert_same_values`, NaN equals NaN; the message says which of them differs, and where first.
    """
    for name, one, other in zip(_SCALES, actual.tensors(), expected.tensors(), strict=True):
        assert one.dtype == other.dtype, f"{name}: dtype {one.dtype}, expected {other.dtype}"
        _assert_same(name, one.detach().cpu(), other.detach().cpu())


def assert_same_values(actual: Tensor, expected: Tensor) -> None:
    """Raise AssertionError unless two tensors have the same shape, dtype and values; NaN equals NaN, 0.0 equals -0.0.

    What every row of the table of kernels promises of its floats.
    """
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    _assert_same("values", actual.detach().cpu(), expected.detach().cpu())


def _assert_same(what: str, actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    differs = (actual != expected) & ~((actual != actual) & (expected != expected))
    if not bool(differs.any()):
        return
    places = differs.nonzero()
    shown = f"; the first {_SHOWN}:" if len(places) > _SHOWN else ":"
    lines = [f"{what}: {len(places)} of {actual.numel()} differ{shown}"]
    for place in places[:_SHOWN].tolist():
        at = tuple(place)
        lines.append(f"  {at}: {_shown(actual[at])}, expected {_shown(expected[at])}")
    raise AssertionError("\n".join(lines))


def _shown(value: Tensor) -> str:
    number = value.item()
    if not isinstance(number, float):
        return str(number)
    return str(int(number)) if number.is_integer() and abs(number) < 2**53 else f"{number!r} ({number.hex()})"


__all__ = ["assert_same_codes", "assert_same_scales", "assert_same_values"]
