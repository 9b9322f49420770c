"""QuantLinear: nn.Linear with a recipe."""

from __future__ import annotations

from torch import Tensor, nn

from fqt import functional
from fqt.layers.base import QuantizedLayer, register_layer


@register_layer(nn.Linear)
class QuantLinear(QuantizedLayer, nn.Linear):
    """nn.Linear whose three products follow `recipe`."""

    options = ("in_features", "out_features")

    def compute(self, input: Tensor) -> Tensor:
        return functional.linear(
            input,
            self.weights()[0],
            self.bias,
            self.recipe,
            training=self.training,
            states=self.states,
            fusion=self.fusion,
            backend=self.backend,
        )

    def weight_OKI(self) -> Tensor:
        return self.weight.unsqueeze(1)
