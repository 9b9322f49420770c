"""What a conversion tells its user: one line of the log, and the reason where nothing is converted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable

from torch import nn
from torch.nn.parameter import is_lazy

from fqt.choose import Choice
from fqt.exchange import blind
from fqt.inspect.flow import Flow, float_multiply_adds, uncalled
from fqt.inspect.summary import backends, matrix_weights
from fqt.layers import plain_classes, quantized_layers
from fqt.recipe import Recipe

_log = logging.getLogger("fqt")


def log_conversion(
    model: nn.Module,
    recipe: Recipe,
    chosen: dict[str, Recipe],
    choices: dict[str, Choice],
    flow: Flow | None,
    exchanged: dict[str, nn.Module],
    kept: Collection[str],
    slow: dict[str, float],
    *,
    backend: str,
    min_speedup: float | None,
    example: object,
) -> None:
    """Log what was converted, as a warning where a user would want to know of it.

    Args:
        chosen: the recipes of the layers that were converted; choices: of all layers.
        exchanged, kept: the activations that were exchanged, and those that float readers kept.
        slow: layers that `min_speedup` kept float, with their speed-up.
    """
    said = []
    if kept:
        said.append(f"{len(kept)} kept for float readers{_some(sorted(kept))}")
    said += _ends(choices, chosen)
    if slow:
        said.append(f"kept float, slower than {min_speedup:g}x: {speeds(slow)}")
    troubles = _troubles(model, chosen, flow, exchanged, example)
    if not backend and any(
        by.backend == "reference"
        for _, layer in quantized_layers(model)
        if not any(parameter.is_meta for parameter in layer.parameters())  # on meta: its device is not known yet
        for by in backends(layer).values()
    ):
        troubles.append("some products have no low-bit kernel here and run on the reference, see fqt.summary(model)")
    _log.log(
        logging.WARNING if troubles else logging.INFO,
        "%s: %d of %d layers converted, %d activations replaced%s",
        recipe.name,
        len(chosen),
        len(choices),
        len(exchanged),
        "; ".join([_some(exchanged), *said, *troubles]),
    )


def log_parameters(model: nn.Module, recipe: Recipe) -> None:
    """Log the parameters that the recipe's quantizers bring."""
    added = [f"{name}.{state}" for name, layer in quantized_layers(model) for state in layer.states_names(parameters=True)]
    if added:
        what = "%s adds %d parameters, which an optimizer made from now on trains: %s"
        _log.info(what, recipe.name, len(added), ", ".join(added))


def _ends(choices: dict[str, Choice], chosen: dict[str, Recipe]) -> list[str]:
    """Which layers the rules of <first> and <last> left float."""
    left = {
        place: [name for name, choice in choices.items() if name not in chosen and choice.reason == f"by the rule {place!r}"]
        for place in ("<first>", "<last>")
    }
    return [f"{place} is{_some(names)}" for place, names in left.items() if names]


def _troubles(
    model: nn.Module, chosen: dict[str, Recipe], flow: Flow | None, exchanged: dict[str, nn.Module], example: object
) -> list[str]:
    """What a user would want to know of a conversion that did less than it seems to."""
    found = []
    if flow is not None and flow.total:
        share, of = 1 - float_multiply_adds(model, example) / flow.total, "multiply-adds"
        idle = uncalled(model, flow)
        if idle:
            found.append(
                f"{len(idle)} converted layers are not called by example{_some(idle)}: where the module around "
                f"one calls F.linear with its weight, it is called now; fqt.summary(model) says after a forward which one was"
            )
    else:
        holders = {name: m for name, m in model.named_modules() if not isinstance(m, nn.Embedding)}
        sizes = {name: sum(w.numel() for w in matrix_weights(m) if not is_lazy(w)) for name, m in holders.items()}
        share, of = sum(sizes[name] for name in chosen) / max(sum(sizes.values()), 1), "weights of matrices"
    if share < 0.5:
        found.append(f"only {share:.0%} of the {of} are in low bits, see fqt.summary(model)")
    for name, makers in blind(flow, chosen, exchanged).items() if flow is not None else ():
        found.append(
            f"{name} takes signs of values that are nowhere negative (behind {makers}), and learns nothing from them: use a "
            f"module that the recipe replaces (nn.ReLU), or skip={name!r}"
        )
    return found


def why_nothing(model: nn.Module, choices: dict[str, Choice]) -> str:
    """Why a recipe converts nothing, and what to do about it."""
    if choices:
        reasons = {choice.reason for choice in choices.values()}
        return (
            f"all {len(choices)} layers ({', '.join(list(choices)[:4])}) stay float {' and '.join(sorted(reasons))}; loosen "
            f"skip, only and overrides, or pass fqt.load_recipe(...).everywhere() to drop the recipe's rules"
        )
    kinds = ", ".join(plain_classes())
    holders = Counter(type(module).__name__ for module in model.modules() if matrix_weights(module))
    if not holders:
        return f"it has no layer of a kind that fqt converts ({kinds}); check that this is the model you meant"
    held = ", ".join(f"{count} {kind}" for kind, count in holders.most_common())
    return (
        f"its weights are held by {held}, none of a kind that fqt converts ({kinds}); fqt.summary(model) says of each why, and "
        f"fqt.register_layer adds a kind"
    )


def speeds(speedups: dict[str, float]) -> str:
    """Layers with their speed-ups."""
    return ", ".join(f"{name} {speedup:.2f}x" for name, speedup in speedups.items())


def _some(names: Iterable[str]) -> str:
    """In brackets, some of the names."""
    listed = list(names)
    return f" ({', '.join(listed[:6])}{', ...' if len(listed) > 6 else ''})" if listed else ""
