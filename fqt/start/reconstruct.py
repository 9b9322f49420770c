"""reconstruct: weights moved layer by layer, so that each converted layer puts out what the float layer did.

    adaround    each weight is rounded up or down as the layer's output says (Nagel et al., arXiv 2004.10568, section 3.3):
                code = clip(floor(w / s) + h(V)), h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1), V by Adam on the output's squared
                error plus the mean of 1 - |2h - 1|^beta, beta falling from 20 to 2 behind a warm-up (equations 22 to 24)
    adaquant    weights, bias and learned steps by Adam on the output's squared error through the layer's own straight-through
                estimators (Hubara et al., arXiv 2006.10518, section 3.1)

Layers go in the order of a forward; each reads what the converted layers before it, already moved, put out. The error is
divided by what it is at first, so that one rate and one weight of the penalty serve layers of any size.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from fqt.exchange import exchange_back
from fqt.freeze import not_copied
from fqt.inspect.table import aligned
from fqt.inspect.trial import floats_of, undisturbed
from fqt.layers import QuantizedLayer
from fqt.layers.parametrized import at_rest
from fqt.packed import canonical
from fqt.quantizers.stored import Stored
from fqt.recipe import Product, Recipe
from fqt.reference import spread, unpack
from fqt.sharded import is_dtensor
from fqt.start.batches import Loader, evaluating, taken
from fqt.start.calibrate import chosen_layers
from fqt.start.capture import Pair, calls_of, captured

METHODS = ("adaround", "adaquant")
HELD_OUT = 4
"""One batch in so many, and at least one, judges what the others have moved."""
_WARM_UP, _BETAS = 0.2, (20.0, 2.0)
_log = logging.getLogger("fqt")


@dataclass(frozen=True)
class Moved:
    """A layer whose weights were moved, or would have been.

    Attributes:
        before, after: ||y - y_float||^2 / ||y_float||^2 of its output on the batches held out.
        kept: whether the error fell; else the layer has its former weights.
        changed: the share of weights whose code is another now.
    """

    layer: str
    before: float
    after: float
    kept: bool
    changed: float


@dataclass(frozen=True)
class Reconstructed:
    """`rows` is data, `str()` a table. skipped: layer -> why it was left as it was."""

    method: str
    rows: tuple[Moved, ...]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = [("layer", "error before", "after", "codes changed", "")]
        for row in self.rows:
            kept = "kept" if row.kept else "taken back"
            lines.append((row.layer, f"{row.before:.2e}", f"{row.after:.2e}", f"{row.changed:.1%}", kept))
        text = "\n".join(aligned(lines, right=(1, 2, 3)))
        return text + "".join(f"\nleft as it was: {name}: {reason}" for name, reason in self.skipped.items())


def reconstruct(
    model: nn.Module,
    loader: Loader,
    *,
    method: str = "adaround",
    steps: int = 500,
    batches: int = 16,
    lr: float | None = None,
    skip: Sequence[str] | str | None = None,
) -> Reconstructed:
    """Move the weights of a converted model so that each layer's output is nearest to the float layer's, a layer at a time.

        fqt.calibrate(model, loader)
        print(fqt.reconstruct(model, loader))

    The teacher is the model in float, with the weights of now. The result is a converted model with ordinary float weights: of
    "adaround", each is where it was, or in the middle of the code that it is to be rounded to, so that rounding to nearest
    gives the learned codes, and scales are what they were. A layer whose error on the batches held out (one in four) does not
    fall keeps its weights. What `calibrate` stored stays; run it first. Torch's generators are left as they are.
    In torch.distributed every rank calls this with batches of its own, and rank 0's weights are everybody's.

    Args:
        loader: at least two batches, as in `calibrate`; all are kept in memory.
        method: "adaround" for weights of the grids int and uint that are rounded to nearest, or "adaquant" for any.
        steps: of Adam for each layer, each on one batch.
        batches: how many are taken, at most.
        lr: of Adam; None: for "adaround" 10 / steps, at most 0.1 (the way that the authors' 10,000 steps of 0.001 can go), and
            for "adaquant" 0.002 times each parameter's mean size, falling to 0.
        skip: fnmatch patterns of layers that are left as they are.

    Returns:
        Each layer's error before and after, and what was left as it was, with the reason.

    Raises:
        ValueError: nothing is converted, or the model is frozen; fewer than two batches; an output that is not finite; unknown
            method; a pattern that matches no layer.
        TypeError: the loader is a single tensor or mapping.
    """
    from tqdm.auto import tqdm  # not at import: it looks for a notebook

    model = getattr(model, "_orig_mod", model)  # beneath torch.compile
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(map(repr, METHODS))}")
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps is {steps!r}, not a positive integer")
    layers = chosen_layers(model, skip, "fqt.reconstruct")
    inputs = list(taken(loader, batches, "reconstruct"))
    if len(inputs) < 2:
        raise ValueError("reconstruct needs at least two batches, one of which judges: the loader has one")
    teacher = _teacher(model)
    skipped = {name: reason for name, layer in layers.items() if (reason := _no_move(model, layer, method))}
    rows = []
    with evaluating(model, teacher), undisturbed(model):
        calls = calls_of(model, layers, inputs[0])
        skipped |= dict.fromkeys(layers.keys() - calls.keys(), "not reached by the first batch")
        for name in tqdm([name for name in calls if name not in skipped], method, leave=False, disable=None):
            layer = layers[name]
            read = captured(model, layer, calls[name], inputs, output=False)
            wanted = captured(teacher, teacher.get_submodule(name), calls[name], inputs, output=True)
            pairs = [Pair(args, kwargs, y) for (args, kwargs), y in zip(read, wanted, strict=True)]
            if not all(bool(pair.y.isfinite().all()) for pair in pairs):
                raise ValueError(f"layer {name!r} puts out a value that is not finite, in float: look for the batch or layer")
            rows.append(_move(name, layer, pairs, method, steps, lr))
    return Reconstructed(method, tuple(rows), dict(sorted(skipped.items())))


def _teacher(model: nn.Module) -> nn.Module:
    """A copy that computes in float, every layer called as in the model (within a plain attention not all are)."""
    teacher, floats = copy.deepcopy(model, not_copied(model)), Product("float", "float")
    for module in list(teacher.modules()):
        exchange_back(module)
        if isinstance(module, QuantizedLayer):
            module.__dict__.update(recipe=Recipe("float", floats, floats, floats), fusion=None)
    return teacher


def _no_move(model: nn.Module, layer: QuantizedLayer, method: str) -> str:
    """Why a layer's weights cannot be moved, "" if they can."""
    operand = layer.recipe.operand("output", "w")
    if layer.weight_name not in layer._parameters:
        return "its weight is computed before every forward"
    if is_dtensor(layer.weight):
        return "its weight is spread over ranks: reconstruct before sharding"
    if sum(parameter is layer.weight for _, parameter in model.named_parameters(remove_duplicate=False)) > 1:
        return "it shares its weight with another module"
    if operand is None:
        return "the recipe keeps its weight float"
    if method == "adaquant":
        return ""
    quantizer = operand.quantizer
    if quantizer.calibrate == "absmean" and quantizer.grid == "ternary":
        return "its scale is the mean of |values|, which rounding moves"
    if quantizer.grid not in ("int", "uint", "ternary"):
        return f"no rounding of {quantizer.grid} is learned"
    if quantizer.transform or operand.transform is not None:
        return "its weight is transformed before it is rounded"
    if quantizer.block:
        return "its blocks have scales that rounding may move"
    if layer.multiplied() is not layer.weight:
        return "it multiplies by another weight than it keeps"
    if not isinstance(quantizer.calibrate, Stored | str):
        return f"{quantizer.calibrate} may move its scale with the rounding"
    return ""


# --- moving -------------------------------------------------------------------------------------------------------------


def _move(name: str, layer: QuantizedLayer, pairs: list[Pair], method: str, steps: int, lr: float | None) -> Moved:
    held = pairs[HELD_OUT - 1 :: HELD_OUT] or pairs[-1:]
    used = [pair for pair in pairs if not any(pair is other for other in held)]
    parameters = _trained(layer, method)
    former = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    before, codes = _error(layer, held), _codes(layer)
    moved = (_adaround if method == "adaround" else _adaquant)(layer, used, steps, lr)
    _assign(parameters, moved)
    after = _error(layer, held)
    kept = after < before
    changed = float((_codes(layer) != codes).float().mean())
    if not kept:
        _assign(parameters, former)
    if dist.is_available() and dist.is_initialized():
        for parameter in parameters.values():
            dist.broadcast(parameter.detach(), 0)
    return Moved(name, before, after, kept, changed)


def _trained(layer: QuantizedLayer, method: str) -> dict[str, nn.Parameter]:
    named = dict(layer.named_parameters())
    if method == "adaround":
        return {layer.weight_name: named[layer.weight_name]}
    return {key: parameter for key, parameter in named.items() if key.split(".")[0] not in layer.borrows}


def _codes(layer: QuantizedLayer) -> Tensor:
    return torch.cat([unpack(q.codes, q.format, q.shape).flatten() for q in layer.quantized_weights()])


@torch.no_grad()
def _assign(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for key, parameter in parameters.items():
        parameter.copy_(values[key])


@torch.no_grad()
def _error(layer: QuantizedLayer, pairs: list[Pair]) -> float:
    """||y - y_float||^2 / ||y_float||^2."""
    error = power = 0.0
    for pair in pairs:
        y = floats_of(layer(*pair.args, **pair.kwargs))[0]
        error += float((y - pair.y).double().square().sum())
        power += float(pair.y.double().square().sum())
    return error / (power or 1.0)


@contextmanager
def _following(layer: QuantizedLayer, recipe: Recipe) -> Iterator[None]:
    """Within, the layer computes by another recipe, its states untouched."""
    before = layer.recipe
    layer.__dict__["recipe"] = recipe
    try:
        yield
    finally:
        layer.__dict__["recipe"] = before


def _descend(
    layer: QuantizedLayer,
    pairs: list[Pair],
    steps: int,
    groups: list[dict[str, Any]],
    values: Callable[[], dict[str, Tensor]],
    penalty: Callable[[float], Tensor | float] | None = None,
) -> None:
    """Adam on the squared error of the layer's output, relative to what it is at first, plus a penalty.

    Args:
        groups: what Adam moves.
        values: of the layer's parameters, by these.
        penalty: of the share of the steps done. Without one the rate falls to 0, so that codes come to rest.
    """
    optimizer = torch.optim.Adam(groups)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if penalty else 1 - step / steps)
    first: float | None = None
    for step in range(steps):
        pair = pairs[step % len(pairs)]
        y = floats_of(functional_call(layer, values(), pair.args, pair.kwargs))[0]
        error = (y - pair.y).float().square().mean()
        first = first or float(error.detach()) or 1.0
        optimizer.zero_grad()
        (error / first + (penalty(step / steps) if penalty else 0.0)).backward()
        optimizer.step()
        falling.step()


def _adaquant(layer: QuantizedLayer, pairs: list[Pair], steps: int, lr: float | None) -> dict[str, Tensor]:
    free = {key: p.detach().clone().requires_grad_() for key, p in _trained(layer, "adaquant").items()}
    rate = 2e-3 if lr is None else lr
    groups = [{"params": [p], "lr": rate * float(p.detach().float().abs().mean())} for p in free.values()]
    with _following(layer, layer.recipe.frozen()):
        _descend(layer, pairs, steps, groups, lambda: free)
    return {key: p.detach() for key, p in free.items()}


def _adaround(layer: QuantizedLayer, pairs: list[Pair], steps: int, lr: float | None) -> dict[str, Tensor]:
    weight, name = layer.weight.detach(), layer.weight_name
    scale, offset = _steps(layer)
    format = layer.recipe.format("output", "w")
    assert format is not None
    low, high = format.code_range
    y = torch.where(scale > 0, (weight.float() - offset) / scale, 0.0)
    nearest = y.round().clamp(low, high)
    # codes at the ends of the range stay, so that a scale that is measured on the weight stays too
    free = (scale > 0) & (nearest > low) & (nearest < high)
    part = (y - y.floor()).clamp(1e-4, 1 - 1e-4)
    v = -torch.log(1.2 / (part + 0.1) - 1)
    v.requires_grad_()

    def up() -> Tensor:
        return (1.2 * torch.sigmoid(v) - 0.1).clamp(0, 1)

    def values() -> dict[str, Tensor]:
        codes = torch.where(free, (y.floor() + up()).clamp(low, high), nearest)
        return {name: (codes * scale + offset).to(weight.dtype)}

    def penalty(share: float) -> Tensor | float:
        if share < _WARM_UP:
            return 0.0
        done = (share - _WARM_UP) / (1 - _WARM_UP)
        beta = _BETAS[1] + (_BETAS[0] - _BETAS[1]) * (1 + math.cos(done * math.pi)) / 2
        return (1 - (2 * up() - 1).abs().pow(beta))[free].sum() / free.sum().clamp(min=1)

    saved = "saved" if layer.recipe.operand("output", "x") is not None else "float"
    floats = Recipe("rounding", Product(layer.recipe.output.left, "float"), Product("float", "float"), Product("float", saved))
    with _following(layer, floats):
        _descend(layer, pairs, steps, [{"params": [v], "lr": min(0.1, 10 / steps) if lr is None else lr}], values, penalty)
    with torch.no_grad():
        learned = torch.where(free, (y.floor() + (up() >= 0.5)).clamp(low, high), nearest)
        return {name: torch.where(learned == nearest, weight, (learned * scale + offset).to(weight.dtype))}


@torch.no_grad()
def _steps(layer: QuantizedLayer) -> tuple[Tensor, Tensor]:
    """Scale and offset of each weight, of the weight's shape."""
    with at_rest(layer):
        number = torch.arange(layer.weight.numel(), device=layer.weight.device).view(layer.weight.shape)
        scale, offset = (torch.zeros(layer.weight.numel(), device=number.device) for _ in range(2))
        for q, place in zip(layer.quantized_weights(), layer.split(number), strict=True):
            scale[canonical(place)] = spread(q.scale, q).expand(q.shape)
            if q.offset is not None:
                offset[canonical(place)] = spread(q.offset, q).expand(q.shape)
    return scale.view(number.shape), offset.view(number.shape)
