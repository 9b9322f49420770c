"""ONNX: a frozen model as standard operators, compared with the model by onnxruntime before the file is kept.

A weight is an initializer of its codes, 4-bit where these fit (2-bit from opset 25 on, which added the type), else 8-bit, behind a
DequantizeLinear. Activations are encoded by the quantizer's own arithmetic: ranges by sample or token are found at run time, and
sign(0) is +1. `multiply` says how a product is made:

    "float"     MatMul or Conv of the codes as floats, exact while float32 holds the sums, then the scales: the smallest files
    "integer"   MatMulInteger or ConvInteger of 8-bit codes, then the scales: exact; a byte a weight
    "nbits"     onnxruntime's own MatMulNBits for linear layers, weights of 2, 4 or 8 bits; convolutions as "float"
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fqt.export.plain import Multiply, Weight, plain_graph
from fqt.export.result import Exported
from fqt.freeze import freeze
from fqt.geometry import Geometry
from fqt.inspect.trial import feed
from fqt.layers import quantized_layers

OPSET = 21
"""The first with 4-bit tensors."""
_NARROW = (
    (25, -2, 1, ir.DataType.INT2, "int2"),
    (21, -8, 7, ir.DataType.INT4, "int4"),
    (21, 0, 15, ir.DataType.UINT4, "uint4"),
)
"""Opset from which a type is, its smallest and largest number, its names."""


class Dequantized(Multiply):
    """A product by a weight behind a DequantizeLinear with scale 1."""

    def floats(self) -> Tensor:
        one = torch.ones((), device=self.codes.device)
        return torch.onnx.ops.symbolic(
            "DequantizeLinear", (self.codes, one), dtype=torch.float32, shape=self.codes.shape, version=OPSET
        )


class Integers(Dequantized):
    """A product of 8-bit integers, where both operands are such and no value has an offset."""

    def __init__(self, weight: Weight, geometry: Geometry | None, values: bool) -> None:
        super().__init__(weight, geometry, values)
        if geometry is not None and geometry.padding[0::2] != geometry.padding[1::2]:
            pass

    def product(self, x_NPC: Tensor, w: Tensor) -> Tensor:
        raise NotImplementedError
