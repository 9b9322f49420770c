"""What the autograd functions share: their gradients cannot be differentiated again, and say so."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


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
