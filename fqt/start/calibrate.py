"""calibrate: static ranges for the operands of a converted model, from some batches or from its BatchNorms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fqt.choose import patterns
from fqt.inspect.table import aligned
from fqt.layers import QuantizedLayer, quantized_layers, refuse_frozen
from fqt.layers.parametrized import at_rest
from fqt.operand import Operand
from fqt.packed import canonical
from fqt.qtensor import QTensor
from fqt.quantizers import Quantizer
from fqt.quantizers.stages import Calibration, Transform
from fqt.quantizers.stored import Stored
from fqt.recipe import Product, Recipe
from fqt.reference import calibrate_groups, group_rows
from fqt.sharded import gathered
from fqt.start.batches import Loader, evaluating, fed, taken
from fqt.start.batchnorm import seen_behind_batchnorms
from fqt.start.ranges import Histogram, bounds, least_error, squared_error

METHODS = ("max", "percentile", "mse")


@dataclass(frozen=True)
class Ranged:
    """An operand that got a static range.

    Attributes:
        layer, operand: its layer's name, and "x" or "w".
        method: "max", "percentile" or "mse".
        low, high: the range; of a weight the smallest and the largest of all its groups'.
        before, after: ||Q(v) - v||^2 / ||v||^2 of the values seen, quantized as the recipe did, and in this range; None where
            no values were seen.
    """

    layer: str
    operand: str
    method: str
    low: float
    high: float
    before: float | None
    after: float | None


@dataclass(frozen=True)
class Calibrated:
    """`rows` is data, `str()` a table. skipped: "layer.operand" -> why it is left as it was."""

    rows: tuple[Ranged, ...]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = [("layer", "operand", "method", "from", "to", "error before", "after")]
        for row in self.rows:
            before, after = ("" if error is None else f"{error:.2e}" for error in (row.before, row.after))
            lines.append((row.layer, row.operand, row.method, f"{row.low:.4g}", f"{row.high:.4g}", before, after))
        text = "\n".join(aligned(lines, right=range(3, 7)))
        return text + "".join(f"\nleft as it was: {name}: {reason}" for name, reason in self.skipped.items())


@torch.no_grad()
def calibrate(
    model: nn.Module,
    loader: Loader | None = None,
    *,
    method: str = "mse",
    percent: float = 99.99,
    batches: int = 16,
    weights: bool = True,
    skip: Sequence[str] | str | None = None,
) -> Calibrated:
    """Give the activations and weights of a converted model static ranges, in place of those that every forward measures.

        model = fqt.convert(model, "int8")
        print(fqt.calibrate(model, loader))

    Each layer's x gets one range for the tensor, found on what the layer reads while layers with such ranges compute in nearly
    float: 16-bit activations, float weights. Each group of a weight (output channel, or tensor) gets the range with the
    least squared error. Ranges are buffers of the layer, `quantizers.output_x.stored.low` and `.high`: in state dicts, used by
    `freeze`, `save` and kernels, dropped by `revert`. Operands whose quantizer has a range of its own (`moving_average`, `lsq`,
    `pact`, `pams`) get it set instead, and so does one that was calibrated before.

    **Training on** leaves stored ranges as they are, with the gradient of x clipped at their ends; learned and running ones go
    on from here. Operands of the backward that the recipe encodes for themselves, and gradients, are measured as before.
    In torch.distributed all ranks call this, each with batches of its own, and get the same ranges: of "max" the widest, else
    the mean.

    Args:
        loader: batches: a tensor, a mapping of keyword arguments, or a tuple or list, of which the first element is the
            model's input (a tensor, a tuple of arguments, a mapping) and the rest, targets, are not read. None: no data: the
            values behind BatchNorms are taken to be normal, as their weight and bias say (Nagel et al., arXiv 1906.04721,
            section 4.2.1), as far as 6 deviations.
        method: for x "max", the whole range seen; "percentile", what holds `percent` of the values; or "mse", the clip with the
            least squared error on a histogram.
        batches: how many are run, at most.
        weights: whether weights get ranges too.
        skip: fnmatch patterns of layers that are left as they are.

    Returns:
        What was found, and what was left as it was, with the reason: signs, fixed limits, blocks, layers without a BatchNorm.

    Raises:
        ValueError: nothing is converted, or the model is frozen; the loader is empty; an activation is not finite; a layer is
            not reached; unknown method; a pattern that matches no layer; without a loader, a model that torch.fx cannot trace.
        TypeError: the loader is a single tensor or mapping.

    An error leaves the model as it was.
    """
    model = getattr(model, "_orig_mod", model)  # beneath torch.compile
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(map(repr, METHODS))}")
    if not 0 < percent <= 100:
        raise ValueError(f"percent {percent!r} is not above 0 and at most 100")
    layers = chosen_layers(model, skip, "fqt.calibrate")
    skipped = {
        f"{name}.{letter}": reason
        for name, layer in layers.items()
        for letter in ("xw" if weights else "x")
        if (reason := _no_range(layer, letter))
    }
    wanted = {name: layer for name, layer in layers.items() if f"{name}.x" not in skipped}
    if loader is None:
        found = {name: seen for name, seen in seen_behind_batchnorms(model).items() if name in wanted}
        seen = {name: _Seen(histogram) for name, histogram in found.items()}
        skipped |= {f"{name}.x": "no BatchNorm alone is in front of it: give a loader" for name in wanted.keys() - seen.keys()}
    else:
        seen = _watched(model, wanted, loader, batches)
    ranges: list[tuple[QuantizedLayer, str, Tensor, Tensor, Ranged]] = []
    for name, layer in layers.items():
        if name in seen:
            operand = _operand(layer, "x")
            low, high = _agreed(*seen[name].histogram.range(method, percent, operand.format), method, layer)
            ranges.append((layer, "x", low, high, seen[name].row(name, operand, method, low, high)))
        if weights and f"{name}.w" not in skipped:
            ranges.append((layer, "w", *_of_weight(name, layer)))
    _store(ranges)
    return Calibrated(tuple(row for *_, row in ranges), dict(sorted(skipped.items())))


def chosen_layers(model: nn.Module, skip: Sequence[str] | str | None, what: str) -> dict[str, QuantizedLayer]:
    """The converted layers that no pattern leaves out. ValueError if there are none, or for a pattern that matches none."""
    refuse_frozen(model, what)
    layers = dict(quantized_layers(model))
    if not layers:
        raise ValueError(f"nothing in this {type(model).__name__} is converted: fqt.convert it first")
    given = patterns("skip", skip)
    for pattern in given:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise ValueError(f"skip={pattern!r} matches none of the converted layers: {', '.join(list(layers)[:6])}")
    return {name: layer for name, layer in layers.items() if not any(fnmatchcase(name, pattern) for pattern in given)}


def _operand(layer: QuantizedLayer, letter: str) -> Operand:
    operand = layer.recipe.operand("output", letter)
    assert operand is not None
    return operand


def _no_range(layer: QuantizedLayer, letter: str) -> str:
    """Why an operand's range cannot be chosen, "" if it can."""
    operand = layer.recipe.operand("output", letter)
    if operand is None:
        return "the recipe keeps it float"
    quantizer = operand.quantizer
    stage = quantizer.calibrate
    if quantizer.grid == "sign":
        return "its codes are signs, which have no range"
    if quantizer.block:
        return f"every block of {quantizer.block} has a range of its own"
    if operand.transform is not None:
        return f"{operand.transform} changes it before its range is measured"
    if stage == "none":
        return f"the recipe fixes its limits, {quantizer.limits[0]:g} to {quantizer.limits[1]:g}"
    if stage == "absmean":
        return "its scale is the mean of |values|"
    if isinstance(stage, Calibration) and not _keeps_range(stage) and stage.state(letter, layer) is not None:
        return f"{stage} keeps something else than a range"
    if letter == "w" and len({w.shape[0] if operand.format.axes else 1 for w in map(canonical, layer.weights())}) > 1:
        return "its parts have different numbers of output channels"
    return ""


