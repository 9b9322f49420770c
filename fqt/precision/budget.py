"""budget: the fewest bits a layer that keep the model within a budget of bit operations, spent where the error is largest.

A layer's bit operations are MAdds x (bits of x) x (bits of w), of one sample's forward. All layers begin at the fewest bits;
then the layer whose weights have the largest relative error ||Q(w) - w||^2 / ||w||^2, measured with its own quantizer, gets one
bit more, as long as the budget lasts. A layer that no longer fits leaves the rest to the others.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from fqt.inspect.summary import summary
from fqt.layers import QuantizedLayer
from fqt.precision.formats import at_word_length
from fqt.precision.policy import Decision, Policy, check_bounds, check_number, register_policy
from fqt.recipe import Recipe


@register_policy("budget")
class Budget(Policy):
    """Allots word lengths under a budget, anew every `every` steps.

    Args:
        model: converted by a recipe whose activations and weights are integers or fixed point: int8, adapt, dorefa_w8a8g8.
        budget: bit operations allowed, as a fraction of those at the most bits in all layers, above 0 and at most 1.
        bits: (fewest, most) bits of a word.
        every: steps between two allotments; the first is made after the first step.

    Raises:
        ValueError: an option that means nothing; a layer without a word length; a budget that the fewest bits exceed.
    """

    def __init__(self, model: nn.Module, *, budget: float, bits: tuple[int, int] = (2, 8), every: int = 100) -> None:
        self._fewest, self._most = check_bounds("bits", bits, 2, 16)
        check_number("budget", budget, 0, 1)
        check_number("every", every, 1, 1 << 30, integer=True)
        lowest = self._fewest**2 / self._most**2
        if budget < lowest:
            raise ValueError(
                f"budget is {budget:g}, but {self._fewest} bits everywhere already are {lowest:.4g} of {self._most} bits: "
                f"raise the budget, or lower the fewest bits"
            )
        super().__init__(model)
        self._budget, self._every = budget, every
        self._start: dict[str, Recipe] = {name: layer.recipe for name, layer in self.layers.items()}
        for name, recipe in self._start.items():
            if at_word_length(recipe, self._fewest).output == at_word_length(recipe, self._fewest + 1).output:
                raise ValueError(
                    f"layer {name!r}: recipe {recipe.name!r} has no operand whose word length a budget could set; use int8 or "
                    f"adapt"
                )

    def decide(self, loss: float, epoch: float) -> Iterator[Decision]:
        if (self.steps - 1) % self._every:
            return
        madds = {row.name: row.madds for row in summary(self.model).rows if row.name in self.layers and row.madds is not None}
        if len(madds) < len(self.layers):
            unknown = next(name for name in self.layers if name not in madds)
            raise ValueError(f"the multiply-adds of layer {unknown!r} are unknown: run one forward before torch.compile does")
        for name, (bits, error) in self._allot(madds).items():
            inputs = {"bits": bits, "error": error, "madds": madds[name], "budget": self._budget}
            yield self.decision(name, at_word_length(self._start[name], bits), inputs)

    def _allot(self, madds: dict[str, int]) -> dict[str, tuple[int, float]]:
        """Layer -> (bits, the error that they leave)."""
        bits = dict.fromkeys(self.layers, self._fewest)
        errors = {name: self._error(name, self._fewest) for name in self.layers}
        left = self._budget * sum(madds.values()) * self._most**2 - sum(madds.values()) * self._fewest**2
        open_layers = set(bits)
        while open_layers:
            # equal errors: the first layer, on every rank
            name = max(sorted(open_layers), key=lambda name: errors[name])
            price = madds[name] * ((bits[name] + 1) ** 2 - bits[name] ** 2)
            if bits[name] == self._most or price > left:
                open_layers.remove(name)
                continue
            left -= price
            bits[name] += 1
            errors[name] = self._error(name, bits[name])
        return {name: (bits[name], errors[name]) for name in self.layers}

    @torch.no_grad()
    def _error(self, name: str, bits: int) -> float:
        """||Q(w) - w||^2 / ||w||^2 at nearest rounding; 0 for weights that are all zero or not finite."""
        layer: QuantizedLayer = self.layers[name]
        operand = at_word_length(self._start[name], bits).operand("output", "w")
        if operand is None:
            return 0.0
        target = operand.transformed(layer.weight_OKI(), layer.states)
        q = operand.encode(target, key=None, training=False, states=layer.states, backend=layer.backend).q
        power = float(target.double().square().sum())
        error = float((q.decode().double() - target.double()).square().sum())
        return error / power if power > 0 and error < float("inf") else 0.0
