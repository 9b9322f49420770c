"""How long forwards take, several models in turns, so that a machine that slows down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Timing:
    """Wall time of a forward. milliseconds: the median; rounds: of how many."""

    milliseconds: float
    rounds: int


def time_forwards(models: Sequence[nn.Module], x: object, seconds: float) -> list[Timing]:
    """A `Timing` of each model's forward of x without gradients, after one that is not counted; at least three rounds."""
    spent: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for model in models:
            model(x)
        end = time.perf_counter() + seconds
        while len(spent[0]) < 3 or time.perf_counter() < end:
            for model, times in zip(models, spent, strict=True):
                start = time.perf_counter()
                model(x)
                times.append(time.perf_counter() - start)
    return [Timing(1e3 * statistics.median(times), len(times)) for times in spent]
