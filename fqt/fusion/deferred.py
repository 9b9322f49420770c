"""Deferred: an activation that is not computed until somebody needs its floats, and a 1-bit layer does not.

Between two 1-bit convolutions stand a BatchNorm, an activation that the recipe took out, perhaps a max-pooling. The next layer
reads two bits of the result (its sign, and whether the estimator passes), so the float output of the convolution, the
normalized and the pooled tensor need never be written: the convolution keeps its int16 accumulators, BatchNorm their
statistics, and the next layer asks for the signs. The backward runs over the same accumulators.

A `Deferred` has the shape, dtype and place in the graph of the tensor that it stands for, and no storage. A layer that knows
what to do takes what is behind it (`source`, `norm`, `windows`); for everyone else it computes itself, once: any torch function
that meets one gets the float tensor in its place, and so does any operator that is called past torch functions. Gradients flow
through the Deferred itself, so it can be hooked, and asked for, as any other tensor. So no module needs to know its
neighbours, and nothing depends on how a model's forward is written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fqt.fusion.norm_ops  # noqa: F401  registers torch.ops.fqt.norm_*
from fqt.autograd import once
from fqt.formats import Format
from fqt.functional import channels_last
from fqt.fusion.constants import Norm, affine_of, constants_of
from fqt.notes import carry_note, kept_samples, note_ranges
from fqt.operand import Encoded
from fqt.products import Accumulated, Taken
from fqt.qtensor import QTensor
from fqt.quantizers import Quantizer
from fqt.recipe import Recipe
from fqt.reference.norm import Source, Windows
from fqt.triton_kernels import plan as triton

# what a tensor is asked without needing its values
_DESCRIPTIONS = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "requires_grad", "ndim", "layout", "is_leaf", "is_cuda", "grad_fn")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__}
# what is about its gradient, for which it stands itself in the graph
_GRADIENTS = (
    {torch.autograd.grad, Tensor.backward, Tensor.register_hook, Tensor.retain_grad, Tensor.requires_grad_}
    | {getattr(Tensor, name).__get__ for name in ("grad", "retains_grad")}
    | {getattr(Tensor, name).__set__ for name in ("grad", "requires_grad")}
)
_SET_DATA = getattr(Tensor, "data").__set__  # noqa: B009


class Deferred(Tensor):
    """See the module's text.

    Attributes:
        source: y, canonical (N, P, C): what the convolution accumulated, or floats.
        graph: y in the shape of the module's input or output, with its graph. Where none is kept it may be any tensor.
        norm: what follows, None if nothing.
        windows: the images' size and the pooling that follows `norm`.
        shape_of: from canonical (N, P', C) to the shape that the module's caller expects.
        watched: whether a hook has seen it, which may ask for its gradient.
        passed_over: whether a pooling took what is behind it, so that the gradient does not pass here.
        floats: the float tensor with its graph, once somebody needed it.
        version: of `floats` when it was computed.
    """

    source: Source
    graph: Tensor
    norm: Norm | None
    windows: Windows
    shape_of: Callable[[Tensor, Windows], Tensor]
    watched: bool
    passed_over: bool
    floats: Tensor | None
    version: int

    @staticmethod
    def make(
        source: Source, graph: Tensor, norm: Norm | None, windows: Windows, shape_of: Callable[[Tensor, Windows], Tensor]
    ) -> Deferred:
        if not torch.is_grad_enabled():
            return Deferred.without_storage(source, graph, norm, windows, shape_of)
        if norm is None:
            return _Accumulate.apply(graph, source, windows, shape_of)  # type: ignore[return-value]
        return _Normalize.apply(graph, norm.weight, norm.bias, *source.tensors(), norm, windows, shape_of)  # type: ignore

    @staticmethod
    def without_storage(
        source: Source, graph: Tensor, norm: Norm | None, windows: Windows, shape_of: Callable[[Tensor, Windows], Tensor]
    ) -> Deferred:
        """One that stands in no graph yet."""
        height, width = windows.pooled_size
        n, c = source.y.shape[0], source.y.shape[2]
        p = height * width
        strides = (c, 1) if shape_of is rows else (c * p, 1, c * width, c) if shape_of is images_last else (c * p, p, width, 1)
        shape = (n, c) if shape_of is rows else (n, c, height, width)
        made: Deferred = Tensor._make_wrapper_subclass(
            Deferred, shape, strides=strides, dtype=torch.float32, device=source.y.device
        )
        made.source, made.graph, made.norm, made.windows, made.shape_of = source, graph, norm, windows, shape_of
        made.watched, made.passed_over, made.floats, made.version = False, False, None, 0
        return made

    def value(self) -> Tensor:
        """The float tensor, with its graph."""
        if self.floats is None:
            with torch.set_grad_enabled(self.requires_grad):  # as a tensor keeps its graph where none is being recorded
                self.floats = _Value.apply(self)
            assert self.floats is not None
            self.version = 0 if self.floats.is_inference() else self.floats._version
        return self.floats

    def signs(self, low: float, high: float) -> tuple[QTensor, Tensor]:
        """The signs, and the packed mask low <= z <= high; an empty one in an evaluation without gradients."""
        assert self.norm is not None
        if self.norm.constants is not None and not torch.is_grad_enabled():
            q = self.norm.constants.signs(self.source, self.windows, self.norm.backend)
            if q is not None:
                return q, q.codes.new_empty(0)
        args = (*self.source.tensors(), self.norm.affine, self.windows.flat(), low, high)
        codes, mask, scale = torch.ops.fqt.norm_sign(*args, backend=self.norm.backend)
        height, width = self.windows.pooled_size
        shape = (self.source.y.shape[0], height * width, self.source.y.shape[2])
        return QTensor(codes, scale, None, None, Format("sign", 1), shape), mask

    def whole(self) -> bool:
        """Whether it surely still is what is behind it: nobody wrote to it, or to a view; an inference tensor does not tell."""
        return self.floats is None or (not self.floats.is_inference() and self.floats._version == self.version)

    def asked(self) -> bool:
        """Whether somebody may want its gradient."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.watched or self.retains_grad or bool(self._backward_hooks)

    def in_graph(self) -> Tensor:
        """The tensor whose gradient is that of the activation."""
        if self.passed_over:
            raise RuntimeError(
                "the gradient of this activation is not computed: the max-pooling behind it does its own step and this one at "
                "once. Register the hook that keeps it on the module before its forward, or convert with fuse=False"
            )
        return self if self.whole() else self.value()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _GRADIENTS:
            args, kwargs = _each(args, Deferred.in_graph), _each(kwargs, Deferred.in_graph)
        elif func not in _DESCRIPTIONS:
            of_args = _each(args, Deferred.value), _each(kwargs, Deferred.value)
            if func == _SET_DATA:  # which no version counts
                args[0].version = -1
            args, kwargs = of_args
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            raise RuntimeError(
                f"{func} would change an activation that is not computed yet, past torch functions: clone it first, or convert "
                f"with fuse=False"
            )
        kwargs = kwargs or {}
        return func(*_each(args, lambda x: x.value().detach()), **_each(kwargs, lambda x: x.value().detach()))


def _each(tree: Any, change: Callable[[Deferred], Tensor]) -> Any:
    """The arguments with something else in place of each Deferred."""
    if isinstance(tree, Deferred):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _each(item, change) for key, item in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_each(item, change) for item in tree)
    return tree


