"""The initializer that AdaPT's weights start from, and that sparsity likes (section 3.5)."""

from __future__ import annotations

import math

import torch
from torch import nn

from fqt.layers import quantized_layers


@torch.no_grad()
def initialize_tnvs(model: nn.Module, scale: float = 1.0) -> None:
    """Truncated normal variance scaling of every converted layer's weight, in place: N(0, s/n) within +-sqrt(3 s/n).

    Args:
        scale: s; n is the number of inputs that an output sums over.
    """
    for _, layer in quantized_layers(model):
        n = layer.weight[0].numel()
        deviation = math.sqrt(scale / n)
        nn.init.trunc_normal_(layer.weight, 0.0, deviation, -math.sqrt(3) * deviation, math.sqrt(3) * deviation)
