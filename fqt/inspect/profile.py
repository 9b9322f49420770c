"""profile: which layers gain from low bits on this machine, and which lose."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import nn

from fqt.convert import convert
from fqt.inspect.timing import Profile, measure
from fqt.layers import quantized_layers, refuse_frozen
from fqt.recipe import Recipe


def profile(model: nn.Module, input: object, *, recipe: str | Path | Recipe | None = None, seconds: float = 0.1) -> Profile:
    """Time every converted layer, product by product, in float32 and in low bits, on the shapes of one forward of `input`.

    What is timed is what a training step pays: the product, the quantizing and packing of its operands, changes of layout.
    The model, its buffers, gradients and torch's generators stay as they are: everything happens on a copy.

        print(fqt.profile(model, images, recipe="fqt_1bit"))

    Args:
        input: a tensor, a tuple of arguments or a mapping of keyword arguments, as large as in training: times depend on it.
        recipe: of a model that is not converted, the recipe whose layers are timed. None: the model is converted.
        seconds: spent on each layer, at least; more is steadier. Medians of at least five calls.

    Raises:
        ValueError: the model is converted and a recipe is given, or neither.
    """
    trial = copied(model, recipe)
    return measure(trial, input, seconds=seconds)


def copied(model: nn.Module, recipe: str | Path | Recipe | None) -> nn.Module:
    """A converted copy: of a converted model, or of another by a recipe. ValueError if neither."""
    if recipe is None and not any(quantized_layers(model)):
        raise ValueError(f"nothing in this {type(model).__name__} is converted: pass recipe=..., or convert it first")
    refuse_frozen(model, "what looks at training")
    trial = copy.deepcopy(model)
    return trial if recipe is None else convert(trial, recipe)
