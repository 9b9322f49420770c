"""The training loop of a small real run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fqt.precision import Decision, Policy
from tests.fqt.precision.small_run import Run, batch


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
