"""A small real run: a network of a convolution and two linear layers on noisy patterns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fqt
from fqt.precision import Decision, Policy

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


@pytest.fixture
def train() -> Run:
    """train(model, policy, steps, first=0, optimizer=None) -> the decisions."""

    def run(
        model: nn.Module,
        policy: Policy,
        steps: int,
        first: int = 0,
        optimizer: torch.optim.Optimizer | None = None,
        steps_per_epoch: int = 10,
    ) -> list[Decision]:
        optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        decisions = []
        for step in range(first, first + steps):
            x, y = batch(step)
            loss = nn.functional.cross_entropy(model(x), y) + policy.penalty()
            loss.backward()
            optimizer.step()
            decisions += policy.step(loss, epoch=(step + 1) / steps_per_epoch)
            optimizer.zero_grad()
        return decisions

    return run