def possible(x: Tensor) -> bool:
    """Whether activations may be deferred: eager, plain float32 where kernels serve them, outside autocast and torch.func."""
    device = (x.source.y if isinstance(x, Deferred) else x).device.type
    return (
        not torch.compiler.is_compiling()
        and serves(device)
        and (isinstance(x, Deferred) or (type(x) in (Tensor, nn.Parameter) and x.dtype == torch.float32))
        and not torch.is_autocast_enabled("cpu" if device == "meta" else device)
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
    )


def serves(device: str) -> bool:
    """Whether a type of device has kernels of `fqt.reference.norm`; the reference itself is slower than torch's own."""
    return device in ("cpu", "meta") or (device == "cuda" and triton.refuses() is None)


def batch_norm(x: Tensor, norm: nn.modules.batchnorm._BatchNorm, backend: str) -> Deferred | None:
    """`norm(x)` as a Deferred, statistics taken and running averages moved; None where torch has to do it.

    Args:
        x: (N, C) or (N, C, H, W).
        backend: the one that must serve, "" for the fastest that does.
    """
    if not possible(x) or not (norm.affine and norm.track_running_stats) or norm.momentum is None:
        return None
    shape = x.shape
    if norm.weight.dtype != torch.float32 or len(shape) not in (2, 4) or shape[1] != norm.num_features:
        return None
    assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
    if isinstance(x, Deferred) and x.norm is None and x.whole():
        source, windows, shape_of = x.source, x.windows, x.shape_of
    else:
        x = x.value() if isinstance(x, Deferred) else x
        windows, shape_of = (Windows(1, 1), rows) if len(shape) == 2 else (Windows(shape[2], shape[3]), images(x))
        source = Source(_canonical(x.detach()).contiguous())
    count = source.y.shape[0] * source.y.shape[1]
    if count < 2 and norm.training:  # torch's own module refuses it with a message
        return None
    constants, recording = None, torch.is_grad_enabled()  # Tensors kept from inference_mode cannot be saved for a backward.
    with torch.no_grad():
        if norm.training:
            mean, square = torch.ops.fqt.norm_sums(*source.tensors(), backend=backend) / count
            var = (square - mean * mean).clamp(min=0)
            norm.num_batches_tracked += 1
            norm.running_mean.lerp_(mean.float(), norm.momentum)
            norm.running_var.lerp_((var * (count / (count - 1))).float(), norm.momentum)
            affine = affine_of(norm, mean, var)
        elif recording or source.y.device.type != "cpu":  # Comparing values of a GPU would wait for the GPU.
            affine = affine_of(norm, norm.running_mean.double(), norm.running_var.double())
        else:
            constants = constants_of(norm)
            affine = constants.affine
    made = Norm(affine, norm.weight, norm.bias, norm.training, backend, constants)
    return Deferred.make(source, x, made, windows, shape_of)


