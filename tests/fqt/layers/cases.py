"""A recipe whose codes are nearly exact, and a training step."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

import fqt

INT16 = replace(
    fqt.load_recipe("int8"),
    name="int16",
    output=fqt.Product(fqt.Quantizer("int", 16, "sample", "absmax"), fqt.Quantizer("int", 16, "channel", "absmax")),
    grad_input=fqt.Product(fqt.Quantizer("int", 16, "sample", "absmax"), "saved"),
    grad_weight=fqt.Product(fqt.Quantizer("int", 16, "channel", "absmax"), "saved"),
).everywhere()


def step(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return [y.detach(), leaf.grad, *(parameter.grad for parameter in layer.parameters())]
