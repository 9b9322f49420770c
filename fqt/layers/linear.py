"""QuantLinear: nn.Linear with a recipe."""

from __future__ import annotations

from torch import Tensor, nn

from fqt import functional
from fqt.layers.base import QuantizedLayer, register_layer
from fqt.layers.tensor_parallel import multiply_part
from fqt.packed import Weight
from fqt.sharded import is_dtensor


@register_layer(nn.Linear)
class QuantLinear(QuantizedLayer, nn.Linear):
    """nn.Linear whose three products follow `recipe`."""

    options = ("in_features", "out_features")

    def compute(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and is_dtensor(input):
            return multiply_part(input, self.weight, self.bias, self._multiply)
        return self._multiply(input, self.weights()[0], self.bias)

    def _multiply(self, input: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        return functional.linear(
            input,
            weight,
            bias,
            self.recipe,
            training=self.training,
            states=self.states,
            fusion=self.fusion,
            backend=self.backend,
        )

    def weight_OKI(self) -> Tensor:
        return self.weight.unsqueeze(1)
