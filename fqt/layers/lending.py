"""Modules that take a layer's weight and call F.linear themselves, as attention blocks of BEiT, EVA and Swin do.

A layer that is never called computes nothing in low bits. Such a module gets a class derived from its own, whose forward has
F.linear call the layer that the weight belongs to. A bias that is not the layer's own is put in its place.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fqt.layers.base import QuantizedLayer

_made: dict[type[nn.Module], type[nn.Module]] = {}


class _Called(TorchFunctionMode):
    """Within, F.linear by a weight of one of these layers is a call of the layer."""

    def __init__(self, layers: list[QuantizedLayer]) -> None:
        super().__init__()
        self.layers = layers

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return self._linear(*args, **kwargs)
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        layer = next((layer for layer in self.layers if layer.weight is weight), None)
        if layer is None:
            return F.linear(input, weight, bias)
        y = layer(input)
        if bias is layer.bias:
            return y
        other = 0 if bias is None else bias
        return y + (other if layer.bias is None else other - layer.bias)


class _Lender(nn.Module):
    """Its forward calls its layers where it would multiply by their weights."""

    plain: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layers = [layer for layer in self.children() if isinstance(layer, QuantizedLayer) and layer.kind == "linear"]
        with _Called(layers):
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (_revive, (self.plain,), *super().__reduce_ex__(protocol)[2:])


def is_lender(module: nn.Module) -> bool:
    """Whether `lend` was done."""
    return isinstance(module, _Lender)


def lend(module: nn.Module) -> None:
    """Give a module such a class, where it has none yet."""
    if not isinstance(module, _Lender):
        module.__class__ = _class(type(module))


def lend_no_more(module: nn.Module) -> None:
    """Undo `lend`, where it was done."""
    if isinstance(module, _Lender):
        module.__class__ = module.plain  # type: ignore[assignment]


def _class(plain: type[nn.Module]) -> type[nn.Module]:
    if plain not in _made:
        _made[plain] = type(plain.__name__, (_Lender, plain), {"plain": plain, "__module__": plain.__module__})
    return _made[plain]


def _revive(plain: type[nn.Module]) -> nn.Module:
    made = _class(plain)
    return made.__new__(made)
