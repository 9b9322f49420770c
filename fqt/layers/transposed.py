"""QuantConv1D: the transposed linear layer of transformers' GPT-2, whose weight is (in, out), with a recipe.

It is known by its path, so that transformers need not be installed, nor imported.
"""

from __future__ import annotations

from torch import Tensor, nn

from fqt import functional
from fqt.layers.base import QuantizedLayer, register_layer


@register_layer("transformers.pytorch_utils.Conv1D")
class TransposedLinear(QuantizedLayer):
    """A linear layer that keeps its weight transposed, (I, O), whose three products follow `recipe`."""

    nf: int
    nx: int

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

    def split(self, weight: Tensor) -> list[Tensor]:
        return [weight.T]

    def weight_OKI(self) -> Tensor:
        return self.weight.T.unsqueeze(1)

    def like(self, kind: type[nn.Module]) -> nn.Module:
        return kind(self.nf, self.nx)
