"""Quantizers: how codes are made. One paper, one file; importing this package registers them all."""

import importlib
import pkgutil

from fqt.quantizers.base import QUANTIZERS, Quantizer, build, quantize, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["QUANTIZERS", "Quantizer", "build", "quantize", "register"]
