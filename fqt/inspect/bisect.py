"""bisect: which layers have to stay float for a model to work."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from fqt.convert import convert
from fqt.layers import quantized_layers
from fqt.recipe import Recipe


def bisect(model: nn.Module, recipe: str | Path | Recipe, works: Callable[[nn.Module], bool]) -> list[str]:
    """Find layers to keep in float, so that the rest trains in low bits: none of them can be left out of the list.

        bad = fqt.bisect(model, "fqt_1bit", lambda m: loss_after(m, steps=50) < 2.0)
        fqt.convert(model, "fqt_1bit", skip=bad)

    Delta debugging (Zeller and Hildebrandt, 2002): halves of the layers, then quarters, are converted and tried. About
    2 log2(n) trials where one of n layers is to blame; n^2 at the very most. The result is minimal, not the smallest there is:
    two layers may be able to stand in for each other.

    Args:
        model: a model that is not converted. It stays as it is: each trial gets a copy.
        recipe: as for `convert`.
        works: whether a model does what is wanted of it. It may train it. Each trial starts from the same state of torch's
            generators, which come back as they were; other randomness is the caller's to fix.

    Returns:
        Names of layers for `convert(..., skip=names)`; empty where all can be converted.

    Raises:
        ValueError: the unconverted model does not work either, or as for `convert`.
    """
    layers = [name for name, _ in quantized_layers(convert(copy.deepcopy(model), recipe))]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}

    def with_float(kept: Sequence[str]) -> bool:
        trial = copy.deepcopy(model)
        if len(kept) < len(layers):
            convert(trial, recipe, skip=[_exactly(name) for name in kept])
        with torch.random.fork_rng(devices):
            return bool(works(trial))

    if not with_float(layers):
        raise ValueError(
            f"this {type(model).__name__} does not work unconverted either, so no choice of layers can help: check `works`, or "
            "train the model in float first"
        )
    if with_float([]):
        return []
    kept, parts = layers, 2
    while len(kept) > 1:
        size = -(-len(kept) // parts)
        pieces = [kept[start : start + size] for start in range(0, len(kept), size)]
        rests = [[name for name in kept if name not in piece] for piece in pieces]
        smaller = next((some for some in (*pieces, *(rests if len(pieces) > 2 else ())) if with_float(some)), None)
        if smaller is not None:
            parts = 2 if smaller in pieces else max(len(pieces) - 1, 2)
            kept = smaller
        elif size == 1:
            break
        else:
            parts = min(2 * len(pieces), len(kept))
    return kept


def _exactly(name: str) -> str:
    """A pattern that matches this name alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
