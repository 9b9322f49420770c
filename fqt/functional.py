"""The one autograd function, where a layer's three products meet. `linear` and `conv2d` only hand it their geometry.

Everything of x and w is encoded in the forward; of x only the packed codes and, for the clipped estimator, one bit an element
are kept for the backward, never a float copy (unless the recipe keeps an operand in float). g is encoded in the backward, once
for each product that runs in low bits.

All random draws of one call share a 64-bit key, drawn from torch's default generator of the tensor's device, one stream a use.
It is drawn in training mode and whenever gradients are enabled, so activation checkpointing, which first runs without
gradients and restores the generator before it runs again, sees the same codes both times.

Shapes: x (N, ..., I) or (N, I, H, W); canonical x_NPC, w_OKI, g_NPO as in `fqt.formats`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fqt.autograd import once
from fqt.formats import Shape3
from fqt.fusion.deferred import (
    Deferred,
    accumulates,
    channels_last,
    images_first,
    images_last,
    placeholder,
    possible,
    ranges,
    remember_kept,
    rows,
    signs_of,
)
from fqt.geometry import Geometry
from fqt.multiply import multiply_grad_input, multiply_grad_weight, multiply_output
from fqt.qtensor import QTensor
from fqt.quantizers.base import Quantizer, quantize, transformed
from fqt.recipe import Recipe
from fqt.reference import apply_mask, spread
from fqt.reference.norm import Source, Windows

FORWARD_OPERANDS = ("output.x", "output.w", "grad_weight.x", "grad_input.w")
STREAM = {name: 2 * i for i, name in enumerate((*FORWARD_OPERANDS, "grad_input.g", "grad_weight.g"))}


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    recipe: Recipe,
    *,
    training: bool = True,
    defer: bool = False,
    backend: str = "",
) -> Tensor:
    """`torch.nn.functional.linear` by a recipe.

    Args:
        x: (..., I) of any float dtype; sample = the first axis, token = the axes between.
        weight: (O, I).
        bias: (O,) or None; added in float32.
        training: whether a random key may be drawn when gradients are disabled, see the module's text.
        defer: whether the result may be a `Deferred`, where that is possible.
        backend: the one that must serve every low-bit operator of the call, "" for the fastest that does.

    Returns:
        (..., O) in x's dtype, or autocast's when that is on.
    """
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: input of shape {tuple(x.shape)} does not fit weight {tuple(weight.shape)}: "
            f"the input's last axis must be {weight.shape[-1]}"
        )
    n = x.shape[0] if x.dim() > 1 else 1
    positions = 1
    for size in x.shape[1:-1]:
        positions *= size
    x_NPC, signs = signs_of(x, recipe) if x.dim() == 2 else (None, None)
    if x_NPC is None:
        x_NPC = x.reshape(n, positions, x.shape[-1])
    defer = defer and x.dim() == 2 and possible(x)
    y_NPO, source = _layer(x_NPC, weight.unsqueeze(1), bias, recipe, None, training, signs, defer, backend)
    if source is not None:
        return Deferred.make(source, y_NPO, None, Windows(1, 1), rows)
    return y_NPO.reshape(*x.shape[:-1], weight.shape[0])


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    recipe: Recipe,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    training: bool = True,
    defer: bool = False,
    backend: str = "",
) -> Tensor:
    """`torch.nn.functional.conv2d` by a recipe.

    Args:
        x: (N, I, H, W) or (I, H, W), any float dtype and memory format.
        weight: (O, I/groups, kh, kw).
        padding: zeros at the top, bottom, left and right.
        defer: whether the result may be a `Deferred`, where that is possible.

    Returns:
        (N, O, H', W') in x's dtype (or autocast's) and memory format.
    """
    if weight.dim() != 4 or weight.shape[0] % groups:
        raise ValueError(
            f"conv2d: weight of shape {tuple(weight.shape)} with groups={groups}: expected (O, I/groups, kh, kw), O a multiple "
            f"of groups"
        )
    if x.dim() not in (3, 4) or x.shape[-3] != weight.shape[1] * groups:
        raise ValueError(
            f"conv2d: input of shape {tuple(x.shape)} does not fit weight {tuple(weight.shape)} with groups={groups}: "
            f"expected (N, {weight.shape[1] * groups}, H, W)"
        )
    x_NPC, signs = signs_of(x, recipe)
    last = x.shape_of is images_last if isinstance(x, Deferred) else None
    x_NCHW = x if x.dim() == 4 else x.unsqueeze(0)
    n, _, height, width = x_NCHW.shape
    kernel = (weight.shape[2], weight.shape[3])
    geometry = Geometry(height, width, kernel, stride, padding, dilation, groups)
    out_height, out_width = geometry.output_size
    if out_height < 1 or out_width < 1:
        raise ValueError(
            f"conv2d: a {kernel[0]}x{kernel[1]} window (dilation {dilation}) does not fit the padded "
            f"{height}x{width} input: enlarge the input or the padding"
        )
    if x_NPC is None:
        x_NPC = x_NCHW.flatten(2).transpose(1, 2)
    last = channels_last(x_NCHW) if last is None else last
    w_OKI = weight.flatten(2).transpose(1, 2)
    defer = defer and x.dim() == 4 and possible(x)
    y_NPO, source = _layer(x_NPC, w_OKI, bias, recipe, geometry, training, signs, defer, backend)
    if source is not None:
        return Deferred.make(source, y_NPO, None, Windows(out_height, out_width), images_last if last else images_first)
    if last:
        y_NCHW = y_NPO.flatten().view(n, out_height, out_width, weight.shape[0]).permute(0, 3, 1, 2)
    else:
        y_NCHW = y_NPO.transpose(1, 2).flatten().view(n, weight.shape[0], out_height, out_width)
    return y_NCHW if x.dim() == 4 else y_NCHW.squeeze(0)


@dataclass(frozen=True)
class _Call:
    """What a call computes, beside its tensors."""

    recipe: Recipe
    geometry: Geometry | None
    x_shape: Shape3
    w_shape: Shape3
    x_dtype: torch.dtype
    w_dtype: torch.dtype
    defer: bool
    signs: bool
    backend: str

    def made(self, name: str) -> bool:
        """Whether the forward encodes this operand, rather than taking codes made before or the float tensor."""
        product, letter = name.split(".")
        return self.recipe.quantizer(product, letter) is not None and not self.recipe.saved(product, letter)

    def qtensors(self, flat: Sequence[Tensor]) -> dict[str, QTensor]:
        """Operand name -> its codes, from the flat tensors of those that `made` says were made."""
        found: dict[str, QTensor] = {}
        for name in FORWARD_OPERANDS:
            product, letter = name.split(".")
            format = self.recipe.format(product, letter)
            if format is None:
                continue
            if self.made(name):
                shape = self.x_shape if letter == "x" else self.w_shape
                found[name] = QTensor.from_tensors(flat[:4], format, shape)
                flat = flat[4:]
            else:
                found[name] = found[f"output.{letter}"]
        return found


def _layer(
    x_NPC: Tensor,
    w_OKI: Tensor,
    bias: Tensor | None,
    recipe: Recipe,
    geometry: Geometry | None,
    training: bool,
    signs: tuple[QTensor, Tensor] | None,
    defer: bool,
    backend: str,
) -> tuple[Tensor, Source | None]:
    """y (N, P', O); or with `defer`, where the product is one of signs, a placeholder and the accumulators behind it."""
    for name, tensor in (("input", x_NPC), ("weight", w_OKI)):
        if not tensor.is_floating_point():
            raise TypeError(f"the {name} is {tensor.dtype}, not a float tensor: convert it, for instance by .float()")
    if x_NPC.device != w_OKI.device:
        raise ValueError(f"the input is on {x_NPC.device}, the weight on {w_OKI.device}: move one of them")
    dtype = _output_dtype(x_NPC)
    key = torch.ops.fqt.draw_key(x_NPC) if recipe.random and (training or torch.is_grad_enabled()) else None
    plain_w_OKI, w_quantizer = w_OKI, recipe.quantizer("output", "w")
    if w_quantizer is not None:
        w_OKI = transformed(w_OKI, w_quantizer)
    x_shape = (x_NPC.shape[0], x_NPC.shape[1], x_NPC.shape[2])
    w_shape = (w_OKI.shape[0], w_OKI.shape[1], w_OKI.shape[2])
    defer = defer and accumulates(recipe) and w_shape[1] * w_shape[2] < 1 << 15
    call = _Call(recipe, geometry, x_shape, w_shape, x_NPC.dtype, w_OKI.dtype, defer, signs is not None, backend)

    masks = {"x": x_NPC.new_empty(0, dtype=torch.uint8), "w": x_NPC.new_empty(0, dtype=torch.uint8)}
    flat: list[Tensor] = []
    for name in FORWARD_OPERANDS:
        product, letter = name.split(".")
        quantizer = recipe.quantizer(product, letter)
        if quantizer is None or not call.made(name):
            continue
        if not training:
            quantizer = replace(quantizer, stochastic=False)
        if name == "output.x" and signs is not None:
            flat += signs[0].tensors()
            masks["x"] = signs[1]
            continue
        value = (x_NPC if letter == "x" else w_OKI).detach()
        if product == "grad_input" and quantizer.transform:
            value = transformed(plain_w_OKI.detach(), quantizer)
        q, mask = quantize(value, quantizer, letter, key=key, stream=STREAM[name], backend=backend)
        flat += q.tensors()
        if product == "output":
            masks[letter] = mask
    run = _Products.apply if keeps_graph(x_NPC, w_OKI, bias) else _Products.forward
    y = run(x_NPC, w_OKI, bias, key, masks["x"], masks["w"], call, *flat)
    if isinstance(y, Tensor):
        return y.to(dtype), None
    y_NPO, sums = y
    q = call.qtensors(flat)
    scale = (q["output.x"].scale * q["output.w"].scale).expand(w_OKI.shape[0]).contiguous()
    return y_NPO, Source(sums, scale, None if bias is None else bias.detach().float())


def keeps_graph(*inputs: Tensor | None) -> bool:
    """Whether a call must go through autograd. Where it need not, it must not while torch.compile looks on: torch 2.14 then
    hands a Function with `setup_context` a context in place of its first argument."""
    if not torch.is_grad_enabled() or not torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    return any(tensor is not None and tensor.requires_grad for tensor in inputs)


def _output_dtype(x: Tensor) -> torch.dtype:
    """The input's, or autocast's, which leaves float64 alone."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


class _Products(torch.autograd.Function):
    """output in the forward, grad_input and grad_weight in the backward."""

    @staticmethod
    def forward(
        x_NPC: Tensor,
        w_OKI: Tensor,
        bias: Tensor | None,
        key: Tensor | None,
        x_mask: Tensor,
        w_mask: Tensor,
        call: _Call,
        *flat: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        q = call.qtensors(flat)
        if call.defer:
            operands = (*_operand(q["output.x"]), *_operand(q["output.w"]))
            sums = torch.ops.fqt.accumulate(*operands, _flat(call.geometry), backend=call.backend)
            return placeholder(sums, tuple(sums.shape)), sums
        if call.recipe.low_bit("output"):
            return _output(call, q["output.x"], q["output.w"], bias)
        x_NPC = q["output.x"].decode().to(call.x_dtype) if "output.x" in q else x_NPC
        w_OKI = (q["output.w"].decode() if "output.w" in q else w_OKI).to(call.x_dtype)
        y_NPO = multiply_output(x_NPC, w_OKI, call.geometry)
        return y_NPO if bias is None else y_NPO + bias.to(y_NPO.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x_NPC, w_OKI, _, key, x_mask, w_mask, call, *flat = inputs
        needs_x, needs_w = ctx.needs_input_grad[:2]
        q = call.qtensors(flat)
        # each side keeps only what its product reads, and a float tensor only where the recipe asks for one
        w = q["grad_input.w"].tensors() if "grad_input.w" in q else [w_OKI]
        x = q["grad_weight.x"].tensors() if "grad_weight.x" in q else [x_NPC]
        saved_w = [*w, x_mask] if needs_x else []
        saved_x = [*x, w_mask] if needs_w else []
        ctx.save_for_backward(key, *saved_w, *saved_x)
        ctx.call = call
        ctx.split = len(saved_w)
        if call.defer:
            ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, g_NPO: Tensor, *_: Tensor | None):
        with torch.no_grad():
            grads = _Products._gradients(ctx, g_NPO)
        return (*once(grads), *([None] * (len(ctx.needs_input_grad) - 3)))

    @staticmethod
    def _gradients(ctx, g_NPO: Tensor) -> list[Tensor | None]:
        key, *saved = ctx.saved_tensors
        saved_w, saved_x = saved[: ctx.split], saved[ctx.split :]
        needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
        grad_x = grad_w = grad_bias = None
        if needs_x:
            grad_x = _grad_input(ctx.call, g_NPO, saved_w[:-1], saved_w[-1], key)
        if needs_w:
            grad_w = _grad_weight(ctx.call, g_NPO, saved_x[:-1], saved_x[-1], key)
        if needs_bias:
            grad_bias = g_NPO.sum((0, 1), dtype=torch.promote_types(g_NPO.dtype, torch.float32))
        return [grad_x, grad_w, grad_bias]


def _output(call: _Call, x: QTensor, w: QTensor, bias: Tensor | None) -> Tensor:
    return torch.ops.fqt.output(*_operand(x), *_operand(w), bias, _flat(call.geometry), backend=call.backend)


def _operand(q: QTensor) -> tuple[list[Tensor], str, Shape3]:
    """A QTensor as the three arguments that stand for it in an operator's schema."""
    return q.tensors(), q.format.name, q.shape


def _flat(geometry: Geometry | None) -> list[int]:
    return [] if geometry is None else geometry.flat()


def _grad_input(call: _Call, g_NPO: Tensor, saved: list[Tensor], mask: Tensor, key: Tensor | None) -> Tensor:
    """dX = G W in x's dtype, times the estimator's mask of x."""
    recipe, geometry = call.recipe, call.geometry
    format, quantizer = recipe.format("grad_input", "w"), recipe.quantizer("grad_input", "g")
    w = None if format is None else QTensor.from_tensors(saved, format, call.w_shape)
    if w is not None and quantizer is not None and recipe.low_bit("grad_input"):
        fold = None
        if recipe.place("grad_input", "w", "conv" if geometry else "linear") == "folded":
            fold, w = spread(w.scale, w).permute(1, 2, 0), _unscaled(w)
        g = _codes(call, g_NPO, quantizer, key, "grad_input.g", fold)
        operands = (*_operand(g), *_operand(w), mask)
        grad = torch.ops.fqt.grad_input(*operands, call.x_shape, _flat(geometry), backend=call.backend).to(call.x_dtype)
        if call.signs and g.index is not None and g.format.axes == "N":
            remember_kept(grad, g.index)
        return grad
    w_OKI = saved[0] if w is None else w.decode()
    g_NPO = _float_gradient(call, g_NPO, quantizer, key, "grad_input.g")
    grad = multiply_grad_input(g_NPO, w_OKI.to(g_NPO.dtype), call.x_shape[2], geometry)
    return (apply_mask(grad, mask) if mask.numel() else grad).to(call.x_dtype)


def _grad_weight(call: _Call, g_NPO: Tensor, saved: list[Tensor], mask: Tensor, key: Tensor | None) -> Tensor:
    """dW = G^T X in w's dtype, times the estimator's mask of w."""
    recipe, geometry = call.recipe, call.geometry
    format, quantizer = recipe.format("grad_weight", "x"), recipe.quantizer("grad_weight", "g")
    x = None if format is None else QTensor.from_tensors(saved, format, call.x_shape)
    if x is not None and quantizer is not None and recipe.low_bit("grad_weight"):
        fold = None
        if recipe.place("grad_weight", "x", "conv" if geometry else "linear") == "folded":
            fold, x = spread(x.scale, x), _unscaled(x)
        g = _codes(call, g_NPO, quantizer, key, "grad_weight.g", fold)
        grad = torch.ops.fqt.grad_weight(*_operand(g), *_operand(x), _flat(geometry), backend=call.backend)
    else:
        x_NPC = saved[0] if x is None else x.decode()
        g_NPO = _float_gradient(call, g_NPO, quantizer, key, "grad_weight.g")
        grad = multiply_grad_weight(g_NPO, x_NPC.to(g_NPO.dtype), geometry)
    return (apply_mask(grad, mask) if mask.numel() else grad).to(call.w_dtype)


def _float_gradient(call: _Call, g_NPO: Tensor, quantizer: Quantizer | None, key: Tensor | None, name: str) -> Tensor:
    """The gradient for a float product: as it is, or the values of its codes."""
    if quantizer is None:
        return g_NPO
    return _codes(call, g_NPO, quantizer, key, name, None).decode().to(g_NPO.dtype)


def _codes(call: _Call, g_NPO: Tensor, quantizer: Quantizer, key: Tensor | None, name: str, fold: Tensor | None) -> QTensor:
    """The gradient's codes; whoever wrote it may have found its ranges on the way."""
    known = ranges(g_NPO, quantizer.format("g").axes, fold)
    stream = STREAM[name]
    return quantize(g_NPO, quantizer, "g", key=key, stream=stream, fold=fold, ranges=known, backend=call.backend)[0]


def _unscaled(q: QTensor) -> QTensor:
    """The codes with scale 1, their own scale having been folded into the other operand."""
    return replace(q, scale=q.scale.new_ones(1), format=replace(q.format, axes=""))
