"""Which layers of a model follow which recipe, and why the others stay float."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from fqt.inspect.flow import Ends
from fqt.inspect.summary import matrix_weights
from fqt.layers import ADAPTERS, adapter_of
from fqt.layers.parametrized import at_rest, beneath
from fqt.recipe import PLACES, Recipe
from fqt.recipe_yaml import load_recipe
from fqt.wording import nearest

Override = str | Callable[[str, nn.Module], bool]
"""A pattern of module names, one of `PLACES`, or a predicate of a layer's name and module."""
_ADAPTER_BASE = "peft.tuners.tuners_utils.BaseTunerLayer"


@dataclass(frozen=True)
class Choice:
    """What becomes of a layer: `recipe`, or None, and by what it stays float ("by skip")."""

    recipe: Recipe | None
    reason: str = ""


def patterns(option: str, given: Sequence[str] | str | None) -> Sequence[str]:
    """A pattern or a list of them as a list. TypeError if it is something else."""
    found = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(found, Sequence) or not all(isinstance(pattern, str) for pattern in found):
        raise TypeError(f"{option} is a pattern of module names or a list of them, not {given!r}")
    return found


def load_overrides(given: Mapping[Override, str | Path | Recipe] | None) -> dict[Override, Recipe | None]:
    """Pattern or predicate -> recipe, None for "float". TypeError or ValueError if it is something else."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(key, str) or callable(key) for key in given):
        raise TypeError(f"overrides is a mapping from patterns of module names, or predicates, to recipes, not {given!r}")
    return {key: None if recipe == "float" else load_recipe(recipe) for key, recipe in given.items()}


def ends_by_kind(model: nn.Module) -> Ends:
    """The first and the last module that holds a matrix, in the order of `model.named_modules()`, whatever its kind: an
    embedding in front takes the first place, and a head that is not converted the last one."""
    names = [name for name, module in model.named_modules() if matrix_weights(module) and not is_adapter(name, model)]
    return Ends(frozenset(names[:1]), frozenset(names[-1:]))


def is_adapter(name: str, model: nn.Module) -> bool:
    """Whether a module is what parameter-efficient fine-tuning trains beside a frozen layer: low rank, and worth its floats."""
    path = name.split(".")
    if any(part.lower().startswith("lora_") for part in path):
        return True
    for depth in range(len(path)):
        kinds = type(model.get_submodule(".".join(path[:depth]))).__mro__
        if path[depth] != "base_layer" and any(f"{kind.__module__}.{kind.__qualname__}" == _ADAPTER_BASE for kind in kinds):
            return True
    return False


def choose(
    model: nn.Module,
    layers: dict[str, nn.Module],
    recipe: Recipe,
    ends: Ends,
    *,
    skip: Sequence[str],
    only: Sequence[str],
    overrides: dict[Override, Recipe | None],
) -> dict[str, Choice]:
    """What becomes of each layer. ValueError where a pattern, predicate or rule matches none."""
    matches = _Matches(layers, ends)
    for option, given in (("skip", skip), ("only", only), ("overrides", overrides)):
        for pattern in given:
            if not any(matches(pattern, name) for name in layers):
                kind, hint = ("predicate", "") if callable(pattern) else ("pattern", nearest(pattern, layers))
                raise ValueError(f"{option} {kind} {_word(pattern)} matches no layer{hint}; layers: {_some(layers)}")
    for rule in recipe.rules:
        if rule.match not in PLACES and not any(matches(rule.match, name) for name in layers):
            raise ValueError(
                f"recipe {recipe.name!r}: rule {rule.match!r} matches no layer{nearest(rule.match, layers)}; "
                f"layers: {_some(layers)}"
            )
    chosen = {}
    for name in layers:
        if any(matches(pattern, name) for pattern in skip):
            found = Choice(None, "by skip")
        elif only and not any(matches(pattern, name) for pattern in only):
            found = Choice(None, "by only, which leaves it out")
        elif key := next((key for key in overrides if matches(key, name)), None):
            found = Choice(overrides[key], f"by overrides {_word(key)}")
        elif (holder := _float_borrower(name, model, chosen)) is not None:
            found = Choice(None, f"with {holder!r}, which multiplies its weight itself")
        elif is_adapter(name, model):
            found = Choice(None, "as an adapter beside a frozen layer, which overrides alone converts")
        else:
            rule = next((rule for rule in recipe.rules if matches(rule.match, name)), None)
            found = Choice(recipe) if rule is None else Choice(rule.recipe, f"by the rule {rule.match!r}")
        floats = found.recipe is None or found.recipe.everywhere().is_float
        chosen[name] = Choice(None, found.reason or "by the recipe") if floats else found
    return chosen


def _float_borrower(name: str, model: nn.Module, chosen: dict[str, Choice]) -> str | None:
    """The module around a layer that multiplies its weight itself as long as it is not converted, which it is not."""
    holder, _, child = name.rpartition(".")
    adapter = ADAPTERS.get(beneath(model.get_submodule(holder))) if child else None
    stays = holder not in chosen or chosen[holder].recipe is None
    return holder if adapter is not None and child in adapter.borrows and stays else None


class _Matches:
    """Whether a pattern, place or predicate is meant for a layer."""

    def __init__(self, layers: dict[str, nn.Module], ends: Ends) -> None:
        self.layers, self.ends = layers, ends

    def __call__(self, pattern: Override, name: str) -> bool:
        layer = self.layers[name]
        if callable(pattern):
            return bool(pattern(name, layer))
        if pattern in ("<first>", "<last>"):
            return name in (self.ends.first if pattern == "<first>" else self.ends.last)
        if pattern in PLACES:
            adapter = adapter_of(layer)
            assert adapter is not None
            window = adapter.window(layer)  # type: ignore[arg-type]
            if window is None or pattern == "<conv>":
                return window is not None
            if pattern == "<downsample>":
                return window.kernel == (1, 1) and max(window.stride) > 1
            with at_rest(layer):
                return window.groups > 1 and adapter.weight_OKI(layer).shape[2] == 1  # type: ignore[arg-type]
        return fnmatchcase(name, pattern)


def _word(pattern: Override) -> str:
    return repr(pattern) if isinstance(pattern, str) else getattr(pattern, "__qualname__", repr(pattern))


def _some(names: dict[str, nn.Module]) -> str:
    listed = list(names)
    return ", ".join(listed[:8]) + (f", ... ({len(listed)} in all)" if len(listed) > 8 else "")
