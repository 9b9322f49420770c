"""Quantizers: how codes are made. One paper, one file; importing this package registers them all."""

from fqt.quantizers import agp, dorefa, fixed_point, float8, psq, ternary, uniform, xnor
from fqt.quantizers.base import QUANTIZERS, Quantizer, build, quantize, register

__all__ = [
    "QUANTIZERS",
    "Quantizer",
    "agp",
    "build",
    "dorefa",
    "fixed_point",
    "float8",
    "psq",
    "quantize",
    "register",
    "ternary",
    "uniform",
    "xnor",
]
