"""Deferred: an activation that is not computed until somebody needs its floats, and a 1-bit layer does not.

Between two 1-bit convolutions stand a BatchNorm, an activation that the recipe took out, perhaps a max-pooling. The next layer
reads two bits of the result (its sign, and whether the estimator passes), so the float output of the convolution, the
normalized and the pooled tensor need never be written: the convolution keeps its int16 accumulators, BatchNorm their
statistics, and the next layer asks for the signs. The backward runs over the same accumulators.

A `Deferred` has the shape, dtype and graph of the tensor that it stands for, and a NaN in every place. A layer that knows what
to do takes what is behind it (`source`, `norm`, `windows`); for everyone else it computes itself: any torch function that
meets one gets the float tensor in its place. So no module needs to know its neighbours, and nothing depends on how a
model's forward is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fqt.fusion.norm_ops  # noqa: F401  registers torch.ops.fqt.norm_*
from fqt.autograd import once
from fqt.formats import Format
from fqt.functional import channels_last
from fqt.notes import kept_samples, note_ranges
from fqt.operand import Encoded
from fqt.products import Accumulated, Taken, placeholder
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
# what changes the tensor itself, so that whoever reads it later must see the change
_LASTING = {"retain_grad", "register_hook", "requires_grad_", "backward", "__set__", "register_post_accumulate_grad_hook"}


@dataclass(frozen=True)
class Norm:
    """A batch normalization with its statistics, ready to be applied.

    Attributes:
        affine: (4, C) float32, rows a, b, mean and inv of `fqt.reference.norm`.
        weight, bias: (C,) gamma and beta, with their graph.
        batch: whether the statistics are the batch's, and the gradient flows through them.
        backend: the one that must serve, "" for the fastest that does.
    """

    affine: Tensor
    weight: Tensor
    bias: Tensor
    batch: bool
    backend: str


class Deferred(Tensor):
    """See the module's text. Its autograd graph is that of the tensor that it stands for.

    Attributes:
        source: y, canonical (N, P, C): what the convolution accumulated, or floats.
        norm: what follows, None if nothing.
        windows: the images' size and the pooling that follows `norm`.
        shape_of: from canonical (N, P', C) to the shape that the module's caller expects.
        graph, placeholder: (N, P, C), y and the deferred tensor itself with their graphs, as long as `grad_fn` is `made_by`.
        changed: the float tensor, once it was changed in place.
    """

    source: Source
    norm: Norm | None
    windows: Windows
    shape_of: Callable[[Tensor, Windows], Tensor]
    graph: Tensor
    placeholder: Tensor
    made_by: Any
    changed: Tensor | None

    @staticmethod
    def make(
        source: Source, graph: Tensor, norm: Norm | None, windows: Windows, shape_of: Callable[[Tensor, Windows], Tensor]
    ) -> Deferred:
        if norm is not None:
            z_NPC = _Normalize.apply(graph, norm.weight, norm.bias, *source.tensors(), norm, windows)
        else:
            z_NPC = graph
        with torch._C.DisableTorchFunctionSubclass():
            made = shape_of(z_NPC, windows).as_subclass(Deferred)  # type: ignore[arg-type]
            made.made_by = made.grad_fn
        made.source, made.norm, made.windows, made.shape_of = source, norm, windows, shape_of
        made.graph, made.placeholder, made.changed = graph, z_NPC, None
        return made

    def value(self) -> Tensor:
        """The float tensor, with its graph."""
        if self.changed is not None:
            return self.changed
        with torch.set_grad_enabled(self.requires_grad):  # as a tensor keeps its graph where none is being recorded
            return _Value.apply(_plain(self), self)  # type: ignore[return-value]

    def signs(self, low: float, high: float) -> tuple[Tensor, QTensor, Tensor]:
        """A placeholder (N, P', C) with the graph, the signs, and the packed mask low <= z <= high."""
        assert self.norm is not None
        args = (*self.source.tensors(), self.norm.affine, self.windows.flat(), low, high)
        codes, mask, scale = torch.ops.fqt.norm_sign(*args, backend=self.norm.backend)
        z_NPC = self.canonical()
        shape = (z_NPC.shape[0], z_NPC.shape[1], z_NPC.shape[2])
        return z_NPC, QTensor(codes, scale, None, None, Format("sign", 1), shape), mask

    def canonical(self) -> Tensor:
        """The placeholder (N, P', C) with the graph, without a view between where there need not be one."""
        return self.placeholder if self.whole() else _canonical(_plain(self))

    def whole(self) -> bool:
        """Whether nothing happened to it since it was made, so that more can be deferred."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.changed is None and self.grad_fn is self.made_by

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        name = func.__name__
        lasting = name in _LASTING or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*_computed(args, lasting), **_computed(kwargs or {}, lasting))


def _computed(tree: Any, lasting: bool) -> Any:
    """The arguments with a float tensor in place of each Deferred."""
    if isinstance(tree, Deferred):
        value = tree.value()
        if lasting:
            tree.changed = value
        return value
    if isinstance(tree, dict):
        return {key: _computed(item, lasting) for key, item in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_computed(item, lasting) for item in tree)
    return tree


def possible(x: Tensor) -> bool:
    """Whether activations may be deferred: eager, plain float32 where kernels serve them, outside autocast and torch.func."""
    device = x.device.type
    return (
        not torch.compiler.is_compiling()
        and serves(device)
        and type(x) in (Tensor, nn.Parameter, Deferred)
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu" if device == "meta" else device)
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
    )


def serves(device: str) -> bool:
    """Whether a type of device has kernels of `fqt.reference.norm`; the reference itself is slower than torch's own."""
    return device in ("cpu", "meta") or (device == "cuda" and triton.refuses() is None)


def batch_norm(x: Tensor, norm: nn.modules.batchnorm._BatchNorm, backend: str) -> Tensor | None:
    """`norm(x)` as a Deferred, statistics taken and running averages moved; None where torch has to do it.

    Args:
        x: (N, C) or (N, C, H, W).
        backend: the one that must serve, "" for the fastest that does.
    """
    if not possible(x) or not (norm.affine and norm.track_running_stats) or norm.momentum is None:
        return None
    if norm.weight.dtype != torch.float32 or x.dim() not in (2, 4) or x.shape[1] != norm.num_features:
        return None
    assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
    if isinstance(x, Deferred) and x.norm is None and x.changed is None:
        source, graph, windows, shape_of = x.source, x.canonical(), x.windows, x.shape_of
    else:
        x = x.value() if isinstance(x, Deferred) else x
        graph = _canonical(x).contiguous()
        windows, shape_of = (Windows(1, 1), rows) if x.dim() == 2 else (Windows(x.shape[2], x.shape[3]), images(x))
        source = Source(graph.detach())
    count = source.y.shape[0] * source.y.shape[1]
    if count < 2:  # torch refuses it in training
        return None
    with torch.no_grad():
        if norm.training:
            mean, square = torch.ops.fqt.norm_sums(*source.tensors(), backend=backend) / count
            var = (square - mean * mean).clamp(min=0)
            norm.num_batches_tracked += 1
            norm.running_mean.lerp_(mean.float(), norm.momentum)
            norm.running_var.lerp_((var * (count / (count - 1))).float(), norm.momentum)
        else:
            mean, var = norm.running_mean.double(), norm.running_var.double()
        mean, inv = mean.float(), (var + norm.eps).sqrt().reciprocal().float()
        a = norm.weight * inv
        affine = torch.stack([a, norm.bias - mean * a, mean, inv])
    return Deferred.make(source, graph, Norm(affine, norm.weight, norm.bias, norm.training, backend), windows, shape_of)


def max_pool(x: Tensor, pool: nn.MaxPool2d) -> Tensor | None:
    """`pool(x)` of a normalized, deferred x as a Deferred; None where torch has to do it."""
    if not isinstance(x, Deferred) or x.norm is None or not x.whole() or x.dim() != 4:
        return None
    if x.windows.kernel != (1, 1) or pool.return_indices:
        return None
    kernel, stride = _pair(pool.kernel_size), _pair(pool.stride)
    whole = x.windows.height % kernel[0] == 0 and x.windows.width % kernel[1] == 0
    if kernel != stride or _pair(pool.padding) != (0, 0) or _pair(pool.dilation) != (1, 1) or not (whole or pool.ceil_mode):
        return None
    windows = Windows(x.windows.height, x.windows.width, kernel)
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
        """Of a deferred x: a placeholder with its graph, and its signs with their mask; None if the recipe reads more."""
        quantizer = recipe.quantizer("output", "x")
        if not isinstance(x, Deferred) or quantizer is None or not _plain_sign(quantizer) or recipe.output.transform:
            return None
        if not recipe.saved("grad_weight", "x") or quantizer.pass_range is None or x.norm is None or x.changed is not None:
            return None
        z_NPC, q, mask = x.signs(*quantizer.pass_range)
        return Taken(z_NPC, Encoded(q, mask), x.shape_of is images_last)

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


def _plain(x: Deferred) -> Tensor:
    """The placeholder as it is, with its graph."""
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor)  # type: ignore[arg-type]


def _canonical(x: Tensor) -> Tensor:
    """(N, C) or (N, C, H, W) as (N, P, C)."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(2).transpose(1, 2)


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
    y_NCP = y_NPC.transpose(1, 2)
    return (y_NCP if y_NPC.stride() == (0, 0, 0) else y_NCP.contiguous()).unflatten(2, windows.pooled_size)


class _Value(torch.autograd.Function):
    """The floats that a Deferred stands for, in the graph of its placeholder."""

    @staticmethod
    def forward(ctx, placeholder: Tensor, x: Deferred) -> Tensor:
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
        return g, None


class _Normalize(torch.autograd.Function):
    """A placeholder for z (N, P', C), and the gradients of y, gamma and beta."""

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
    ) -> Tensor:
        ctx.save_for_backward(y, scale, offset, norm.affine)
        ctx.batch, ctx.backend, ctx.windows = norm.batch, norm.backend, windows
        height, width = windows.pooled_size
        return placeholder(y, (y.shape[0], height * width, y.shape[2]))

    @staticmethod
    def backward(ctx, g: Tensor):
        y, scale, offset, affine = ctx.saved_tensors
        with torch.no_grad():
            args = (g.contiguous(), kept_samples(g), y, scale, offset, affine, ctx.windows.flat())
            sums = torch.ops.fqt.norm_grad_sums(*args, backend=ctx.backend)
            dy = None
            if ctx.needs_input_grad[0]:
                means = (sums / (y.shape[0] * y.shape[1])).float() if ctx.batch else affine.new_zeros(2, y.shape[2])
                dy, low, high = torch.ops.fqt.norm_grad(*args, means, backend=ctx.backend)
                note_ranges(dy, low, high)
            d_bias, d_weight = sums.float()
        return *once([dy, d_weight, d_bias]), *[None] * 5
