"""variance: gradient bits so that quantization adds little to the variance that a minibatch's gradient has anyway.

1-Bit FQT's theory (arXiv 2408.14267) has convergence slowed by the variance of the quantized gradient; arXiv 2505.19115 sees
training stall once ||g|| falls below sqrt(3) times the quantization noise. Stochastic rounding to b bits of a group of D
values of range R adds at most

    V_group = R^2 D / (4 L^2),  L = 2^b - 1 steps (of a symmetric grid, its own number)

and pruning that keeps the group with probability p and multiplies it by 1/p makes that V_group / p + (1 - p) / p ||g||^2. A
layer gets the fewest bits with

    V = sum over groups <= min(fraction * sum over samples ||g_n - mean g||^2,  ||g||^2 / 3)

in both of its gradient products. A gradient that is not finite, or all zeros, changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fqt.layers import QuantizedLayer
from fqt.precision.formats import at_gradient_bits
from fqt.precision.policy import Decision, Policy, check_number, register_policy
from fqt.quantizers import Quantizer
from fqt.recipe import Recipe
from fqt.reference import group_range, group_rows

GRADIENT_PRODUCTS = ("grad_input", "grad_weight")
STALL = 3.0
"""The square of arXiv 2505.19115's ratio of ||g|| to the noise, below which training stalls."""


@register_policy("variance")
class Variance(Policy):
    """Chooses each layer's gradient bits among `bits`, every `every` steps.

    Args:
        model: converted by a recipe with quantized gradients: fqt_1bit, psq_b4, int8.
        fraction: quantization's variance over the minibatch's own, at most.
        bits: what to choose among; what a grid does not have (1 bit of a symmetric integer) is left out for it.
        every: steps between two choices; the gradients of that one step are looked at.

    Raises:
        ValueError: an option that means nothing; a recipe that leaves gradients float.
    """

    def __init__(
        self, model: nn.Module, *, fraction: float = 0.1, bits: Sequence[int] = (1, 2, 4, 8), every: int = 100
    ) -> None:
        check_number("fraction", fraction, 0, math.inf)
        check_number("every", every, 1, 1 << 30, integer=True)
        if not isinstance(bits, Sequence) or not bits or list(bits) != sorted(set(bits)):
            raise ValueError(f"bits is {bits!r}, not a rising list such as [1, 2, 4, 8]")
        for number in bits:
            check_number("bits", number, 1, 16, integer=True)
        super().__init__(model)
        self._fraction, self._every = fraction, every
        self._choices = {name: _choices(name, layer.recipe, bits) for name, layer in self.layers.items()}
        self._seen: dict[str, dict[str, float]] = {}
        self._shown: dict[str, float] = {}
        self._watch(every == 1)

    def _watch(self, on: bool) -> None:
        for name, layer in self.layers.items():
            layer.watcher = self._watcher(name, layer) if on else None
        self._seen = {}

    def _watcher(self, name: str, layer: QuantizedLayer) -> Callable[[Tensor], None]:
        def look(g: Tensor) -> None:
            found = variances(layer.canonical(g).float(), self._choices[name])
            sums = self._seen.setdefault(name, dict.fromkeys(found, 0.0))
            for key, value in found.items():
                sums[key] += value

        return look

    def decide(self, loss: float, epoch: float) -> Iterator[Decision]:
        seen = {name: self._agreed(self._seen[name]) for name in self.layers if name in self._seen}
        self._watch((self.steps + 1) % self._every == 0)
        for name, found in seen.items():
            if not all(map(math.isfinite, found.values())) or found["power"] <= 0:
                continue
            bound = min(self._fraction * found["own"], found["power"] / STALL)
            choices = self._choices[name]
            bits = next((bits for bits in choices if found[f"at {bits}"] <= bound), max(choices))
            self._shown[f"variance/{name}"] = found[f"at {bits}"] / found["own"] if found["own"] > 0 else 0.0
            inputs = {"bits": bits, "own_variance": found["own"], "power": found["power"], "bound": bound}
            at = {f"variance_at_{bits}": found.get(f"at {bits}", "") for bits in sorted(set().union(*self._choices.values()))}
            yield self.decision(name, choices[bits], {**inputs, **at})

    def _agreed(self, sums: dict[str, float]) -> dict[str, float]:
        return dict(zip(sums, self.agreed(list(sums.values())), strict=True))

    def scalars(self) -> dict[str, float]:
        """Predicted variance of each layer's quantization over the minibatch's own, at the last choice."""
        return dict(self._shown)

    def own_state(self) -> dict[str, Any]:
        return {"shown": dict(self._shown)}

    def load_own_state(self, state: dict[str, Any]) -> None:
        self._shown = dict(state["shown"])
        self._watch((self.steps + 1) % self._every == 0)


