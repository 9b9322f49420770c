"""The one autograd function, where a layer's three products meet.

Everything of x and w is encoded in the forward; of x only the packed codes and, for the clipped estimator, one bit an element
are kept for the backward, never a float copy (unless the recipe keeps an operand in float). g is encoded in the backward, once
for each product that runs in low bits.

All random draws of one call share a 64-bit key, drawn from torch's default generator of the tensor's device, one stream a use.
It is drawn in training mode and whenever gradients are enabled, so activation checkpointing, which first runs without
gradients and restores the generator before it runs again, sees the same codes both times.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fqt import calls
from fqt.autograd import once, positional, refuse_transforms
from fqt.evaluation import few_rows
from fqt.formats import Format, Shape3
from fqt.geometry import Geometry
from fqt.multiply import multiply_grad_input, multiply_grad_weight, multiply_output
from fqt.notes import note_kept, ranges_of
from fqt.operand import Encoded, Operand, Plan, States
from fqt.qtensor import QTensor
from fqt.quantizers.base import Quantizer
from fqt.recipe import Recipe
from fqt.reference import apply_mask, spread
from fqt.sharded import refuse_dtensor

_log = logging.getLogger("fqt")
_FORWARD = (("output", "x"), ("output", "w"), ("grad_weight", "x"), ("grad_input", "w"))


@dataclass(frozen=True)
class Taken:
    """An input whose codes were made before.

    Attributes:
        x: the input in its own shape, of which the graph is read alone.
        in_shape: from a gradient (N, P, C) to that of x.
        encoded: its codes.
        channels_last: the memory format of the images that it stands for.
    """

    x: Tensor
    in_shape: Callable[[Tensor], Tensor]
    encoded: Encoded
    channels_last: bool


@dataclass(frozen=True)
class Accumulated:
    """A product of signs that is not scaled yet.

    Attributes:
        y_NPO: a placeholder with the product's graph. Where no graph is kept it is not read, and may be any tensor.
        sums: (N, P', O) int16.
        scale: (O,) float32, of the sums.
        bias: (O,) float32 or None.
    """

    y_NPO: Tensor
    sums: Tensor
    scale: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class _Call:
    """What a call computes, beside its tensors.

    Attributes:
        accumulates: whether the product's accumulators are wanted in place of the output.
        in_shape: where the input's codes were made before, from a gradient (N, P, C) to that of the input.
        states: the layer's, for operands that are encoded in the backward.
    """

    recipe: Recipe
    geometry: Geometry | None
    x_shape: Shape3
    w_shape: Shape3
    x_dtype: torch.dtype
    w_dtype: torch.dtype
    accumulates: bool
    in_shape: Callable[[Tensor], Tensor] | None
    states: States | None
    backend: str

    def plan(self, product: str) -> Plan:
        return self.recipe.plan(product, "linear" if self.geometry is None else "conv")

    def qtensors(self, flat: Sequence[Tensor | None]) -> dict[str, QTensor]:
        """Name of an operand of the forward -> its codes, from the flat tensors of those that are not "saved"."""
        found: dict[str, QTensor] = {}
        for product, letter in _FORWARD:
            operand = self.recipe.operand(product, letter)
            if operand is None:
                continue
            if operand.saved:
                found[operand.name] = found[f"output_{letter}"]
            else:
                found[operand.name] = operand.qtensor(flat[:4], self.x_shape if letter == "x" else self.w_shape)
                flat = flat[4:]
        return found


def layer(
    given: Tensor | Taken,
    weight: Tensor | QTensor,
    bias: Tensor | None,
    recipe: Recipe,
    geometry: Geometry | None,
    training: bool,
    states: States | None,
    gives: bool,
    backend: str,
) -> Tensor | Accumulated:
    """y (N, P', O); or with `gives`, where sums fit 16 bits, a placeholder and the accumulators behind it.

    What is given is x (N, P, I), and a weight (O, K, I), as floats or as codes that were made before. Of a weight's codes the
    backward only goes to x, and nothing is drawn.
    """
    packed = weight if isinstance(weight, QTensor) else None
    taken, x = (given, given.encoded.q) if isinstance(given, Taken) else (None, given)
    for name, tensor in (("input", x), ("weight", weight)):
        if isinstance(tensor, QTensor):
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"the {name} is {tensor.dtype}, not a float tensor: convert it, for instance by .float()")
        if type(tensor) is not Tensor:
            refuse_dtensor(tensor)
    of_x, of_w = ((tensor.codes if isinstance(tensor, QTensor) else tensor).device for tensor in (x, weight))
    if of_x != of_w:
        raise ValueError(f"the input is on {of_x}, the weight on {of_w}: move one of them")
    accumulates = gives and weight.shape[1] * weight.shape[2] < 1 << 15
    if packed is not None and not _wants_gradient(given.x if isinstance(given, Taken) else given, bias):
        return _evaluated(x, packed, bias, recipe, geometry, states, accumulates, backend)
    x_NPC, w_OKI = (placeholder(t.codes, t.shape) if isinstance(t, QTensor) else t for t in (x, weight))
    _, dtype = _dtypes(x_NPC)
    draws = packed is None and recipe.random and (training or torch.is_grad_enabled())
    key = calls.key_for(x_NPC) if draws else None
    if packed is not None and not recipe.saved("grad_input", "w") and x_NPC.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"no gradient passes a frozen layer whose weight was packed after {recipe.output.transform}: call it under "
            f"torch.no_grad(), or the model that it was frozen from"
        )
    x_shape = (x_NPC.shape[0], x_NPC.shape[1], x_NPC.shape[2])
    w_shape = (w_OKI.shape[0], w_OKI.shape[1], w_OKI.shape[2])
    plain = {"x": x_NPC, "w": w_OKI}
    values = dict(plain)
    masks = {letter: x_NPC.new_empty(0, dtype=torch.uint8) for letter in plain}
    flat: list[Tensor | None] = []
    for product, letter in _FORWARD:
        operand = recipe.operand(product, letter)
        if operand is None or operand.saved:
            continue
        if product == "output":
            if taken is not None and letter == "x":
                flat += taken.encoded.q.parts()
                masks["x"] = taken.encoded.mask
                continue
            if packed is not None and letter == "w":
                flat += packed.parts()
                continue
            values[letter] = operand.transformed(plain[letter], states)
            value = values[letter].detach()
        else:
            value = operand.transformed(plain[letter].detach(), states) if letter == "w" else values["x"].detach()
        encoded = operand.encode(value, key=key, training=training, geometry=geometry, states=states, backend=backend)
        flat += encoded.q.parts()
        if product == "output":
            masks[letter] = encoded.mask
            values[letter] = operand.estimated(values[letter], encoded.q, states)

    call = _Call(
        recipe, geometry, x_shape, w_shape, values["x"].dtype, values["w"].dtype, accumulates, taken and taken.in_shape,
        states, backend,
    )  # fmt: skip
    run = _Products.apply if keeps_graph(values["x"], values["w"], bias) else _Products.forward
    y = run(values["x"] if taken is None else taken.x, values["w"], bias, key, masks["x"], masks["w"], call, *flat)
    if isinstance(y, Tensor):
        return y.to(dtype)
    q = call.qtensors(flat)
    return _accumulated(y[0], y[1], q["output_x"], q["output_w"], bias)


def _wants_gradient(x: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def _evaluated(
    x: Tensor | QTensor,
    w: QTensor,
    bias: Tensor | None,
    recipe: Recipe,
    geometry: Geometry | None,
    states: States | None,
    accumulates: bool,
    backend: str,
) -> Tensor | Accumulated:
    """As `layer`, by packed weights and without a graph: nothing is kept for a backward, the estimator's mask included."""
    operand = recipe.operand("output", "x")
    dtype, wanted = _dtypes(x)
    if isinstance(x, Tensor) and operand is not None:
        value = operand.transformed(x, states)
        if geometry is None and not accumulates and operand.transform is None and recipe.low_bit("output"):
            y = few_rows(value, operand.quantizer, operand.format, w, bias, backend)
            if y is not None:
                return y.to(wanted)
        options = {"geometry": geometry, "states": states, "backend": backend}
        x = operand.encode(value, key=None, training=False, masked=False, **options).q  # type: ignore[arg-type]
    if accumulates:
        assert isinstance(x, QTensor)
        sums = calls.accumulate(x, w, geometry, backend)
        return _accumulated(sums, sums, x, w, bias)
    return _multiplied(x, w, bias, recipe, geometry, dtype, backend).to(wanted)


def _multiplied(
    x: Tensor | QTensor, w: Tensor | QTensor, bias: Tensor | None, recipe: Recipe, geometry: Geometry | None,
    dtype: torch.dtype, backend: str,
) -> Tensor:  # fmt: skip
    """The product `output`, of codes or in float. dtype: of a float product."""
    if recipe.low_bit("output"):
        assert isinstance(x, QTensor) and isinstance(w, QTensor)
        return calls.output(x, w, bias, geometry, backend)
    x_NPC, w_OKI = ((v.decode() if isinstance(v, QTensor) else v).to(dtype) for v in (x, w))
    y_NPO = multiply_output(x_NPC, w_OKI, geometry)
    return y_NPO if bias is None else y_NPO + bias.to(y_NPO.dtype)


def _accumulated(y_NPO: Tensor, sums: Tensor, x: QTensor, w: QTensor, bias: Tensor | None) -> Accumulated:
    scale = (x.scale * w.scale).expand(w.shape[0]).contiguous()
    # a copy: an optimizer may change the bias before somebody reads the output
    return Accumulated(y_NPO, sums, scale, None if bias is None else bias.detach().to(torch.float32, copy=True))


def keeps_graph(*inputs: Tensor | None) -> bool:
    """Whether a call must go through autograd. Where it need not, it must not under torch.compile: torch 2.14 then
    hands a Function with `setup_context` a context in place of its first argument."""
    if not torch.is_grad_enabled() or not torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    return any(tensor is not None and tensor.requires_grad for tensor in inputs)


def placeholder(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """NaN in every place, of which only one is stored."""
    return like.new_full((), torch.nan, dtype=torch.float32).expand(shape)


def _dtypes(x: Tensor | QTensor) -> tuple[torch.dtype, torch.dtype]:
    """An input's, float32 where it is codes already; and the output's, the same or autocast's, which leaves float64 alone."""
    dtype, device = (x.dtype, x.device.type) if isinstance(x, Tensor) else (torch.float32, x.codes.device.type)
    if device == "meta" or dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return dtype, dtype
    return dtype, torch.get_autocast_dtype(device)


class _Products(torch.autograd.Function):
    """output in the forward, grad_input and grad_weight in the backward."""

    @staticmethod
    @positional
    def forward(
        x_NPC: Tensor,
        w_OKI: Tensor,
        bias: Tensor | None,
        key: Tensor | None,
        x_mask: Tensor,
        w_mask: Tensor,
        call: _Call,
        *flat: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        q = call.qtensors(flat)
        if call.accumulates:
            sums = calls.accumulate(q["output_x"], q["output_w"], call.geometry, call.backend)
            return placeholder(sums, tuple(sums.shape)), sums
        x, w = q.get("output_x", x_NPC), q.get("output_w", w_OKI)
        return _multiplied(x, w, bias, call.recipe, call.geometry, call.x_dtype, call.backend)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x_NPC, w_OKI, _, key, x_mask, w_mask, call, *flat = inputs
        needs_x, needs_w = ctx.needs_input_grad[:2]
        q = call.qtensors(flat)
        # each side keeps only what its product reads, and a float tensor only where the recipe asks for one
        w = q["grad_input_w"].parts() if "grad_input_w" in q else [w_OKI]
        x = q["grad_weight_x"].parts() if "grad_weight_x" in q else [x_NPC]
        saved_w = [*w, x_mask] if needs_x else []
        saved_x = [*x, w_mask] if needs_w else []
        ctx.save_for_backward(key, *saved_w, *saved_x)
        ctx.call = call
        ctx.split = len(saved_w)
        if call.accumulates:
            ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, g_NPO: Tensor, *_: Tensor | None):
        refuse_transforms(g_NPO)
        with torch.no_grad():
            grads = _Products._gradients(ctx, g_NPO)
        return (*once(grads), *([None] * (len(ctx.needs_input_grad) - 3)))

    @staticmethod
    def _gradients(ctx, g_NPO: Tensor) -> list[Tensor | None]:
        key, *saved = ctx.saved_tensors
        call, saved_w, saved_x = ctx.call, saved[: ctx.split], saved[ctx.split :]
        needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
        grad_x = grad_w = grad_bias = None
        if needs_x:
            grad_x = _gradient(call, call.plan("grad_input"), g_NPO, saved_w[:-1], saved_w[-1], key)
            grad_x = grad_x if call.in_shape is None else call.in_shape(grad_x)
        if needs_w:
            grad_w = _gradient(call, call.plan("grad_weight"), g_NPO, saved_x[:-1], saved_x[-1], key)
        if needs_bias:
            grad_bias = g_NPO.sum((0, 1), dtype=torch.promote_types(g_NPO.dtype, torch.float32))
        return [grad_x, grad_w, grad_bias]


def _gradient(call: _Call, plan: Plan, g_NPO: Tensor, saved: list[Tensor | None], mask: Tensor, key: Tensor | None) -> Tensor:
    """dX = G W, or dW = G^T X, in the dtype of x or w, where the estimator's mask passes it.

    Args:
        saved: the right operand, codes or a float tensor.
    """
    of_x = plan.product == "grad_input"
    dtype, shape = (call.x_dtype, call.w_shape) if of_x else (call.w_dtype, call.x_shape)
    right = None if plan.right is None else plan.right.qtensor(saved, shape)
    if plan.low_bit:
        assert plan.left is not None and plan.right is not None and right is not None
        fold = None
        if plan.folded:
            fold = spread(right.scale, right)
            fold, right = fold.permute(1, 2, 0) if of_x else fold, _unscaled(right, plan.right.unscaled)
        g = _encoded(call, plan.left, g_NPO, key, fold)
        if not of_x:
            grad = calls.grad_weight(g, right, call.geometry, call.backend)
            return (apply_mask(grad, mask) if mask.numel() else grad).to(dtype)
        grad = calls.grad_input(g, right, mask, call.geometry, call.x_shape, call.backend).to(dtype)
        if call.in_shape is not None and g.index is not None and g.format.axes == "N":
            note_kept(grad, g.index)
        return grad
    if plan.left is not None:
        g_NPO = _encoded(call, plan.left, g_NPO, key, None).decode().to(g_NPO.dtype)
    plain = saved[0] if right is None else right.decode()
    assert plain is not None
    value = plain.to(g_NPO.dtype)
    if of_x:
        grad = multiply_grad_input(g_NPO, value, call.x_shape[2], call.geometry)
    else:
        grad = multiply_grad_weight(g_NPO, value, call.geometry)
    return (apply_mask(grad, mask) if mask.numel() else grad).to(dtype)


def _encoded(call: _Call, operand: Operand, g_NPO: Tensor, key: Tensor | None, fold: Tensor | None) -> QTensor:
    """The gradient's codes; whoever wrote it may have found its ranges on the way."""
    known = not torch.compiler.is_compiling() and not operand.format.block  # what is known is the range of whole channels
    ranges = ranges_of(g_NPO, operand.format.axes, fold) if known else None
    if operand.quantizer.prune == "bernoulli" and not torch.compiler.is_compiling():
        _mind_small_batches(operand.format.groups((g_NPO.shape[0], g_NPO.shape[1], g_NPO.shape[2])), operand.quantizer)
    return operand.encode(
        g_NPO, key=key, training=True, fold=fold, ranges=ranges, geometry=call.geometry, states=call.states,
        backend=call.backend,
    ).q  # fmt: skip


def _mind_small_batches(groups: int, quantizer: Quantizer) -> None:
    """Log where independent draws often keep none of so few groups, so that a layer, or all before it, learns nothing."""
    share = 1.0 / min(groups, quantizer.keep_one_in) if groups > 1 else 1.0
    none = (1 - share) ** groups  # of equal ranges; less of others
    if none > 0.02:
        _say_small(groups, quantizer, none)


@cache
def _say_small(groups: int, quantizer: Quantizer, none: float) -> None:
    what = {"sample": "samples", "channel": "channels"}.get(quantizer.granularity, "groups")
    _log.warning(
        "pruning (%s) draws among %d %s: up to %.0f %% of such steps keep none, and the gradient behind is zero; give larger "
        "batches, or a recipe with mode: systematic or without pruning (fqt_w1a1g6)",
        quantizer, groups, what, 100 * none,
    )  # fmt: skip


def _unscaled(q: QTensor, format: Format) -> QTensor:
    """The codes with scale 1, their own scale having been folded into the other operand."""
    return QTensor(q.codes, q.scale.new_ones(1), q.offset, q.index, format, q.shape)
