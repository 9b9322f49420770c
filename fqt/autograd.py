"""What the autograd functions share: their gradients cannot be differentiated again, nor do torch's transforms follow
what they compute, and they say so."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C import _functorch  # type: ignore[attr-defined]
from torch.autograd import forward_ad


def positional(forward: Callable) -> Callable:
    """Mark a Function's forward as one that takes its arguments by position, whatever their names.

    Torch binds them by `inspect.signature` with every call of a Function that has a `setup_context`; to look the names up takes
    0.1 ms, more than a small layer's products.
    """
    each = inspect.Parameter("arguments", inspect.Parameter.VAR_POSITIONAL)
    forward.__signature__ = inspect.Signature([each])  # type: ignore[attr-defined]
    return forward


def once(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """A backward's gradients, guarded where it runs with create_graph=True."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return list(grads)
    return [None if grad is None else _DifferentiatedOnce.apply(_leaf(grad)) for grad in grads]  # type: ignore[misc]


def _leaf(tensor: Tensor) -> Tensor:
    """The tensor's values, requiring a gradient of their own."""
    tensor = tensor.detach()
    tensor.requires_grad = True  # torch.func refuses requires_grad_()
    return tensor


class _DifferentiatedOnce(torch.autograd.Function):
    """The identity, standing behind each gradient of a graph made with create_graph=True: no second derivative is lost
    silently (torch's once_differentiable lets it be where the incoming gradient is a constant)."""

    @staticmethod
    def forward(grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *_: Tensor):
        raise RuntimeError(
            "the gradient of a quantized layer cannot be differentiated again: codes have no derivative. Where a second "
            "derivative is needed (a gradient penalty, a Hessian), keep the layers float: fqt.convert(..., skip=...)"
        )


_WAY_OUT = "work on the float model (fqt.revert), or keep these layers float by fqt.convert(..., skip=...)"


def refuse_transforms(*tensors: object) -> None:
    """Raise NotImplementedError within torch.func's vmap and jvp, and torch.jit.trace."""
    if torch.compiler.is_compiling():
        return
    if any(map(_is_mapped, tensors)):
        raise NotImplementedError(
            f"quantized layers cannot be mapped by torch.func.vmap (jacrev and hessian use it too), whose samples would "
            f"share ranges: call the model once for each, or {_WAY_OUT}"
        )
    # Not by giving the autograd functions a `jvp` that raises: torch.compile refuses to trace functions that have one.
    if forward_ad._current_level >= 0 and any(
        isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise NotImplementedError(f"quantized layers have no forward-mode derivative (torch.func.jvp, jacfwd): {_WAY_OUT}")
    if torch._C._get_tracing_state() is not None:
        raise NotImplementedError(
            f"torch.jit.trace cannot follow quantized layers: use torch.export on fqt.freeze(model), or {_WAY_OUT}"
        )


def _is_mapped(tensor: object) -> bool:
    """Whether it stands for one of several, at any level of nested transforms."""
    while isinstance(tensor, Tensor) and _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def refuse_script(layer: torch.nn.Module) -> torch.nn.Module:
    """Raise NotImplementedError: what torch.jit.script calls of a module first."""
    raise NotImplementedError(
        f"torch.jit.script cannot compile a {type(layer).__name__}: use torch.export on fqt.freeze(model), or {_WAY_OUT}"
    )