def _choices(name: str, recipe: Recipe, bits: Sequence[int]) -> dict[int, Recipe]:
    """Bits -> the recipe with gradients of that many bits, for those that its grids have."""
    if not any(recipe.quantizer(product, "g") for product in GRADIENT_PRODUCTS):
        raise ValueError(f"layer {name!r}: recipe {recipe.name!r} leaves the gradients float, so there are no bits to choose")
    choices = {}
    for number in bits:
        try:
            choices[number] = at_gradient_bits(recipe, number)
        except ValueError:  # the grid has not that many bits
            continue
    if not choices:
        raise ValueError(f"layer {name!r}: the gradients of recipe {recipe.name!r} have none of the bits {list(bits)}")
    return choices


@torch.no_grad()
def variances(g_NPO: Tensor, choices: dict[int, Recipe]) -> dict[str, float]:
    """power: ||g||^2; own: sum over samples of ||g_n - mean g||^2; "at b": what quantizing to b bits adds, the larger of the
    two gradient products."""
    squares = g_NPO.double().square().sum()
    found = {"power": squares, "own": squares - g_NPO.shape[0] * g_NPO.double().mean(0).square().sum()}
    for bits, recipe in choices.items():
        quantizers = [recipe.quantizer(product, "g") for product in GRADIENT_PRODUCTS]
        added = [quantization_variance(g_NPO, quantizer) for quantizer in quantizers if quantizer is not None]
        found[f"at {bits}"] = torch.stack(added).max()
    return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))


def quantization_variance(g_NPO: Tensor, quantizer: Quantizer) -> Tensor:
    """The largest E ||Q(g) - g||^2 that stochastic rounding, and pruning, can have; () float64."""
    rows_GE = group_rows(g_NPO, quantizer.format("g"))
    low, high = (v.double() for v in group_range(rows_GE))
    span = high - low if quantizer.calibrate == "minmax" else 2 * torch.maximum(high, -low)
    first, last = quantizer.format("g").code_range
    added = span.square() * rows_GE.shape[1] / (4 * (last - first) ** 2)
    if not quantizer.prune:
        return added.sum()
    power = rows_GE.double().square().sum(1)
    kept = max(rows_GE.shape[0] / quantizer.keep_one_in, 1.0)
    if quantizer.prune == "topk":
        keep = torch.zeros_like(power).index_fill_(0, torch.maximum(high, -low).topk(int(kept)).indices, 1.0)
        return (keep * added + (1 - keep) * power).sum()
    p = keep_probabilities(high.clamp(min=0) - low.clamp(max=0), kept)
    present = p > 0
    return (added[present] / p[present] + (1 - p[present]) / p[present] * power[present]).sum()


def keep_probabilities(range_G: Tensor, kept: float) -> Tensor:
    """AGP's p_i = min(1, c R_i) with c such that they sum to `kept`, as `fqt.reference.keep_groups` draws; 0 where R_i is."""
    largest = range_G.sort(descending=True).values
    rest = largest.flip(0).cumsum(0).flip(0)
    left = (kept - torch.arange(len(largest), device=range_G.device)).clamp(min=0)
    fits = (left * largest <= rest).nonzero()
    k = int(fits[0]) if fits.numel() else len(largest) - 1
    return (range_G * (left[k] / rest[k].clamp(min=1e-300))).clamp(max=1.0)
