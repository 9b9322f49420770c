"""A frozen model's graph with plain torch operations in place of fqt's operators: what any exporter of torch can translate.

torch.export gives a graph in which a converted layer is `fqt.quantize` (or `fqt.encode`, where a registered calibration finds
the scales) of its input, and `fqt.output` of its codes and the packed weight. Here

    codes       stay numbers, never packed: integers in float32
    a product   of codes without offsets multiplies the integers and then the scales, in the order of `fqt.reference`, so it is
                exact as long as float32 holds the sums (2^24); one with offsets, or with blocks, multiplies values
    a weight    is a constant of integers, (I, O) or (O, I / groups, kh, kw), of which `Multiply.weight` makes floats
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fqt.formats import Format, Shape3
from fqt.geometry import Geometry
from fqt.qtensor import QTensor
from fqt.reference import calibrate_groups, decode, unpack

_QUANTIZE, _ENCODE = torch.ops.fqt.quantize.default, torch.ops.fqt.encode.default
_OUTPUT, _DECODE = torch.ops.fqt.output.default, torch.ops.fqt.decode.default


class Encode(nn.Module):
    """x (N, P, C) to integers, (N, P, C) float32, scale and offset, which broadcast against them.

    Args:
        format: of the codes.
        calibrate, limits: as a `Quantizer` has them; "" where scale, inverse and offset are given.
    """

    def __init__(self, format: Format, calibrate: str, limits: tuple[float, float]) -> None:
        super().__init__()
        self.format, self.calibrate, self.limits = format, calibrate, limits

    def forward(self, x: Tensor, *given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x.float()
        blocks = x.unflatten(2, (-1, self.format.block)) if self.format.block else x
        scale, inverse, offset = self._of(given, blocks) if given else self._scales(blocks)
        if self.format.grid == "sign":
            codes = torch.where(blocks >= 0, 1.0, -1.0)
        else:
            shifted = blocks if offset is None else blocks - offset
            codes = (shifted * inverse).clamp(*self.format.code_range).round()
        offset = torch.zeros_like(scale) if offset is None else offset
        if not self.format.block:
            return codes, scale, offset
        wide = (codes.flatten(2), *(v.expand_as(codes).flatten(2) for v in (scale, offset)))
        return wide[0], wide[1], wide[2]

    def _scales(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What `fqt.reference.calibrate` finds, with the axes that share a scale kept as 1."""
        if self.calibrate == "none":  # a fixed range, whatever x is: a NaN in it is then encoded as a number
            fixed = x.new_zeros(1, 1, 1)
            return calibrate_groups(fixed, fixed, None, self.format, self.calibrate, self.limits)
        axes = list(range(len(self.format.axes), x.dim())) if not self.format.block else [x.dim() - 1]
        low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
        mean = x.abs().double().mean(axes, keepdim=True).float() if self.calibrate == "absmean" else None
        return calibrate_groups(low, high, mean, self.format, self.calibrate, self.limits)

    def _of(self, given: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scale, inverse and offset, (G,) each, as they broadcast against x."""
        lead = len(self.format.axes) + (1 if self.format.block else 0)
        shape = [*x.shape[:lead], *[1] * (x.dim() - lead)]
        scale, inverse = (v.reshape(shape) for v in given[:2])
        return scale, inverse, given[2].reshape(shape) if self.format.offset else None


class Decode(nn.Module):
    """The values of codes."""

    def forward(self, codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        return codes * scale + offset


@dataclass(frozen=True)
class Weight:
    """A packed weight as constants.

    Attributes:
        codes: int8 or uint8, (I, O) or (O, I / groups, kh, kw); float32 values where 8 bits do not hold the codes.
        scale: (O,) or () float32; None where `codes` are values.
        offset: as scale; None where the format has none.
        axis: of the output channels in `codes`.
    """

    codes: Tensor
    scale: Tensor | None
    offset: Tensor | None
    axis: int

    @staticmethod
    def of(q: QTensor, geometry: Geometry | None) -> Weight:
        """A weight (O, K, I) by the window that it belongs to."""

        def placed(w_OKI: Tensor) -> Tensor:
            if geometry is None:
                return w_OKI[:, 0].T.contiguous()
            return w_OKI.transpose(1, 2).reshape(q.shape[0], q.shape[2], *geometry.kernel).contiguous()

        axis, (low, high) = 1 if geometry is None else 0, q.format.code_range
        small = not q.format.is_float and ((low >= -128 and high <= 127) or (low == 0 and high <= 255))
        if not small or q.format.axes not in ("", "O") or q.format.block or not bool(q.scale.isfinite().all()):
            return Weight(placed(decode(q)), None, None, axis)
        codes = placed(unpack(q.codes, q.format, q.shape)).to(torch.int8 if high <= 127 else torch.uint8)
        scale, offset = (None if v is None else v.view(v.shape if q.format.axes else ()) for v in (q.scale, q.offset))
        return Weight(codes, scale, offset, axis)


class Multiply(nn.Module):
    """The product `output` of codes: (N, P', O) float32.

    Args:
        weight: its constants.
        geometry: of a convolution; None for a linear layer.
        format: of the activation's codes.

    Attributes:
        values: whether values are multiplied in place of codes: an operand has an offset, or scales along the sum.
    """

    def __init__(self, weight: Weight, geometry: Geometry | None, format: Format) -> None:
        super().__init__()
        self.geometry, self.axis, self.format = geometry, weight.axis, format
        self.values = format.offset or bool(format.block) or weight.scale is None or weight.offset is not None
        for name in ("codes", "scale", "offset"):
            self.register_buffer(name, getattr(weight, name))
        self.codes: Tensor
        self.scale: Tensor | None
        self.offset: Tensor | None

    def forward(self, codes: Tensor, scale: Tensor, offset: Tensor, *bias: Tensor) -> Tensor:
        if self.values:
            y = self.product(codes * scale + offset, self._value())
        else:
            assert self.scale is not None
            y = self.sums(codes) * scale * self.scale
        return y + bias[0].float() if bias else y

    def sums(self, codes: Tensor) -> Tensor:
        """The integers that the scales multiply, as float32."""
        return self.product(codes, self.floats())

    def floats(self) -> Tensor:
        """The weight's codes as floats."""
        return self.codes.float()

    def product(self, x_NPC: Tensor, w: Tensor) -> Tensor:
        """Of floats, (N, P', O)."""
        window = self.geometry
        if window is None:
            return x_NPC @ w
        top, bottom, left, right = window.padding
        even = top == bottom and left == right
        x = self.images(x_NPC) if even else F.pad(self.images(x_NPC), [left, right, top, bottom])
        padding = (top, left) if even else (0, 0)
        return F.conv2d(x, w, None, window.stride, padding, window.dilation, window.groups).flatten(2).transpose(1, 2)

    def images(self, x_NPC: Tensor) -> Tensor:
        """(N, C, H, W)."""
        assert self.geometry is not None
        return x_NPC.transpose(1, 2).unflatten(2, (self.geometry.height, self.geometry.width))

    def _value(self) -> Tensor:
        if self.scale is None:
            return self.codes
        shape = [-1 if axis == self.axis else 1 for axis in range(self.codes.dim())] if self.scale.dim() else []
        value = self.floats() * self.scale.view(shape)
        return value if self.offset is None else value + self.offset.view(shape)


def plain_graph(frozen: fx.GraphModule, multiply: type[Multiply] = Multiply) -> fx.GraphModule:
    """The graph module that torch.export's `module()` gives of a frozen model, in place without fqt's operators.

    Args:
        multiply: the module that stands for each product.

    Raises:
        ValueError: an operator whose work has no plain form here, by name and with the reason.
    """
    graph, made = frozen.graph, 0

    def call(module: nn.Module, node: fx.Node, arguments: list[Any]) -> fx.Node:
        nonlocal made
        name = f"{type(module).__name__.lower()}_{made}"
        made += 1
        frozen.add_submodule(name, module)
        with graph.inserting_before(node):
            new = graph.call_module(name, tuple(arguments))
        new.meta["stack_trace"] = node.meta.get("stack_trace", "")
        return new

    def encoded(parts: list[fx.Node], format: Format) -> list[fx.Node]:
        """The codes, scale and offset of an operand, made where its quantizing stands."""
        source = parts[0].args[0] if parts[0].target is not _ENCODE else parts[0]
        assert isinstance(source, fx.Node)
        if source not in done:
            _check(format)
            if source.target is _ENCODE:
                scale, inverse, offset, *_ = source.args[1]  # type: ignore[misc]
                given = [scale, inverse, *([offset] if format.offset else [])]
                done[source] = call(Encode(format, "", (0, 0)), source, [source.args[0], *given])
            else:
                calibrate, limits = str(source.args[6]), tuple(source.args[7])  # type: ignore[arg-type]
                done[source] = call(Encode(format, calibrate, limits), source, [source.args[0]])  # type: ignore[arg-type]
        return [_item(graph, done[source], i) for i in range(3)]

    done: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is _OUTPUT:
            a, a_format, _, b, b_format, b_shape, bias, geometry = node.args[:8]
            left, window = Format.parse(a_format), Geometry.unflatten(geometry)
            weight = Weight.of(_constant(frozen, b, b_format, b_shape), window)
            with graph.inserting_before(node):
                operands = encoded(a, left)
            new = call(multiply(weight, window, left), node, [*operands, *([] if bias is None else [bias])])
        elif node.target is _DECODE:
            parts, name, shape = node.args
            if parts[0].op == "get_attr":
                value = decode(_constant(frozen, parts, name, shape))
                new = call(_Constant(value), node, [])
            else:
                with graph.inserting_before(node):
                    operands = encoded(parts, Format.parse(name))
                new = call(Decode(), node, operands)
        elif node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)  # of what was traced; it would keep alive what is replaced
            continue
        else:
            continue
        node.replace_all_uses_with(new)
    graph.eliminate_dead_code()
    left_over = [str(node.target) for node in graph.nodes if str(node.target).startswith("fqt.")]
    if left_over:
        raise ValueError(f"{', '.join(sorted(set(left_over)))}: not what a frozen model computes with; fqt.freeze it first")
    frozen.delete_all_unused_submodules()
    frozen.recompile()
    for module in frozen.modules():
        module.training = False  # torch.export's modules refuse eval()
    return frozen


class _Constant(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)
        self.value: Tensor

    def forward(self) -> Tensor:
        return self.value


def _item(graph: fx.Graph, node: fx.Node, index: int) -> fx.Node:
    return graph.call_function(_nth, (node, index))


def _nth(parts: tuple[Tensor, ...], index: int) -> Tensor:
    return parts[index]


def _check(format: Format) -> None:
    if format.is_float:
        raise ValueError(
            f"activations of format {format.name} are small floats, for which no plain operations are known here: use an "
            f"integer quantizer for them, or keep these layers float"
        )
    if format.bits > 16:
        raise ValueError(f"activations of format {format.name} exceed 16 bits, which float32 does not hold: use fewer")


def _constant(module: fx.GraphModule, parts: list[fx.Node], format: str, shape: Shape3) -> QTensor:
    """A packed weight."""
    if parts[0].op != "get_attr":
        raise ValueError(f"a weight of format {format} is quantized at every forward: fqt.freeze the model first")

    def value(node: fx.Node) -> Tensor:
        found: Any = module
        for name in str(node.target).split("."):
            found = getattr(found, name)
        return found.detach().cpu()

    parsed = Format.parse(format)
    offset = value(parts[2]) if parsed.offset else None
    return QTensor(value(parts[0]), value(parts[1]), offset, None, parsed, (shape[0], shape[1], shape[2]))
