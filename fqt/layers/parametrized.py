"""Layers whose weight torch.nn.utils.parametrize computes anew at every access: weight_norm, spectral_norm and others.

Parametrizing gives a module a class of its own, derived from its class, with the weight as a property. Conversion exchanges
what that class is derived from, so that the parametrization goes on, can be removed, and stands there again after revert.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.utils import parametrize

from fqt.sharded import sharded_alike, unsharded

_FORMER = "_fqt_former"


def beneath(module: nn.Module) -> type[nn.Module]:
    """The class of a module, that beneath `fully_shard`'s and beneath its parametrization if it has such."""
    kind = unsharded(type(module))
    return kind.__bases__[0] if parametrize.is_parametrized(module) else kind


def derived_from(module: nn.Module, base: type[nn.Module]) -> type[nn.Module]:
    """`base`, or of a parametrized or sharded module a class like its own that is derived from `base`."""
    if parametrize.is_parametrized(module):
        kind = unsharded(type(module))
        body = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__", "__module__")}
        base = type(f"Parametrized{base.__name__}", (base,), body | {_FORMER: kind})
    return sharded_alike(type(module), base)


def former(module: nn.Module) -> type[nn.Module] | None:
    """The class that `derived_from` was given, of a module whose parametrizations are those of then; None of any other."""
    kind = unsharded(type(module))
    found = vars(kind).get(_FORMER)
    return found if found is not None and _properties(found) == _properties(kind) else None


def _properties(kind: type[nn.Module]) -> set[str]:
    return {name for name, value in vars(kind).items() if isinstance(value, property)}


@contextmanager
def at_rest(module: nn.Module) -> Iterator[None]:
    """Within, the module's parametrizations are in evaluation: looking at a weight moves no power iteration on."""
    parts = list(module.parametrizations.modules()) if parametrize.is_parametrized(module) else []  # type: ignore[union-attr]
    training = [part.training for part in parts]
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for part, was in zip(parts, training, strict=True):
            part.training = was
