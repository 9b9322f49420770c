"""How long a step takes at the layers' formats as they are: the performance model, calibrated on this machine.

Bits are not time: a kernel of words of at most 8 bits takes as long for 5 as for 8, words of 9 to 16 bits cost about as much as
float32, and a layer with few channels spends its time quantizing. So each layer's products are timed on the backends that serve
them, once for every set of backends that the layer comes to, in float32 beside it, on the shapes that reach it:

    step = float32's step - sum of the layers' products in float32 + sum of the layers' products as they are now
"""

from __future__ import annotations

import copy

from torch import nn

from fqt.inspect.summary import backends
from fqt.inspect.timing import record_calls, time_layer
from fqt.inspect.trial import undisturbed
from fqt.layers import QuantizedLayer, quantized_layers

Times = tuple[float, float]


class StepTime:
    """Predicts the milliseconds of a training step of a converted model whose recipes change.

    Args:
        model: converted; copied, not touched.
        input: what one forward takes, as large as in training.
        float_step_ms: a whole step of the unconverted model.
        forwards: that a step makes, where gradients are accumulated.
        seconds: spent on each layer and set of backends, at least five rounds.
    """

    def __init__(
        self, model: nn.Module, input: object, float_step_ms: float, *, forwards: int = 1, seconds: float = 0.02
    ) -> None:
        with undisturbed(model):
            self._calls = record_calls(copy.deepcopy(model), input)
        self._float_step_ms, self._forwards, self._seconds = float_step_ms, forwards, seconds
        self._known: dict[tuple[str, ...], Times] = {}

    def __call__(self, model: nn.Module) -> float:
        """Milliseconds of a step at the model's recipes; a layer on backends that it was not on before is timed first."""
        milliseconds = self._float_step_ms
        for name, layer in quantized_layers(model):
            if self._calls[name]:
                in_float, low = self._layer(model, name, layer)
                milliseconds += self._forwards * (low - in_float)
        return milliseconds

    def _layer(self, model: nn.Module, name: str, layer: QuantizedLayer) -> Times:
        """Milliseconds of a layer's products in float32 and as they are now."""
        served = (name, *(f"{product} {by.backend}" for product, by in backends(layer).items()))
        if served not in self._known:
            with undisturbed(model):
                rows = time_layer(name, layer, self._calls[name], self._seconds)
            self._known[served] = sum(row.float_ms for row in rows), sum(row.low_ms for row in rows)
        return self._known[served]
