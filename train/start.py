"""How a run starts: where it continues, its random numbers, recipe and weights, and the conversion of its model."""

import random
import sys
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


def load_weights(model: nn.Module, path: Path) -> None:
    """A warm start. Raises ConfigError where the file's tensors are not the model's."""
    try:
        model.load_state_dict(checkpoint.load_weights(path))
    except RuntimeError as error:
        raise ConfigError(f"model.weights = {path}: it does not fit the model. {' '.join(str(error).split())}") from None
