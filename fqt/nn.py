"""QuantLinear and QuantConv2d: torch's own modules with a recipe. Parameters, buffers and their names stay what they were."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fqt import functional
from fqt.qtensor import QTensor
from fqt.quantizers.base import quantize, transformed
from fqt.recipe import Recipe


class QuantizedLayer(nn.Module):
    """What both layers share.

    Attributes:
        recipe: how the layer computes. A precision controller assigns a new one; it never changes one.
    """

    recipe: Recipe
    weight: nn.Parameter

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe.name}"

    def quantized_weight(self) -> QTensor | None:
        """The weight's codes as the forward computes with them, logical (O, K, I); None if the recipe keeps it float."""
        quantizer = self.recipe.quantizer("output", "w")
        if quantizer is None:
            return None
        with torch.no_grad():
            w_OKI = self.weight.flatten(2).transpose(1, 2) if self.weight.dim() == 4 else self.weight.unsqueeze(1)
            key = torch.zeros((), dtype=torch.int64, device=w_OKI.device) if quantizer.random else None
            return quantize(transformed(w_OKI, quantizer), quantizer, "w", key=key)[0]


class QuantLinear(QuantizedLayer, nn.Linear):
    """nn.Linear whose three products follow `recipe`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias, self.recipe, training=self.training)


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """nn.Conv2d whose three products follow `recipe`: any stride, padding and padding mode, dilation and groups."""

    def forward(self, input: Tensor) -> Tensor:
        left, right, top, bottom = self._padding()
        if self.padding_mode != "zeros" and (left or right or top or bottom):
            input = F.pad(input, (left, right, top, bottom), mode=self.padding_mode)
            left = right = top = bottom = 0
        return functional.conv2d(
            input,
            self.weight,
            self.bias,
            self.recipe,
            stride=(self.stride[0], self.stride[1]),
            padding=(top, bottom, left, right),
            dilation=(self.dilation[0], self.dilation[1]),
            groups=self.groups,
            training=self.training,
        )

    def _padding(self) -> tuple[int, int, int, int]:
        """Left, right, top, bottom; "same" puts the odd one right and bottom, as torch does."""
        if not isinstance(self.padding, str):
            return self.padding[1], self.padding[1], self.padding[0], self.padding[0]
        if self.padding == "valid":
            return 0, 0, 0, 0
        total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """(name, layer) of each converted layer, each module once."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            yield name, module
