"""summary: what was decided for each layer, what serves it, and what it costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from fqt import ops
from fqt.cpu import integers
from fqt.inspect.table import aligned
from fqt.layers import QuantizedLayer, adapter_of, is_subclass, quantized_layers, refusal, refuse_frozen
from fqt.layers.parametrized import at_rest
from fqt.ops import PRODUCTS
from fqt.packed import logical_shape
from fqt.recipe import MAX_PRODUCT_BITS
from fqt.rows import Kernel

_MACS = "_fqt_macs"
NOTE = "_fqt_note"
"""Attribute of a layer that `convert` left float: why."""


@dataclass(frozen=True)
class Row:
    """A layer that holds a weight.

    Attributes:
        output, grad_input, grad_weight: operands of the product, "float x float" if it is not quantized; of a frozen layer
            the first alone.
        parameters: numbers, bias included.
        madds: multiply-adds of one sample's forward; None before the model's first forward after its conversion.
        packed_bytes: of the weight as the forward reads it, scales included; of the float weight in a float layer.
        backend: what serves the low-bit products; "torch" if there are none.
        served: product -> the backend of the kernel that serves it, for those that run in low bits.
        note: why a layer is float or ran nothing, why no kernel or no faster one serves it, what words of more than 8 bits
            run on.
        bits: product -> bits at which it runs, 32 = float.
        kept: product -> fraction of groups that pruning keeps.
    """

    name: str
    kind: str
    output: str
    grad_input: str
    grad_weight: str
    parameters: int
    madds: int | None
    packed_bytes: int
    backend: str
    note: str
    served: dict[str, str]
    bits: dict[str, int]
    kept: dict[str, float]


@dataclass(frozen=True)
class Summary:
    """`rows` is data, `str()` a table."""

    rows: list[Row]

    def __str__(self) -> str:
        head = ["layer", "kind", *PRODUCTS, "parameters", "MAdds", "weight bytes", "backend", "note"]
        table = [head]
        for row in self.rows:
            low = any(bits < 32 for bits in row.bits.values())
            products = [getattr(row, p) for p in PRODUCTS] if low or row.output != "float x float" else ["float", "", ""]
            macs = "?" if row.madds is None else f"{row.madds:,}"
            table.append(
                [
                    row.name,
                    row.kind,
                    *products,
                    f"{row.parameters:,}",
                    macs,
                    f"{row.packed_bytes:,}",
                    row.backend,
                    row.note,
                ]
            )
        known = [row.madds for row in self.rows if row.madds is not None]
        totals = [sum(row.parameters for row in self.rows), sum(known), sum(row.packed_bytes for row in self.rows)]
        parameters, macs, nbytes = (f"{total:,}" for total in totals)
        table.append(["total", "", "", "", "", parameters, macs if known else "?", nbytes, "", ""])
        lines = aligned(table, right=(5, 6, 7))
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def summary(model: nn.Module) -> Summary:
    """A row for each module that holds a weight of two or more axes, converted or not.

    Multiply-adds are known once a converted model has run a forward. A converted layer that was not called then stands as
    float: a model that reads a layer's weight itself, for a function of torch, computes past it.
    """
    rows = []
    any_ran = ran(model)
    for name, module in model.named_modules():
        weights = matrix_weights(module)
        if isinstance(module, QuantizedLayer) and (ran(module) or not any_ran):
            with at_rest(module):
                rows.append(_quantized_row(name, module))
        elif weights:
            float_product = "float x float"
            rows.append(
                Row(
                    name=name,
                    kind=type(module).__name__,
                    output=float_product,
                    grad_input=float_product,
                    grad_weight=float_product,
                    parameters=_parameters(module),
                    madds=module.__dict__.get(_MACS),
                    packed_bytes=sum(weight.numel() * weight.element_size() for weight in weights if not is_lazy(weight)),
                    backend="torch",
                    note=_why_float(module),
                    served={},
                    bits=dict.fromkeys(PRODUCTS, 32),
                    kept=dict.fromkeys(PRODUCTS, 1.0),
                )
            )
    return Summary(rows)


def _quantized_row(name: str, layer: QuantizedLayer) -> Row:
    recipe, served = layer.recipe, backends(layer)
    weight, format = layer.weight, recipe.format("output", "w")
    nbytes = weight.nbytes if format is None else sum(format.nbytes(logical_shape(part.shape)) for part in layer.weights())
    names = list(dict.fromkeys(by.backend for by in served.values()))
    reasons = [*_arithmetic(layer, served), *dict.fromkeys(by.note for by in served.values() if by.note)]
    lost = layer.lost_zeros()
    if lost:
        reasons.insert(0, f"{lost} pruned weights are not zero as codes")
    if layer.backend:
        reasons.insert(0, f"backend {layer.backend!r} was named")
    if layer.frozen:
        reasons.insert(0, "frozen")
    return Row(
        name=name,
        kind=type(layer).__name__,
        output=recipe.describe("output"),
        grad_input="" if layer.frozen else recipe.describe("grad_input"),
        grad_weight="" if layer.frozen else recipe.describe("grad_weight"),
        parameters=_parameters(layer) + (weight.numel() if layer.weight_name in vars(layer) else 0),
        madds=layer.__dict__.get(_MACS),
        packed_bytes=nbytes,
        backend="+".join(names) or "torch",
        note="; ".join(reasons),
        served={product: by.backend for product, by in served.items()},
        bits={product: recipe.bits(product) for product in PRODUCTS},
        kept={product: recipe.kept(product) for product in PRODUCTS},
    )


def _arithmetic(layer: QuantizedLayer, served: dict[str, Served]) -> list[str]:
    """What words of more than 8 bits are multiplied in, and the zero rows that a kernel leaves out."""
    said, recipe = [], layer.recipe
    row = served["output"].row if "output" in served else None
    variant = "" if row is None or row.device != "cpu" else row.variant
    widths = [format.bits for letter in "xw" if (format := recipe.format("output", letter)) is not None]
    if any(bits > MAX_PRODUCT_BITS for bits in widths):
        said.append(f"words of more than {MAX_PRODUCT_BITS} bits: their values are multiplied in float32")
    elif any(bits > 8 for bits in widths) and recipe.low_bit("output"):
        how = "as 16-bit integers, added up in 64 bits" if variant == "int16" else "in float64"
        said.append(f"words of 9 to 16 bits: their codes are multiplied {how}, which is exact")
    for w in layer.quantized_weights() if variant else ():
        busy = integers.busy_rows(w, layer.window())
        if busy is not None:
            said.append(f"{w.shape[0] - busy.numel()} of {w.shape[0]} output channels are zero and left out")
    return said


@dataclass(frozen=True)
class Served:
    """What serves a product of a layer.

    Attributes:
        row: of the table of kernels; None where the named backend cannot serve it.
        note: why no faster one does, where that is news.
    """

    row: Kernel | None
    note: str

    @property
    def backend(self) -> str:
        """The name that summaries show."""
        return "none" if self.row is None else self.row.label


def backends(layer: QuantizedLayer) -> dict[str, Served]:
    """Product -> what serves it, for the products that run in low bits."""
    served = {}
    for product, request in layer.requests().items():
        if product not in PRODUCTS:
            continue
        try:
            row, refusals = ops.select(product, request)
        except ValueError as error:  # the layer went to another device, or has got another recipe
            served[product] = Served(None, str(error))
            continue
        # the rows of a CPU serve disjoint formats, so another row's refusal is expected; that a library is broken is not
        told = [str(refusal) for refusal in refusals if row.device != "cpu" or refusal.broken]
        if row.backend == "reference" and not refusals and not ops.named_backend(request.backend):
            told = [f"no low-bit kernel for {request.device} yet"]
        served[product] = Served(row, "; ".join(told))
    return served


def matrix_weights(module: nn.Module) -> list[nn.Parameter]:
    """The module's own weights by whatever name (in_proj_weight, weight_ih_l0), those under a parametrization included; none
    where none is lazy or has two axes."""
    weights = [p for name, p in module._parameters.items() if p is not None and "weight" in name]
    for name, parametrizations in _parametrizations(module).items():
        weights += parametrizations.parameters(recurse=False) if "weight" in name else []
    return weights if any(is_lazy(weight) or weight.dim() > 1 for weight in weights) else []


def _parametrizations(module: nn.Module) -> dict[str, nn.Module]:
    found = module._modules.get("parametrizations") if parametrize.is_parametrized(module) else None
    return dict(found.named_children()) if found is not None else {}


def _why_float(module: nn.Module) -> str:
    if any(is_lazy(weight) for weight in matrix_weights(module)):
        return "lazy: it has no shape before its first forward; convert after that"
    if isinstance(module, QuantizedLayer):
        return "converted, but not called by the forwards since: nothing of it ran in low bits"
    if adapter_of(module) is not None:
        return module.__dict__.get(NOTE, "kept float")
    if refusal(module):
        return f"left alone: {refusal(module)}"
    if is_subclass(module):
        return "a subclass: left alone"
    return "not a kind that fqt converts"


def _parameters(module: nn.Module) -> int:
    holders = [module, *_parametrizations(module).values()]
    own = [parameter for holder in holders for parameter in holder.parameters(recurse=False)]
    return sum(parameter.numel() for parameter in own if not is_lazy(parameter))


def count_macs(layer: nn.Module) -> None:
    """Have a layer remember the multiply-adds of its last eager forward, for `summary`."""
    layer.register_forward_hook(_remember_macs)


def _remember_macs(layer: nn.Module, inputs: object, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    adapter = adapter_of(layer)
    assert adapter is not None
    with at_rest(layer):
        layer.__dict__[_MACS] = adapter.multiply_adds(layer, output)  # type: ignore[arg-type]


def copy_macs(counted: nn.Module, model: nn.Module) -> None:
    """Have a model know the multiply-adds that a copy of it counted."""
    for one, other in zip(counted.modules(), model.modules(), strict=True):
        if _MACS in one.__dict__:
            other.__dict__[_MACS] = one.__dict__[_MACS]


def ran(model: nn.Module) -> bool:
    """Whether a converted layer within a model, or one that is it, has run an eager forward since its conversion."""
    return any(_MACS in layer.__dict__ for _, layer in quantized_layers(model))


def count_no_more(module: nn.Module) -> None:
    """Undo `count_macs`, but for the number that is known."""
    for number, hook in list(module._forward_hooks.items()):
        if hook is _remember_macs:
            del module._forward_hooks[number]


def forget_macs(module: nn.Module) -> None:
    """Undo `count_macs`."""
    count_no_more(module)
    module.__dict__.pop(_MACS, None)


def modelled_speedup(model: nn.Module) -> float:
    """What multiply-adds x bits promise: 32-bit cost over the cost at each product's bits and kept fraction. Not measured.

    Raises:
        ValueError: the model has not run a forward since its conversion.
    """
    refuse_frozen(model, "modelled_speedup")
    rows: Iterable[Row] = summary(model).rows
    counted = [(row, row.madds) for row in rows if row.madds is not None]
    if not counted:
        raise ValueError("multiply-adds are unknown: run one forward of the converted model before modelled_speedup")
    float_cost = sum(32 * madds * len(PRODUCTS) for _, madds in counted)
    cost = sum(madds * row.bits[p] * (row.kept[p] if row.bits[p] < 32 else 1.0) for row, madds in counted for p in PRODUCTS)
    return float_cost / cost