def max_pool(x: Tensor, pool: nn.MaxPool2d) -> Tensor | None:
    """`pool(x)` of a normalized, deferred x as a Deferred; None where torch has to do it."""
    if not isinstance(x, Deferred) or x.norm is None or not x.whole() or x.dim() != 4 or x.asked():
        return None
    if x.windows.kernel != (1, 1) or pool.return_indices:
        return None
    kernel, stride = _pair(pool.kernel_size), _pair(pool.stride)
    whole = x.windows.height % kernel[0] == 0 and x.windows.width % kernel[1] == 0
    if kernel != stride or _pair(pool.padding) != (0, 0) or _pair(pool.dilation) != (1, 1) or not (whole or pool.ceil_mode):
        return None
    windows = Windows(x.windows.height, x.windows.width, kernel)
    x.passed_over = True
    return Deferred.make(x.source, x.graph, x.norm, windows, x.shape_of)


def _plain_sign(quantizer: Quantizer) -> bool:
    return quantizer.grid == "sign" and quantizer.calibrate == "none" and not quantizer.stages


def accumulates(recipe: Recipe) -> bool:
    """Whether the output is a product of signs, of which only the weights' have a scale."""
    x, w = recipe.quantizer("output", "x"), recipe.quantizer("output", "w")
    plain = recipe.output.transform is None
    return plain and x is not None and w is not None and _plain_sign(x) and w.grid == "sign" and not w.block


class Between:
    """What hands activations from layer to layer without computing them: see `fqt.functional.Fusion`."""

    @staticmethod
    def take(x: Tensor, recipe: Recipe) -> Taken | None:
        """Of a deferred x: its place in the graph, and its signs with their mask; None if the recipe reads more."""
        quantizer = recipe.quantizer("output", "x")
        if not isinstance(x, Deferred) or quantizer is None or not _plain_sign(quantizer) or recipe.output.transform:
            return None
        if not recipe.saved("grad_weight", "x") or quantizer.pass_range is None or x.norm is None or not x.whole():
            return None
        q, mask = x.signs(*quantizer.pass_range)
        return Taken(x, partial(_in_shape, shape=x.shape), Encoded(q, mask), x.shape_of is images_last)

    @staticmethod
    def gives(x: Tensor, recipe: Recipe) -> bool:
        """Whether a layer with this input may leave its accumulators to what follows."""
        return possible(x) and accumulates(recipe)

    @staticmethod
    def give(accumulated: Accumulated, size: tuple[int, int] | None, channels_last: bool) -> Tensor:
        """The output, deferred."""
        source = Source(accumulated.sums, accumulated.scale, accumulated.bias)
        windows = Windows(1, 1) if size is None else Windows(*size)
        shape_of = rows if size is None else images_last if channels_last else images_first
        return Deferred.make(source, accumulated.y_NPO, None, windows, shape_of)


