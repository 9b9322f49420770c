"""QuantLinear: nn.Linear with a recipe."""

from __future__ import annotations

from torch import Tensor, nn

from fqt import functional
from fqt.layers.base import QuantizedLayer


class QuantLinear(QuantizedLayer, nn.Linear):
    """nn.Linear whose three products follow `recipe`."""

    kind = "linear"

    def window(self) -> None:
        """A linear layer has no window."""

    def compute(self, input: Tensor) -> Tensor:
        return functional.linear(
            input,
            self.weight,
            self.bias,
            self.recipe,
            training=self.training,
            defer=self.fuse,
            backend=self.backend,
        )
