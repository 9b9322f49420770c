"""Activations that conversion exchanges: a sign needs values of both signs, so ReLU goes where a 1-bit layer reads it.

Where a float layer reads it it stays, or two float layers in a row would be one linear map.
"""

from __future__ import annotations

from torch import nn

from fqt.inspect.flow import Flow
from fqt.inspect.summary import matrix_weights
from fqt.recipe import Recipe
from fqt.wording import nearest

_REPLACED = "_fqt_replaced"
# parts of the names of functions whose results are nowhere negative
_NOT_NEGATIVE = ("relu", "hardtanh", "sigmoid", "softmax", "abs", "square")


def fresh_activation(name: str) -> nn.Module:
    """A module of a class of torch.nn, by name. ValueError unless it is one that needs no arguments and has no parameters."""
    kind = getattr(nn, name, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)) or kind is nn.Module:
        raise ValueError(f"{name!r} is no module of torch.nn{nearest(name, dir(nn))}")
    try:
        fresh = kind()
    except TypeError as error:
        raise ValueError(f"cannot make a {name}: {error}; choose an activation") from error
    if fresh.state_dict():
        raise ValueError(f"{name!r} has parameters; choose one without")
    return fresh


def exchanged_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that `exchange` gave a module, None if it did not."""
    return type(module) if _REPLACED in module.__dict__ else None


def exchanges(recipe: Recipe) -> dict[type[nn.Module], nn.Module]:
    """The recipe's `replace`: class -> a fresh module of the class that takes its place. ValueError if there is none."""
    exchange = {}
    for old, new in recipe.replace:
        if not isinstance(getattr(nn, old, None), type):
            raise ValueError(f"recipe {recipe.name!r}: replace: {old!r} is no module of torch.nn{nearest(old, dir(nn))}")
        try:
            fresh = fresh_activation(new)
        except ValueError as error:
            raise ValueError(f"recipe {recipe.name!r}: replace: {error}") from error
        exchange[getattr(nn, old)] = fresh
    return exchange


def candidates(model: nn.Module, chosen: dict[str, Recipe]) -> dict[str, nn.Module]:
    """Names of the activations that one of the recipes would exchange."""
    kinds = {getattr(nn, old) for recipe in chosen.values() for old, _ in recipe.replace}
    return {name: module for name, module in model.named_modules() if type(module) in kinds}


def wanted(model: nn.Module, chosen: dict[str, Recipe], flow: Flow | None) -> dict[str, nn.Module]:
    """Name of an activation -> a module of the class that takes its place, for those that a layer reads whose recipe says so.

    Args:
        chosen: layer -> recipe, of those that are converted.
        flow: None: the readers are taken to be the two modules with matrices beside it, in the order of named_modules.
    """
    order = list(model.named_modules())
    beside = [name for name, module in order if matrix_weights(module)]
    positions = {name: position for position, (name, _) in enumerate(order)}
    found = {}
    for name, module in candidates(model, chosen).items():
        if flow is None:
            behind = [layer for layer in beside if positions[layer] > positions[name]][:1]
            readers = [layer for layer in beside if positions[layer] < positions[name]][-1:] + behind
        else:
            readers = flow.readers(name)
        for reader in readers:
            fresh = exchanges(chosen[reader]).get(type(module)) if reader in chosen else None
            if fresh is not None:
                found[name] = fresh
                break
    return found


def exchange(module: nn.Module, fresh: nn.Module) -> None:
    """Give a module the class of another, remembering what `exchange_back` needs: its class, the attributes that it had not."""
    added = {name: value for name, value in fresh.__dict__.items() if name not in module.__dict__}
    module.__dict__.update(added)
    module.__dict__[_REPLACED] = (type(module), tuple(added))
    module.__class__ = type(fresh)


def exchange_back(module: nn.Module) -> None:
    """Undo `exchange`, where it was done."""
    if _REPLACED in module.__dict__:
        module.__class__, added = module.__dict__.pop(_REPLACED)
        for name in added:
            del module.__dict__[name]


def blind(flow: Flow, chosen: dict[str, Recipe], exchanged: dict[str, nn.Module]) -> dict[str, str]:
    """Layers that take signs of values that are nowhere negative, and the function that made them so: they learn nothing."""
    found = {}
    for name, reads in flow.reads.items():
        quantizer = chosen[name].quantizer("output", "x") if name in chosen else None
        if quantizer is None or quantizer.grid != "sign" or reads.modules & exchanged.keys():
            continue
        makers = sorted(op for op in reads.operations if any(part in op.lower() for part in _NOT_NEGATIVE))
        plain = [op for op in makers if op.lower().removesuffix("_").removesuffix("backward0") == "relu"]
        if reads.negative is False or (reads.negative is None and plain):
            found[name] = ", ".join(plain or makers or ["its input"])
    return found
