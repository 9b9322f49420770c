"""What a layer reads in a model, and what it puts out: its calls in the forwards of some batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fqt.inspect.trial import floats_of
from fqt.start.batches import fed


@dataclass(frozen=True)
class Pair:
    """A call of a layer, and what the float layer put out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    y: Tensor


class _Enough(Exception):
    """Ends a forward that has reached what was looked for."""


@torch.no_grad()
def calls_of(model: nn.Module, layers: Mapping[str, nn.Module], input: object) -> Counter[str]:
    """How often a forward calls each layer, in the order of the first calls."""
    calls: Counter[str] = Counter()
    hooks = [
        layer.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))  # type: ignore[misc]
        for name, layer in layers.items()
    ]
    try:
        fed(model, input)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


@torch.no_grad()
def captured(model: nn.Module, layer: nn.Module, calls: int, inputs: list[object], *, output: bool) -> list[Any]:
    """The arguments of each call of a layer, or its output; a forward goes no further than the last of them."""
    found: list[Any] = []
    left = 0

    def copied(value: object) -> object:
        return tree_map_only(Tensor, torch.clone, value)  # a later operation in place may change it

    def before(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        found.append((copied(args), copied(kwargs)))
        count()

    def after(_: nn.Module, args: object, y: object) -> None:
        found.append(copied(floats_of(y)[0]))
        count()

    def count() -> None:
        nonlocal left
        left -= 1
        if not left:
            raise _Enough

    hook = layer.register_forward_hook(after) if output else layer.register_forward_pre_hook(before, with_kwargs=True)
    try:
        for input in inputs:
            left = calls
            try:
                fed(model, input)
            except _Enough:
                continue
    finally:
        hook.remove()
    return found
