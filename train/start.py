"""How a run starts: where it continues, its random numbers, recipe and weights, the conversion of its model, its ranges."""

import random
import statistics
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fqt
from train import checkpoint
from train.config import Config
from train.wording import ConfigError


def find(resume: Path, anew: bool) -> Path | None:
    """The checkpoint to continue from; says which newer ones are damaged. Raises ConfigError where there is none."""
    found, damaged = checkpoint.find(resume)
    for fault in damaged:
        print(f"train: {fault} Continuing from {found}.", file=sys.stderr)
    if found is None and not anew:
        raise ConfigError(
            f"--resume {resume}: there is no {checkpoint.NAME}; give the path of a checkpoint or of a run's folder, or "
            "--resume auto, which begins anew where there is none."
        )
    return found


def seed(number: int) -> None:
    """Seeds torch, and what libraries may draw from beside it."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002


def load_recipe(recipe: str) -> fqt.Recipe:
    """Raises ConfigError with fqt's own words."""
    try:
        return fqt.load_recipe(recipe)
    except ValueError as error:
        raise ConfigError(f"recipe = {recipe}: {error}.") from error


def convert(model: nn.Module, recipe: fqt.Recipe, config: Config, example: object) -> None:
    """Makes the model a low-bit one, in place, with an example of its inputs. Raises ConfigError with fqt's own words."""
    if config.recipe == "fp32":
        return
    try:
        fqt.convert(model, recipe, skip=config.skip, example=example)
    except ValueError as error:
        raise ConfigError(f"recipe = {config.recipe}: {error}.") from error


def begin(model: nn.Module, config: Config, batches: Iterable[object], *, resumed: bool) -> str:
    """Static ranges and moved weights of a converted model, as the configuration says; what was done, in one line.

    batches: the model's inputs. resumed: a checkpoint follows, which has ranges in the same places and weights of its own.
    Raises ConfigError with fqt's own words.
    """
    wanted, said = config.start, []
    ranges, moves = wanted.calibrate != "none", wanted.reconstruct != "none" and not resumed
    seen = [(inputs,) for inputs in islice(batches, wanted.batches)] if ranges or moves else []
    try:
        if ranges:
            options = {"percent": wanted.percent, "weights": wanted.weights}
            found = fqt.calibrate(model, seen or None, method=wanted.calibrate, batches=max(len(seen), 1), **options)
            source = f"{len(seen)} batches" if seen else "BatchNorms"
            left = f", {len(found.skipped)} operands left as they were" if found.skipped else ""
            said.append(f"{len(found.rows)} ranges ({wanted.calibrate}) from {source}{left}")
        if moves:
            moved = fqt.reconstruct(model, seen, method=wanted.reconstruct, steps=wanted.steps, batches=len(seen))
            before, after = (
                statistics.mean(getattr(row, name) if row.kept else row.before for row in moved.rows) if moved.rows else 0.0
                for name in ("before", "after")
            )
            kept = sum(row.kept for row in moved.rows)
            said.append(
                f"{wanted.reconstruct} moved {kept} of {len(moved.rows) + len(moved.skipped)} layers, "
                f"mean error of their outputs {before:.2e} -> {after:.2e}"
            )
    except ValueError as error:
        raise ConfigError(f"start: {error}.") from error
    return "; ".join(said)


def load_weights(model: nn.Module, path: Path) -> None:
    """A warm start. Raises ConfigError where the file's tensors are not the model's."""
    try:
        model.load_state_dict(checkpoint.load_weights(path))
    except RuntimeError as error:
        raise ConfigError(f"model.weights = {path}: it does not fit the model. {' '.join(str(error).split())}") from None