def _keeps_range(stage: object) -> bool:
    """Whether a calibration has a range of its own that can be set."""
    return isinstance(stage, Calibration) and type(stage).resume is not Calibration.resume


def _has_range(operand: Operand, layer: QuantizedLayer) -> bool:
    """Whether an operand can be quantized already: where a recipe asks for a stored range, one has to be found first."""
    return not isinstance(operand.quantizer.calibrate, Stored) or bool(operand.state(layer.states)[Stored.word].known)


# --- activations ------------------------------------------------------------------------------------------------------


@dataclass
class _Seen:
    """What a layer's x was. error: squared, as the recipe quantizes it; power: the sum of the squares; None: no data."""

    histogram: Histogram = field(default_factory=Histogram)
    error: float | None = None
    power: float | None = None

    def row(self, name: str, operand: Operand, method: str, low: Tensor, high: Tensor) -> Ranged:
        before = after = None
        if self.power:
            values, counts = self.histogram.values()
            error = squared_error(values, low.cpu(), high.cpu(), operand.format, counts)
            before = None if self.error is None else self.error / self.power
            after = float(error) / self.histogram.power()
        return Ranged(name, "x", method, low.item(), high.item(), before, after)


@dataclass(frozen=True)
class _Watch(Transform):
    """x as the recipe transforms it, shown to whoever looks."""

    show: Callable[[Tensor], Tensor]

    def apply(self, x: Tensor, state: nn.Module | None) -> Tensor:
        return self.show(x)


def _watched(model: nn.Module, layers: dict[str, QuantizedLayer], loader: Loader, batches: int) -> dict[str, _Seen]:
    seen = {name: _Seen() for name in layers}
    with _watching(layers, seen), evaluating(model):
        count = 0
        for batch in taken(loader, batches, "calibrate"):
            fed(model, batch)
            count += 1
    missed = [name for name, each in seen.items() if each.power is None]
    if missed:
        raise ValueError(
            f"{len(missed)} converted layers were not reached by {count} batches ({', '.join(missed[:6])}), so no range is "
            f"known for them: give batches that reach them, or leave them as they are by skip={missed[0]!r}"
        )
    return seen


