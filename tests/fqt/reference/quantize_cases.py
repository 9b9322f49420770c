"""What tests of quantizing and of packing share: formats and how a tensor is quantized by the reference."""

import torch

from fqt import reference
from fqt.formats import Format
from fqt.qtensor import check

AXES = ["", "N", "O", "NP", "C", "NC"]
SHAPE = (3, 4, 7)
KEY = -0x0FEDCBA987654321


def limits_of(format: Format, step: float = 1.0) -> tuple[float, float]:
    """Of calibrate="none", so that neighbouring codes are `step` apart."""
    low, high = format.code_range
    if format.grid == "fixed":
        return low * step, max(high, 0.5) * step
    if format.grid == "uint" and format.offset:
        return -2 * step, (high - 2) * step
    return (0.0 if format.grid == "uint" else -high * step), high * step


def formats() -> list[tuple[str, str]]:
    """(format without axes, calibrate), every combination that Quantizer allows."""
    found = [("sign", "absmax"), ("sign", "absmean"), ("sign", "none"), ("ternary", "absmean"), ("ternary", "absmax")]
    found += [("ternary", "none")]
    for grid in ("e4m3", "e5m2", *(f"int{bits}" for bits in range(2, 17))):
        found += [(grid, "absmax"), (grid, "none")]
    for bits in range(1, 17):
        found += [
            (f"uint{bits}+", "minmax"),
            (f"uint{bits}+", "absmax"),
            (f"uint{bits}+", "none"),
            (f"uint{bits}", "none"),
        ]
    return found + [(f"fixed{bits}", "none") for bits in range(1, 33)]


def quantized(x: torch.Tensor, format: Format, calibrate: str, stochastic: bool = False, **options):
    options.setdefault("limits", limits_of(format))
    key = torch.tensor(KEY) if stochastic else None
    q, _ = reference.quantize(x, format, calibrate=calibrate, stochastic=stochastic, key=key, stream=6, **options)
    check(q)
    return q


def calibration_of(name: str) -> str:
    return {"sign": "absmean", "tern": "absmean", "uint": "minmax"}.get(name[:4], "absmax")
