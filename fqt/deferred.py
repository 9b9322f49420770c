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

from fqt.autograd import once
from fqt.formats import Format
from fqt.norm import Source, Windows
from fqt.qtensor import QTensor

# what a tensor is asked without needing its values
_DESCRIPTIONS = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "requires_grad", "ndim", "layout", "is_leaf", "is_cuda", "grad_fn")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__, Tensor.stride}
# what changes the tensor itself, so that whoever reads it later must see the change
_LASTING = {"retain_grad", "register_hook", "requires_grad_", "backward", "__set__", "register_post_accumulate_grad_hook"}


@dataclass(frozen=True)
class Norm:
    """A batch normalization with its statistics, ready to be applied.

    Attributes:
        affine: (4, C) float32, rows a, b, mean and inv of `fqt.norm`.
        weight, bias: (C,) gamma and beta, with their graph.
        batch: whether the statistics are the batch's, and the gradient flows through them.
    """

    affine: Tensor
    weight: Tensor
    bias: Tensor
    batch: bool


class Deferred(Tensor):
    """See the module's text.

    Attributes:
        source: y, canonical (N, P, C): what the convolution accumulated, or floats.
        graph: (N, P, C), y with its graph (of codes: a placeholder of NaN).
        norm: what follows, None if nothing.
        windows: the images' size and the pooling that follows `norm`.
        shape_of: from canonical (N, P', C) to the shape that the module's caller expects.
    """

    source: Source
    graph: Tensor
    norm: Norm | None
    windows: Windows
    shape_of: Callable[[Tensor, Windows], Tensor]
    changed: Tensor | None

    @staticmethod
    def make(
        source: Source,
        graph: Tensor,
        norm: Norm | None,
        windows: Windows,
        shape_of: Callable[[Tensor, Windows], Tensor],
    ) -> Deferred:
        placeholder = graph if norm is None else _normalize(graph, source, norm, windows, "nothing")[0]
        with torch._C.DisableTorchFunctionSubclass():
            made = shape_of(placeholder, windows).as_subclass(Deferred)
        made.source, made.graph, made.norm, made.windows, made.shape_of = source, graph, norm, windows, shape_of
        made.changed = None
        return made

    def value(self) -> Tensor:
        """The float tensor, with its graph."""
        if self.changed is not None:
            return self.changed
        if self.norm is None:
            y_NPC = self.graph if self.source.scale is None else _Scaled.apply(self.graph, *self.source.tensors())
            return self.shape_of(y_NPC, self.windows)  # type: ignore[arg-type]
        z_NPC = _normalize(self.graph, self.source, self.norm, self.windows, "value")[0]
        return self.shape_of(z_NPC, self.windows)

    def signs(self, low: float, high: float) -> tuple[Tensor, QTensor, Tensor] | None:
        """(N, P', C) placeholder with the graph, the signs, and the packed mask low <= z <= high; None where it cannot be had
        without the floats."""
        if self.norm is None or self.changed is not None:
            return None
        graph, codes, mask, scale = _normalize(self.graph, self.source, self.norm, self.windows, "signs", low, high)
        shape = (graph.shape[0], graph.shape[1], graph.shape[2])
        return graph, QTensor(codes, scale, None, None, Format("sign", 1), shape), mask

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
    """Whether activations may be deferred: eager float32 on a CPU, outside autocast and torch.func."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
    )


def batch_norm(x: Tensor, norm: nn.modules.batchnorm._BatchNorm) -> Tensor | None:
    """`norm(x)` as a Deferred, statistics taken and running averages moved; None where torch has to do it."""
    if not possible(x) or not (norm.affine and norm.track_running_stats) or norm.momentum is None:
        return None
    if norm.weight.dtype != torch.float32 or x.dim() not in (2, 4) or x.shape[1] != norm.num_features:
        return None
    assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
    if isinstance(x, Deferred) and x.norm is None and x.changed is None:
        source, graph, windows, shape_of = x.source, x.graph, x.windows, x.shape_of
    else:
        x = x.value() if isinstance(x, Deferred) else x
        graph, windows, shape_of = _canonical(x)
        source = Source(graph.detach())
    rows = source.y.shape[0] * source.y.shape[1]
    if rows < 2:  # torch refuses it in training
        return None
    with torch.no_grad():
        if norm.training:
            mean, square = torch.ops.fqt.norm_sums(*source.tensors()) / rows
            var = (square - mean * mean).clamp(min=0)
            norm.num_batches_tracked += 1
            norm.running_mean.lerp_(mean.float(), norm.momentum)
            norm.running_var.lerp_((var * (rows / (rows - 1))).float(), norm.momentum)
        else:
            mean, var = norm.running_mean.double(), norm.running_var.double()
        mean, inv = mean.float(), (var + norm.eps).sqrt().reciprocal().float()
        a = norm.weight * inv
        affine = torch.stack([a, norm.bias - mean * a, mean, inv])
    return Deferred.make(source, graph, Norm(affine, norm.weight, norm.bias, norm.training), windows, shape_of)


def max_pool(x: Tensor, pool: nn.MaxPool2d) -> Tensor | None:
    """`pool(x)` of a normalized, deferred x as a Deferred; None where torch has to do it."""
    if not isinstance(x, Deferred) or x.norm is None or x.changed is not None or x.dim() != 4:
        return None
    if x.windows.kernel != (1, 1) or pool.return_indices:
        return None
    kernel, stride = _pair(pool.kernel_size), _pair(pool.stride)
    whole = x.windows.height % kernel[0] == 0 and x.windows.width % kernel[1] == 0
    if kernel != stride or _pair(pool.padding) != (0, 0) or _pair(pool.dilation) != (1, 1) or not (whole or pool.ceil_mode):
        return None
    windows = Windows(x.windows.height, x.windows.width, kernel)
    return Deferred.make(x.source, x.graph, x.norm, windows, x.shape_of)


def _pair(size: int | tuple[int, ...]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _canonical(x: Tensor) -> tuple[Tensor, Windows, Callable[[Tensor, Windows], Tensor]]:
    """x as contiguous (N, P, C), its windows, and the way back."""
    if x.dim() == 2:
        return x.unsqueeze(1).contiguous(), Windows(1, 1), rows
    images = images_last if x.is_contiguous(memory_format=torch.channels_last) else images_first
    return x.flatten(2).transpose(1, 2).contiguous(), Windows(x.shape[2], x.shape[3]), images


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


def placeholder(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """NaN in every place, of which only one is stored."""
    return like.new_full((), torch.nan, dtype=torch.float32).expand(shape)


class _Scaled(torch.autograd.Function):
    """Accumulators as the floats that they stand for."""

    @staticmethod
    def forward(ctx, graph: Tensor, y: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        value = y.float() * scale
        return value if offset is None else value + offset

    @staticmethod
    def backward(ctx, g: Tensor):
        return g, None, None, None


def _normalize(
    graph: Tensor, source: Source, norm: Norm, windows: Windows, wanted: str, low: float = -1.0, high: float = 1.0
) -> tuple[Tensor, ...]:
    args = (graph, norm.weight, norm.bias, *source.tensors(), norm.affine, norm.batch, windows, wanted, low, high)
    return _Normalize.apply(*args)  # type: ignore[return-value]


class _Normalize(torch.autograd.Function):
    """z, or as much of it as is wanted: "nothing" (a placeholder), "signs" (a placeholder, codes, mask, scale) or "value"."""

    @staticmethod
    def forward(
        ctx,
        graph: Tensor,
        weight: Tensor,
        bias: Tensor,
        y: Tensor,
        scale: Tensor | None,
        offset: Tensor | None,
        affine: Tensor,
        batch: bool,
        windows: Windows,
        wanted: str,
        low: float,
        high: float,
    ):
        ctx.save_for_backward(y, scale, offset, affine)
        ctx.batch, ctx.windows = batch, windows
        if wanted == "value":
            return (torch.ops.fqt.norm_value(y, scale, offset, affine, windows.flat()),)
        height, width = windows.pooled_size
        z = placeholder(y, (y.shape[0], height * width, y.shape[2]))
        if wanted == "nothing":
            return (z,)
        codes, mask, sign_scale = torch.ops.fqt.norm_sign(y, scale, offset, affine, windows.flat(), low, high)
        ctx.mark_non_differentiable(codes, mask, sign_scale)
        return z, codes, mask, sign_scale

    @staticmethod
    def backward(ctx, g: Tensor, *_: Tensor | None):
        y, scale, offset, affine = ctx.saved_tensors
        with torch.no_grad():
            args = (g.contiguous(), y, scale, offset, affine, ctx.windows.flat())
            sums = torch.ops.fqt.norm_grad_sums(*args)
            dy = None
            if ctx.needs_input_grad[0]:
                means = (sums / (y.shape[0] * y.shape[1])).float() if ctx.batch else affine.new_zeros(2, y.shape[2])
                dy = torch.ops.fqt.norm_grad(*args, means)
            d_bias, d_weight = sums.float()
        return *once([dy, d_weight, d_bias]), *[None] * 9