@contextmanager
def _watching(layers: dict[str, QuantizedLayer], seen: dict[str, _Seen]) -> Iterator[None]:
    """Within, the layers compute in nearly float, and what they read is counted."""
    before = {name: layer.recipe for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            watch = _Watch(_look(name, layer, before[name], seen[name]))
            floats = Product("float", "float")
            product = Product(Quantizer("int", 16, transform=watch), "float")
            layer.__dict__["recipe"] = Recipe("watched", product, floats, floats)  # not by the setter: states stay
        yield
    finally:
        for name, layer in layers.items():
            layer.__dict__["recipe"] = before[name]


def _look(name: str, layer: QuantizedLayer, recipe: Recipe, seen: _Seen) -> Callable[[Tensor], Tensor]:
    operand = recipe.operand("output", "x")
    assert operand is not None

    def look(x_NPC: Tensor) -> Tensor:
        x_NPC = operand.transformed(x_NPC, layer.states)
        try:
            seen.histogram.add(x_NPC)
        except ValueError:
            raise ValueError(
                f"layer {name!r} reads a value that is not finite: no range holds it; look for what makes it (a batch, a layer "
                f"before), or leave the layer as it is by skip={name!r}"
            ) from None
        if _has_range(operand, layer):
            options = {"states": layer.states, "backend": layer.backend, "masked": False}
            q = operand.encode(x_NPC, key=None, training=False, **options).q  # type: ignore[arg-type]
            seen.error = (seen.error or 0.0) + float((q.decode() - x_NPC).double().square().sum())
        seen.power = (seen.power or 0.0) + float(x_NPC.double().square().sum())
        return x_NPC

    return look


def _agreed(low: Tensor, high: Tensor, method: str, layer: QuantizedLayer) -> tuple[Tensor, Tensor]:
    """The same range on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return low, high
    ends = torch.cat([-low, high]).to(layer.weight.device)
    dist.all_reduce(ends, dist.ReduceOp.MAX if method == "max" else dist.ReduceOp.SUM)
    ends = ends if method == "max" else ends / dist.get_world_size()
    return -ends[:1], ends[1:]


# --- weights ----------------------------------------------------------------------------------------------------------


def _of_weight(name: str, layer: QuantizedLayer) -> tuple[Tensor, Tensor, Ranged]:
    operand = _operand(layer, "w")
    with at_rest(layer), gathered(layer):
        parts = [operand.transformed(canonical(part), layer.states) for part in layer.weights()]  # type: ignore[arg-type]
        decoded = [q.decode() for q in layer.quantized_weights()] if _has_range(operand, layer) else None
    rows_GE = torch.cat([group_rows(part.float(), operand.format) for part in parts], 1)
    if not bool(rows_GE.isfinite().all()):
        raise ValueError(f"layer {name!r} has a weight that is not finite: no range holds it")
    low, high = least_error(rows_GE, *bounds(*torch.aminmax(rows_GE, dim=1), operand.format), operand.format)
    power = float(rows_GE.double().square().sum()) or 1.0
    before = None
    if decoded is not None:
        before = sum(float((q - w).double().square().sum()) for q, w in zip(decoded, parts, strict=True)) / power
    after = float(squared_error(rows_GE, low, high, operand.format).sum()) / power
    return low, high, Ranged(name, "w", "mse", float(low.min()), float(high.max()), before, after)


# --- the recipe -------------------------------------------------------------------------------------------------------


def _store(ranges: Iterable[tuple[QuantizedLayer, str, Tensor, Tensor, Ranged]]) -> None:
    for layer, letter, low, high, _ in ranges:
        operand = _operand(layer, letter)
        if not _keeps_range(operand.quantizer.calibrate):
            layer.recipe = _with_range(layer.recipe, letter, low.numel())
            operand = _operand(layer, letter)
        stage = operand.quantizer.calibrate
        assert isinstance(stage, Calibration)
        state = operand.state(layer.states)[stage.word]
        device = layer.weight.device
        if isinstance(stage, Stored):
            state.set(low.to(device), high.to(device))  # type: ignore[operator]
            continue
        scale, _, offset = calibrate_groups(
            low, high, None, operand.format, "minmax" if operand.format.offset else "absmax", (-1.0, 1.0)
        )
        codes = torch.empty(0, dtype=torch.uint8, device=device)
        stage.resume(state, QTensor(codes, scale.to(device), offset, None, operand.format, (0, 0, 0)))


def _with_range(recipe: Recipe, letter: str, groups: int) -> Recipe:
    """The recipe with a stored range for x or w of the forward."""
    x, w = recipe.output.left, recipe.output.right
    stage = Stored(groups)
    if letter == "w":
        assert isinstance(w, Quantizer)
        w = replace(w, calibrate=stage)
    else:
        assert isinstance(x, Quantizer)
        clipped = x.estimator is None and x.pass_range is None
        x = replace(x, granularity="tensor", calibrate=stage, estimator=stage if clipped else x.estimator)
    return replace(recipe, output=Product(x, w, recipe.output.transform))
