"""AdaPT (arXiv 2107.13490): every layer's <WL, FL> moves while the model trains. The composition; the parts stand beside it.

push down   the smallest format that does not change how the weights are distributed     push_down.py
push up     more bits where recent gradients are diverse: the layer still learns         push_up.py
then lookback, resolution and strategy move by one step                                  transitions.py
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fqt.layers import QuantizedLayer
from fqt.precision.cost import switching_cost
from fqt.precision.formats import MAX_WORD_LENGTH, Precision, at_precision, is_fixed
from fqt.precision.initialize import initialize_tnvs
from fqt.precision.policy import Decision, Input, Policy, check_bounds, check_number, register_policy
from fqt.precision.push_down import EPSILON, nearest, push_down
from fqt.precision.push_up import STRATEGIES, gradient_diversity, push_up, raise_by
from fqt.precision.transitions import Bounds, next_lookback, next_resolution, next_strategy
from fqt.recipe import Recipe
from fqt.wording import nearest as nearest_name

BUFFER = 8


@dataclass(frozen=True)
class Settings:
    """What may differ from layer to layer; see `AdaPT`."""

    resolution: Bounds
    lookback: Bounds
    lookback_momentum: float
    buffer: int | None
    max_word_length: int
    epsilon: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "resolution", check_bounds("resolution", self.resolution, 2, 1 << 16))
        object.__setattr__(self, "lookback", check_bounds("lookback", self.lookback, 1, 1 << 30))
        check_number("lookback_momentum", self.lookback_momentum, 0, 1)
        check_number("max_word_length", self.max_word_length, 2, MAX_WORD_LENGTH, integer=True)
        check_number("epsilon", self.epsilon, 0, math.inf)
        if self.buffer is not None:
            check_number("buffer", self.buffer, 0, MAX_WORD_LENGTH - 1, integer=True)

    def of(self, name: str, recipe: Recipe) -> Settings:
        """With the buffer that a layer of this recipe has."""
        at_precision(recipe, Precision(8, 4))  # says why not
        if not is_fixed(recipe, "x"):
            if self.buffer is not None:
                raise ValueError(
                    f"buffer is {self.buffer}: it has no effect on layer {name!r}, whose activations do not share <WL, FL> "
                    f"(recipe {recipe.name!r}); leave it out"
                )
            return self
        buffer = BUFFER if self.buffer is None else self.buffer
        if buffer >= self.max_word_length:
            raise ValueError(
                f"buffer is {buffer}: it leaves no fraction in words of max_word_length={self.max_word_length} bits; lower it"
            )
        return replace(self, buffer=buffer)


@dataclass
class _Layer:
    """What is remembered of a layer between its decisions."""

    settings: Settings
    start: Recipe
    resolution: int
    lookback: int
    seen: int = 0
    sum_of_norms: float = 0.0
    total: Tensor | None = None
    diversity: float = math.nan
    sparsity: float = 0.0


_REMEMBERED = ("resolution", "lookback", "seen", "sum_of_norms", "total", "diversity", "sparsity")


@register_policy("adapt")
class AdaPT(Policy):
    """Assigns every layer the fixed-point format <WL, FL> that its weights and gradients ask for, every `lookback` steps.

        model = fqt.convert(model, "adapt")
        controller = fqt.AdaPT(model, lookback=(25, 100), layers={"fc*": {"buffer": 4}})
        ...
        loss = criterion(model(x), y) + controller.penalty()
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()

    Training begins in the formats of the recipe. On a CPU words of at most 8 bits are multiplied as bytes; of 9 to 16 bits as
    16-bit integers, exactly: as many products are added in 32 bits as these hold, and those sums in 64; above, the values are
    multiplied in float32. `fqt.summary(model)` says which. The sum of each layer's recent gradients is kept beside its weight.

    Args:
        model: converted by a recipe with weights in fixed point: adapt (the paper's: activations share <WL, FL>), or
            adapt_calibrated (activations of WL bits with a scale of their own, which needs no buffer, so words are short).
        resolution: (min, max) bins of push down's histograms.
        lookback: (min, max) steps between a layer's decisions.
        lookback_momentum: weight of the newly computed lookback against the one before, 0 to 1.
        strategy: of push up, at the start: "min", "mean" or "max".
        buffer: bits of headroom between FL and WL for activations that share the layer's format. None: 8 for such layers.
        max_word_length: the longest word; 8 keeps every product on the kernels of bytes, 16 on integers.
        epsilon: the Kullback-Leibler divergence that counts as none, in nats.
        l1, l2: weights of sum |w| and sum w^2 / 2 of all converted layers in `penalty`.
        word_length_penalty: weight of sum over layers of WL/32 times the share of non-zero weights in `penalty`.
        initializer: "" keeps the weights; "tnvs" draws them anew (truncated normal variance scaling).
        initializer_scale: s of "tnvs".
        gradient_normalization: divide every gradient by its norm before they are added up, as the paper's code does.
        layers: pattern of layer names -> options of these layers: resolution, lookback, lookback_momentum, buffer,
            max_word_length and epsilon. The first pattern that matches decides.

    Raises:
        ValueError: an option that means nothing, by name; a pattern that matches no layer; a recipe without <WL, FL>.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        resolution: Bounds = (50, 150),
        lookback: Bounds = (25, 100),
        lookback_momentum: float = 1.0,
        strategy: str = "min",
        buffer: int | None = None,
        max_word_length: int = MAX_WORD_LENGTH,
        epsilon: float = EPSILON,
        l1: float = 1e-8,
        l2: float = 1e-4,
        word_length_penalty: float = 1e-3,
        initializer: str = "",
        initializer_scale: float = 1.0,
        gradient_normalization: bool = False,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        common = Settings(resolution, lookback, lookback_momentum, buffer, max_word_length, epsilon)
        for name, value in (("l1", l1), ("l2", l2), ("word_length_penalty", word_length_penalty)):
            check_number(name, value, 0, math.inf)
        check_number("initializer_scale", initializer_scale, 1e-30, 1e30)
        for name, value, known in (("strategy", strategy, STRATEGIES), ("initializer", initializer, ("", "tnvs"))):
            if value not in known:
                raise ValueError(f"{name} {value!r} is not one of {', '.join(map(repr, known))}")
        super().__init__(model)
        for name, layer in self.layers.items():
            if layer._parameters.get(layer.weight_name) is None:
                raise ValueError(
                    f"layer {name!r}: its weight is computed before every forward or of several parameters, and adapt reads a "
                    f"parameter's gradient: convert with skip={name!r}, or choose the policy 'variance'"
                )
        self.strategy, self.gradient_normalization = strategy, gradient_normalization
        self._l1, self._l2, self._word_length_penalty = l1, l2, word_length_penalty
        self._of = self._remembered(common, layers or {})
        self._losses: deque[float] = deque(maxlen=max(state.settings.lookback[1] for state in self._of.values()))
        if initializer:
            initialize_tnvs(model, initializer_scale)

    def _remembered(self, common: Settings, overrides: Mapping[str, Mapping[str, Any]]) -> dict[str, _Layer]:
        names = [field.name for field in fields(Settings)]
        for pattern, options in overrides.items():
            if not any(fnmatchcase(name, pattern) for name in self.layers):
                raise ValueError(
                    f"layers: the pattern {pattern!r} matches no converted layer{nearest_name(pattern, self.layers)}"
                )
            for option in options:
                if option not in names:
                    where = f"layers: {pattern!r} has no option {option!r}{nearest_name(option, names)}"
                    raise ValueError(f"{where}; a layer's options are {', '.join(names)}")
        remembered = {}
        for name, layer in self.layers.items():
            own = next((options for pattern, options in overrides.items() if fnmatchcase(name, pattern)), {})
            settings = replace(common, **own).of(name, layer.recipe)
            remembered[name] = _Layer(settings, layer.recipe, settings.resolution[0], settings.lookback[0])
        return remembered

    def precision(self, layer: str) -> Precision:
        """The <WL, FL> of a layer's weights."""
        quantizer = self.layers[layer].recipe.quantizer("output", "w")
        assert quantizer is not None and quantizer.fraction_length is not None
        return Precision(quantizer.bits, quantizer.fraction_length)

    def penalty(self) -> Tensor:
        """l1 sum |w| + l2 sum w^2 / 2 + word_length_penalty sum WL/32 (share of non-zero weights); the last has no gradient."""
        words = sum(self.precision(name).word_length / 32 * (1 - state.sparsity) for name, state in self._of.items())
        penalty = torch.tensor(self._word_length_penalty * words)
        for layer in self.layers.values():
            if self._l1:
                penalty = penalty + self._l1 * layer.weight.abs().sum()
            if self._l2:
                penalty = penalty + self._l2 / 2 * layer.weight.square().sum()
        return penalty

    def decide(self, loss: float, epoch: float) -> Iterator[Decision]:
        if math.isfinite(loss):
            self._losses.append(loss)
        self._add_gradients()
        due = [name for name, state in self._of.items() if state.seen >= state.lookback]
        if not due:
            return
        now, mean = self._recent_losses()
        self.strategy = next_strategy(self.strategy, now, mean)
        for name in due:
            yield self._decide(name, {"strategy": self.strategy, "loss": now, "loss_mean": mean})

    def _recent_losses(self) -> tuple[float, float]:
        """The newest quarter's mean and the mean of all losses of a mean lookback. One batch's loss alone is above the mean
        every other time, whatever the trend: a strategy that follows it is drawn by lot."""
        window = round(sum(state.lookback for state in self._of.values()) / len(self._of))
        recent = list(self._losses)[-window:]
        newest = recent[-max(1, len(recent) // 4) :]
        return (_mean(newest), _mean(recent)) if recent else (math.nan, math.nan)

    @torch.no_grad()
    def _add_gradients(self) -> None:
        """Add this step's gradients to each layer's sums. One that is not finite, zero or missing adds nothing."""
        gradients = {name: layer.weight.grad for name, layer in self.layers.items() if layer.weight.grad is not None}
        norms = torch.stack([g.norm() for g in gradients.values()]).tolist() if gradients else []  # one wait for a GPU
        for state in self._of.values():
            state.seen += 1
        for (name, g), norm in zip(gradients.items(), norms, strict=True):
            state = self._of[name]
            if not math.isfinite(norm) or norm == 0:
                continue
            if state.total is None:
                state.total = torch.zeros_like(g, dtype=torch.float32)
            state.total.add_(g, alpha=1 / norm if self.gradient_normalization else 1.0)
            state.sum_of_norms += 1.0 if self.gradient_normalization else norm

    @torch.no_grad()
    def _decide(self, name: str, common: Mapping[str, Input]) -> Decision:
        state, layer = self._of[name], self.layers[name]
        settings, used = state.settings, {"lookback": state.lookback, "resolution": state.resolution}
        norm = 0.0 if state.total is None else float(state.total.norm())
        state.diversity = gradient_diversity(state.sum_of_norms, norm)
        before = self.precision(name)
        weight = layer.weight.detach()
        down, bits, after = before, 0, before
        if bool(weight.isfinite().all()):
            down = push_down(weight, state.resolution, epsilon=settings.epsilon)
            bits = raise_by(state.diversity, down.fraction_length, self.strategy)
            after = push_up(_at_least_two_bits(down), bits, settings.buffer, settings.max_word_length)
        state.sparsity = _sparsity(layer, after)
        state.lookback = next_lookback(state.lookback, state.diversity, settings.lookback, settings.lookback_momentum)
        state.resolution = next_resolution(state.resolution, state.lookback, settings.lookback, settings.resolution)
        state.seen, state.sum_of_norms, state.total = 0, 0.0, None
        inputs = {
            **used, "push_down": str(down), "diversity": state.diversity, **common, "raise": bits, "format": str(after),
            "sparsity": state.sparsity, "next_lookback": state.lookback, "next_resolution": state.resolution,
        }  # fmt: skip
        return self.decision(name, at_precision(state.start, after), inputs)

    def switching_cost(self) -> float:
        return sum(
            switching_cost(
                self.layers[name].weight.numel(),
                self.precision(name).word_length,
                state.resolution,
                state.lookback,
                1 - state.sparsity,
            )
            for name, state in self._of.items()
        )

    def sparsity(self) -> dict[str, float]:
        return {name: state.sparsity for name, state in self._of.items()}

    def scalars(self) -> dict[str, float]:
        """Resolution, lookback, gradient diversity and sparsity of each layer, and the strategy as 0 min, 1 mean, 2 max."""
        shown = {"strategy": float(STRATEGIES.index(self.strategy))}
        for name, state in self._of.items():
            for what in ("resolution", "lookback", "diversity", "sparsity"):
                value = float(getattr(state, what))
                if math.isfinite(value):
                    shown[f"{what}/{name}"] = value
        return shown

    def own_state(self) -> dict[str, Any]:
        layers = {name: {key: getattr(state, key) for key in _REMEMBERED} for name, state in self._of.items()}
        return {"strategy": self.strategy, "losses": list(self._losses), "layers": layers}

    def load_own_state(self, state: dict[str, Any]) -> None:
        self.strategy = state["strategy"]
        self._losses.clear()
        self._losses.extend(state["losses"])
        for name, remembered in state["layers"].items():
            total = remembered["total"]
            moved = None if total is None else total.to(self.layers[name].weight.device, copy=True)
            self._of[name] = replace(self._of[name], **{**remembered, "total": moved})


def _at_least_two_bits(precision: Precision) -> Precision:
    """All zeros need one bit only, from which a weight could not come back: its largest value is 0."""
    return replace(precision, word_length=max(precision.word_length, 2))


def _sparsity(layer: QuantizedLayer, precision: Precision) -> float:
    """Share of the weights that are zero in a format."""
    return float((nearest(layer.weight.detach(), precision.word_length, precision.fraction_length) == 0).double().mean())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
