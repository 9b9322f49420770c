"""The converted layers: one kind a file."""

from fqt.layers.base import QuantizedLayer, let_recipe_change, quantized_layers
from fqt.layers.conv import QuantConv2d
from fqt.layers.linear import QuantLinear

__all__ = ["QuantConv2d", "QuantLinear", "QuantizedLayer", "let_recipe_change", "quantized_layers"]
