"""The converted layers: one kind a file; importing this package registers them all."""

import importlib
import pkgutil

from fqt.layers.base import (
    ADAPTERS,
    PACKED,
    STATES,
    QuantizedLayer,
    adapter_of,
    converted_class,
    is_subclass,
    plain_class,
    plain_classes,
    quantized_class,
    quantized_layers,
    refusal,
    refuse_frozen,
    register_layer,
)
from fqt.layers.changing import let_recipe_change
from fqt.layers.conv import QuantConv2d
from fqt.layers.linear import QuantLinear

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "ADAPTERS",
    "PACKED",
    "STATES",
    "QuantConv2d",
    "QuantLinear",
    "QuantizedLayer",
    "adapter_of",
    "converted_class",
    "is_subclass",
    "let_recipe_change",
    "plain_class",
    "plain_classes",
    "quantized_class",
    "quantized_layers",
    "refusal",
    "refuse_frozen",
    "register_layer",
]
