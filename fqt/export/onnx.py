"""ONNX: a frozen model as standard operators, compared with the model by onnxruntime before the file is kept.

A weight is an initializer of its codes, 4-bit where these fit (2-bit from opset 25 on, which added the type), else 8-bit,
behind a DequantizeLinear. Activations are encoded by the quantizer's own arithmetic: ranges by sample or token are found at run
time, and sign(0) is +1. `multiply` says how a product is made:

    "float"     MatMul or Conv of the codes as floats, exact while float32 holds the sums, then the scales: the smallest files
    "integer"   MatMulInteger or ConvInteger of 8-bit codes, then the scales: exact, a byte a weight
    "nbits"     onnxruntime's own MatMulNBits for linear layers, weights of 2, 4 or 8 bits; convolutions as "float"
"""

from __future__ import annotations

import copy
import importlib.util
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
from fqt.formats import Format
from fqt.freeze import freeze
from fqt.geometry import Geometry
from fqt.inspect.trial import feed, floats_of
from fqt.layers import quantized_layers

OPSET = 21
"""The first with 4-bit tensors."""
_NARROW = (
    (25, -2, 1, ir.DataType.INT2, ml_dtypes.int2),
    (21, -8, 7, ir.DataType.INT4, ml_dtypes.int4),
    (21, 0, 15, ir.DataType.UINT4, ml_dtypes.uint4),
)
"""The opset from which a type is, its smallest and largest number, its names."""


class Dequantized(Multiply):
    """A product by a weight behind a DequantizeLinear with scale 1."""

    def floats(self) -> Tensor:
        one = torch.ones((), device=self.codes.device)
        return torch.onnx.ops.symbolic("DequantizeLinear", (self.codes, one), dtype=torch.float32, shape=self.codes.shape)


class Integers(Dequantized):
    """A product of integers, where 8 bits hold both operands."""

    def sums(self, codes: Tensor) -> Tensor:
        low, high = self.format.code_range
        if low < -128 or high > (127 if low < 0 else 255):
            return super().sums(codes)
        x = codes.to(torch.int8 if low < 0 else torch.uint8)
        window = self.geometry
        if window is None:
            shape = (*x.shape[:2], self.codes.shape[1])
            return torch.onnx.ops.symbolic("MatMulInteger", (x, self.codes), dtype=torch.int32, shape=shape).float()
        top, bottom, left, right = window.padding
        attributes: dict[str, Any] = {
            "strides": list(window.stride), "pads": [top, left, bottom, right], "dilations": list(window.dilation),
            "group": window.groups,
        }  # fmt: skip
        shape = (x.shape[0], self.codes.shape[0], *window.output_size)
        images = (self.images(x), self.codes)
        y = torch.onnx.ops.symbolic("ConvInteger", images, attributes, dtype=torch.int32, shape=shape)
        return y.float().flatten(2).transpose(1, 2)