def _pair(size: int | tuple[int, ...]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _canonical(x: Tensor) -> Tensor:
    """(N, C) or (N, C, H, W) as (N, P, C)."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(2).transpose(1, 2)


def _in_shape(g_NPC: Tensor, shape: torch.Size) -> Tensor:
    """(N, P, C) in the shape of what `_canonical` was given, as a view, with what is known of it."""
    g = g_NPC.squeeze(1) if len(shape) == 2 else g_NPC.transpose(1, 2).unflatten(2, shape[2:])
    return carry_note(g_NPC, g)


def images(x_NCHW: Tensor) -> Callable[[Tensor, Windows], Tensor]:
    """The way from (N, P, C) to images in the memory format of these."""
    return images_last if channels_last(x_NCHW) else images_first


def rows(y_NPC: Tensor, windows: Windows) -> Tensor:
    """(N, 1, C) as (N, C)."""
    return y_NPC.squeeze(1)


def images_last(y_NPC: Tensor, windows: Windows) -> Tensor:
    """(N, P, C) as (N, C, H, W) in channels_last."""
    return y_NPC.transpose(1, 2).unflatten(2, windows.pooled_size)


def images_first(y_NPC: Tensor, windows: Windows) -> Tensor:
    """(N, P, C) as contiguous (N, C, H, W)."""
    return y_NPC.transpose(1, 2).contiguous().unflatten(2, windows.pooled_size)


class _Value(torch.autograd.Function):
    """The floats that a Deferred stands for."""

    @staticmethod
    def forward(ctx, x: Deferred) -> Tensor:
        y, scale, offset = x.source.tensors()
        if x.norm is not None:
            args = (y, scale, offset, x.norm.affine, x.windows.flat())
            y = torch.ops.fqt.norm_value(*args, backend=x.norm.backend)
        elif scale is not None:
            y = y.float() * scale
            y = y if offset is None else y + offset
        return x.shape_of(y, x.windows).data  # not as a view: whoever adds to it in place would pay for a copy in the backward

    @staticmethod
    def backward(ctx, g: Tensor):
        return g


class _Accumulate(torch.autograd.Function):
    """A Deferred for what a product of signs accumulated, y (N, P, C)."""

    @staticmethod
    def forward(ctx, graph: Tensor, source: Source, windows: Windows, shape_of: Callable) -> Tensor:
        return Deferred.without_storage(source, graph, None, windows, shape_of)

    @staticmethod
    def backward(ctx, g: Tensor):
        return carry_note(g, _canonical(g)), None, None, None


class _Normalize(torch.autograd.Function):
    """A Deferred for z, and the gradients of y, gamma and beta."""

    @staticmethod
    def forward(
        ctx,
        graph: Tensor,
        weight: Tensor,
        bias: Tensor,
        y: Tensor,
        scale: Tensor | None,
        offset: Tensor | None,
        norm: Norm,
        windows: Windows,
        shape_of: Callable,
    ) -> Tensor:
        ctx.save_for_backward(y, scale, offset, norm.affine)
        ctx.batch, ctx.backend, ctx.windows, ctx.shape = norm.batch, norm.backend, windows, graph.shape
        return Deferred.without_storage(Source(y, scale, offset), graph, norm, windows, shape_of)

    @staticmethod
    def backward(ctx, g: Tensor):
        y, scale, offset, affine = ctx.saved_tensors
        with torch.no_grad():
            g_NPC = _canonical(g).contiguous()
            args = (g_NPC, kept_samples(g), y, scale, offset, affine, ctx.windows.flat())
            sums = torch.ops.fqt.norm_grad_sums(*args, backend=ctx.backend)
            dy = None
            if ctx.needs_input_grad[0]:
                means = (sums / (y.shape[0] * y.shape[1])).float() if ctx.batch else affine.new_zeros(2, y.shape[2])
                dy_NPC, low, high = torch.ops.fqt.norm_grad(*args, means, backend=ctx.backend)
                note_ranges(dy_NPC, low, high)
                dy = _in_shape(dy_NPC, ctx.shape)
            d_bias, d_weight = sums.float()
        return *once([dy, d_weight, d_bias]), *[None] * 6
