"""Trying a model without touching it: what `profile`, `memory` and `recommend` share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Loss = Callable[[object], Tensor]
"""Of a model's output."""


def feed(model: nn.Module, input: object) -> object:
    """The model's output: of a tensor, of a tuple of arguments, or of a mapping of keyword arguments."""
    if isinstance(input, Mapping):
        return model(**input)
    return model(*input) if isinstance(input, tuple) else model(input)


def floats_of(output: object) -> list[Tensor]:
    """The float tensors within a model's output, or any tree of tensors."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Torch's generators, on the CPU and where the model is, come back as they were; gradients are enabled within."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices), torch.enable_grad():
        yield


def synchronize(device: torch.device) -> None:
    """Wait for what was launched there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