class NBits(Dequantized):
    """A linear layer's product by onnxruntime's MatMulNBits, whose blocks of a channel share its scale."""

    def __init__(self, weight: Weight, geometry: Geometry | None, format: Format) -> None:
        super().__init__(weight, geometry, format)
        self.bits = 0
        if geometry is not None or weight.scale is None or weight.offset is not None or weight.codes.dtype != torch.int8:
            return
        low, high = int(weight.codes.min()), int(weight.codes.max())
        self.bits = next(bits for bits in (2, 4, 8) if -(1 << bits >> 1) <= low and high < (1 << bits >> 1))
        self.terms, self.outputs = weight.codes.shape
        self.block = 128 if self.terms >= 128 else 32
        codes_OI = nn.functional.pad(weight.codes.T.int(), [0, -self.terms % self.block]) + (1 << self.bits >> 1)
        lanes = codes_OI.unflatten(1, (-1, 8 // self.bits)) << torch.arange(0, 8, self.bits)
        self.codes = lanes.sum(2).to(torch.uint8).unflatten(1, (-1, self.block * self.bits // 8)).contiguous()
        self.scale = weight.scale.expand(self.outputs).repeat_interleave(self.codes.shape[1]).contiguous()

    def forward(self, codes: Tensor, scale: Tensor, offset: Tensor, *bias: Tensor) -> Tensor:
        if not self.bits:
            return super().forward(codes, scale, offset, *bias)
        scales_leave = not self.format.offset and not self.format.block
        x = codes if scales_leave else codes * scale + offset
        attributes: dict[str, Any] = {"K": self.terms, "N": self.outputs, "bits": self.bits, "block_size": self.block}
        shape = (*x.shape[:2], self.outputs)
        name = "com.microsoft::MatMulNBits"
        y = torch.onnx.ops.symbolic(name, (x, self.codes, self.scale), attributes, dtype=torch.float32, shape=shape, version=1)
        y = y * scale if scales_leave else y
        return y + bias[0].float() if bias else y


MULTIPLY = {"float": Dequantized, "integer": Integers, "nbits": NBits}


def export(
    model: nn.Module, path: Path, example: Any, multiply: str = "float", opset: int = OPSET, tolerance: float = 0.01
) -> Exported:
    """Write `path`; see `fqt.export`."""
    if multiply not in MULTIPLY:
        raise ValueError(f"multiply {multiply!r} is not one of {', '.join(map(repr, MULTIPLY))}")
    if opset < OPSET:
        raise ValueError(f"opset {opset} has no 4-bit tensors: give one from {OPSET} on")
    layers = [layer for _, layer in quantized_layers(model)]
    frozen = copy.deepcopy(model).cpu() if any(layer.frozen for layer in layers) else freeze(model).cpu()
    example = _batch(tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, example))
    args, kwargs = _arguments(example)
    varied = {"dynamic_shapes": _dynamic(args, kwargs), "kwargs": kwargs}
    with torch.no_grad():
        graph = plain_graph(torch.export.export(frozen, args, **varied).module(), MULTIPLY[multiply])  # type: ignore[arg-type]
        program = torch.onnx.export(graph, args, dynamo=True, opset_version=opset, verbose=False, optimize=True, **varied)
    assert program is not None
    onnx = program.model
    types = _narrow(onnx, opset)
    onnx.producer_name = "fqt"
    for node in onnx.graph.all_nodes():
        node.metadata_props.clear()  # where in Python each comes from, several times the size of a small model
    measured: dict[str, object] = {"multiply": multiply, "weights": types}
    ir.save(onnx, path)
    notes = []
    if importlib.util.find_spec("onnxruntime") is None:
        notes.append("not run: onnxruntime is not installed here (pip install onnxruntime)")
    else:
        measured |= compare(frozen, path, example)
        _check(measured, tolerance, path)
    onnx.metadata_props.update({f"fqt.{name}": str(value) for name, value in measured.items()})
    onnx.metadata_props["fqt.bytes"] = f"{0:012d}"
    ir.save(onnx, path)
    onnx.metadata_props["fqt.bytes"] = f"{path.stat().st_size:012d}"
    ir.save(onnx, path)
    return Exported(path, measured, tuple(notes))


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if isinstance(example, tuple) else (example,)), {}


def _batch(example: Any) -> Any:
    """The example with two samples at least: torch.export takes an axis of one for a constant."""

    def doubled(leaf: Any) -> Any:
        alone = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == 1
        return torch.cat([leaf, leaf]) if alone else leaf

    return tree_map(doubled, example)


def _dynamic(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first axis of every tensor varies, as far as the model lets it."""

    def axes(leaf: Any) -> Any:
        return {0: torch.export.Dim.AUTO} if isinstance(leaf, Tensor) and leaf.dim() else None

    return tree_map(axes, kwargs) if kwargs else tree_map(axes, args)


def _narrow(model: ir.Model, opset: int) -> dict[str, int]:
    """Give the integers behind DequantizeLinear the fewest bits that hold them; the number of weights of each type."""
    found: dict[str, int] = {}
    for value in model.graph.initializers.values():
        if value.dtype not in (ir.DataType.INT8, ir.DataType.UINT8) or value.const_value is None:
            continue
        if all(node.op_type == "DequantizeLinear" for node in value.consumers()):
            numbers: Any = value.const_value.numpy()
            low, high = (int(numbers.min()), int(numbers.max())) if numbers.size else (0, 0)
            for first, least, most, dtype, kind in _NARROW:
                if opset >= first and least <= low and high <= most:
                    value.const_value = ir.Tensor(numbers.astype(kind), dtype=dtype, name=value.name)
                    value.dtype = dtype
                    break
        assert value.dtype is not None
        found[value.dtype.name] = found.get(value.dtype.name, 0) + 1
    return found


# --- comparing ---------------------------------------------------------------------------------------------------------------


def compare(model: nn.Module, path: Path, example: Any) -> dict[str, object]:
    """What onnxruntime makes of the example, and of its first half, against the model.

    Returns:
        "largest_difference" of any output; "relative_difference", ||theirs - ours|| / ||ours|| over all outputs;
        "top1_agreement", the share of positions at which the first output is largest in the same place of its last axis.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    largest, difference, size, same, count = 0.0, 0.0, 0.0, 0, 0
    fixed = not isinstance(session.get_inputs()[0].shape[0], str) if names else True
    for batch in [example] if fixed else [example, tree_map(_first_half, example)]:
        given = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        with torch.no_grad():
            ours = floats_of(feed(model, batch))
        results = session.run(None, {name: leaf.numpy() for name, leaf in zip(names, given, strict=True)})
        theirs = [torch.from_numpy(np.asarray(result)) for result in results if np.asarray(result).dtype.kind == "f"]
        for one, other in zip(ours, theirs, strict=True):
            gap = other.double() - one.double()
            largest = max(largest, float(gap.abs().max()) if gap.numel() else 0.0)
            difference, size = difference + float(gap.square().sum()), size + float(one.double().square().sum())
        same += int((ours[0].argmax(-1) == theirs[0].argmax(-1)).sum())
        count += ours[0].argmax(-1).numel()
    return {
        "batch": "fixed" if fixed else "any",
        "largest_difference": largest,
        "relative_difference": (difference / size) ** 0.5 if size else difference**0.5,
        "top1_agreement": same / count,
    }


def _first_half(leaf: Any) -> Any:
    return leaf[: (leaf.shape[0] + 1) // 2] if isinstance(leaf, Tensor) and leaf.dim() else leaf


def _check(measured: dict[str, object], tolerance: float, path: Path) -> None:
    relative: Any = measured["relative_difference"]
    if not relative <= tolerance:  # nor NaN
        raise ValueError(
            f"onnxruntime computes something else from {path.name}: ||difference|| / ||output|| is {relative:.3g}, above "
            f"tolerance={tolerance:g} (largest difference {measured['largest_difference']:.3g}, top-1 agreement "
            f"{measured['top1_agreement']:.1%}); give a larger tolerance if that is good enough"
        )
