"""Batches of a loader, and a model that is only looked at while they run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fqt.inspect.trial import feed

Loader = Iterable[object]
"""Of batches: a tensor, a mapping of keyword arguments, or a tuple or list whose first element is the input."""


def taken(loader: Loader, batches: int, what: str) -> Iterator[object]:
    """The inputs of so many batches, with a progress bar. what: it is done for, for messages.

    Raises:
        ValueError: there is no batch.
        TypeError: the loader is one batch itself.
    """
    from tqdm.auto import tqdm  # not at import: it looks for a notebook

    if isinstance(loader, Tensor | Mapping | str):
        raise TypeError(f"fqt.{what} takes an iterable of batches, not one {type(loader).__name__}: put it into a list")
    if type(batches) is not int or batches < 1:
        raise ValueError(f"batches is {batches!r}, not a positive integer")
    count = 0
    length = len(loader) if isinstance(loader, Sized) else batches
    for batch in tqdm(islice(loader, batches), what, min(length, batches), leave=False, disable=None):
        count += 1
        if isinstance(batch, tuple | list):
            if not batch:
                raise ValueError(f"batch {count} of the loader is empty: its first element is the model's input")
            batch = batch[0]
        yield dict(batch) if isinstance(batch, Mapping) else batch
    if not count:
        raise ValueError(f"the loader is empty: fqt.{what} needs at least one batch (an iterator may be used up)")


def fed(model: nn.Module, input: object) -> object:
    """The model's output, of an input that is moved to where the model is."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return feed(model, tree_map_only(Tensor, lambda tensor: tensor.to(device), input))


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Within, the models are in evaluation, so that no running statistic moves; afterwards each module is as it was."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
