"""A network of a convolution and two linear layers, and noisy patterns that it learns: a small real run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import fqt
from fqt.precision import Decision

CLASSES = 4


def network(recipe: str | fqt.Recipe = "adapt", seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(6 * 9, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    fqt.convert(model, fqt.load_recipe(recipe).everywhere())
    return model


def batch(step: int, size: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(99)
    patterns = torch.randn(CLASSES, 1, 6, 6, generator=generator)
    generator.manual_seed(1000 + step)
    y = torch.randint(CLASSES, (size,), generator=generator)
    return patterns[y] + 0.7 * torch.randn(size, 1, 6, 6, generator=generator), y


Run = Callable[..., list[Decision]]
"""train(model, policy, steps, first=0, optimizer=None) -> the decisions."""
