"""The performance model: what a training step and an inference cost in multiply-adds times bits. Modelled, not measured.

AdaPT's (section 4.2), with what its code leaves out. Of layer l, MAdds_l multiply-adds a sample, WL_l bits, nz_l the share of
weights that are not zero, B samples a step:

    forward, float32      F = sum 32 MAdds
    forward, low          Q = sum nz WL MAdds
    the paper's speed-ups      training 2 F / (Q + F + S / B)      inference F / Q      size sum nz WL n / sum 32 n, n weights

Its code counts convolutions twice, and the backward as one float32 product. `Cost` counts each convolution once and all three
products at the bits b at which they really run (32 for words of more than 16 bits, whose products are float32's), zeros saving
work only where the weight is an operand:

    step, float32         B sum 3 32 MAdds
    step, low             B sum MAdds (nz b_output + nz b_grad_input + b_grad_weight) + S
    switching             S = sum 32 (push down + push up) / lookback
                          push down = 3 n 2 log2(WL - 8) resolution nz (that term 1 for WL <= 9), push up = (lookback + 1) n + 1
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from fqt.inspect.summary import summary
from fqt.layers import quantized_layers
from fqt.ops import PRODUCTS


@dataclass(frozen=True)
class Cost:
    """What the model says of one training step of a batch, in multiply-adds times bits.

    Attributes:
        float_step, low_step: all three products, in float32 and as the layers' recipes are now.
        switching: of deciding, spread over the steps between decisions.
        float_forward, low_forward: the output product alone, at the weights' word length, zeros left out.
        size: bits of the non-zero quantized weights over 32 bits each; layers that stay float included.
    """

    float_step: float
    low_step: float
    switching: float
    float_forward: float
    low_forward: float
    size: float

    @property
    def training_speedup(self) -> float:
        """Float32's step over this one, backward and switching included."""
        return self.float_step / (self.low_step + self.switching)

    @property
    def paper_training_speedup(self) -> float:
        """The paper's: a low-bit forward and a float32 backward of the same cost as the forward. Below 2."""
        return 2 * self.float_forward / (self.low_forward + self.float_forward + self.switching)

    @property
    def inference_speedup(self) -> float:
        """Float32's forward over this one."""
        return self.float_forward / self.low_forward

    @property
    def switching_share(self) -> float:
        """Part of the modelled step that is switching."""
        return self.switching / (self.low_step + self.switching)


def training_cost(
    model: nn.Module,
    *,
    batch: int = 1,
    sparsity: Mapping[str, float] | None = None,
    switching: float = 0.0,
) -> Cost:
    """The cost of a converted model as its recipes are now.

    Args:
        batch: samples a step.
        sparsity: layer -> share of zeros among its quantized weights (`Policy.sparsity`); none where it is missing.
        switching: of a step (`Policy.switching_cost`).

    Raises:
        ValueError: the multiply-adds are not known: the model has run no eager forward since its conversion.
    """
    zeros = sparsity or {}
    words = {}
    for name, layer in quantized_layers(model):
        format = layer.recipe.format("output", "w")
        words[name] = 32 if format is None else format.bits
    float_forward = low_forward = low = bits = numbers = 0.0
    for row in summary(model).rows:
        if row.madds is None:
            raise ValueError(
                f"the multiply-adds of layer {row.name!r} are unknown: run one eager forward of the converted model"
            )
        nonzero, word = 1 - zeros.get(row.name, 0.0), words.get(row.name, 32)
        float_forward += 32 * row.madds
        low_forward += nonzero * word * row.madds
        for product in PRODUCTS:
            work = nonzero if product != "grad_weight" else 1.0
            if row.bits[product] < 32:
                work *= row.kept[product]
            low += work * row.bits[product] * row.madds
        bits += nonzero * word * row.parameters
        numbers += row.parameters
    return Cost(
        float_step=len(PRODUCTS) * batch * float_forward,
        low_step=batch * low,
        switching=switching,
        float_forward=batch * float_forward,
        low_forward=batch * low_forward,
        size=bits / (32 * numbers),
    )


def switching_cost(weights: int, word_length: int, resolution: int, lookback: int, nonzero: float) -> float:
    """S of one layer, a step, in multiply-adds times 32 bits; the paper's formula.

    It charges push down with every bin for every weight. The histograms here take one pass a bisection instead, so what
    switching really costs (`Policy.milliseconds`, measured) is less.
    """
    steps = 2 * math.log2(word_length - 8) if word_length > 9 else 1.0
    push_down = 3 * weights * steps * resolution * nonzero
    push_up = (lookback + 1) * weights + 1
    return 32 * (push_down + push_up) / lookback
