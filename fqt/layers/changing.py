"""Layers whose recipe a precision policy exchanges while the model trains: torch.compile is kept out of them.

A recipe is a constant of a compiled graph: with L layers of a few formats each, every decision would compile the whole model
once more. So the graph breaks at such a layer, whose work is done by operators that compiling leaves alone anyway, and a new
recipe compiles nothing. fullgraph=True is refused, with this reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fqt.layers.base import QuantizedLayer

_uncompiled: Callable[..., Tensor] | None = None


def compute(layer: QuantizedLayer, *inputs: Any) -> Tensor:
    """The layer's `compute`, past the compiler, the gradient of its output shown to its watcher."""
    return (_uncompiled or _compute)(layer, *inputs)


def _compute(layer: QuantizedLayer, *inputs: Any) -> Tensor:
    output = layer.compute(*inputs)
    return output if layer.watcher is None or not output.requires_grad else watched(output, layer.watcher)


def watched(output: Tensor, look: Callable[[Tensor], None]) -> Tensor:
    """The output, whose gradient `look` is given in the backward."""
    output = output.clone()  # no view, off which an activation in place would cut the hook
    output.register_hook(look)
    return output


def let_recipe_change(layer: QuantizedLayer) -> None:
    """Keep torch.compile out of a layer, see the module's text."""
    global _uncompiled
    if _uncompiled is None:  # not at import: it imports the compiler
        reason = "a precision policy may give this layer another recipe at any step; compile without fullgraph=True"
        _uncompiled = torch.compiler.disable(_compute, reason=reason)  # type: ignore[assignment]
    layer.__dict__["changing"] = True
