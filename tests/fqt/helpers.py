"""What tests of several files share: random numbers, random cases that can be repeated alone, the fingerprint of a model."""

from __future__ import annotations

import io
import os
import pickle
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from fqt.recipe import Recipe

SEED = int(os.environ.get("FQT_TEST_SEED", "20240817"))
EFFORT = float(os.environ.get("FQT_TEST_EFFORT", "1"))
"""How many times as many random cases as a test's docstring says: a night may try many, with another seed."""


def effort(count: int) -> int:
    """A number of random cases, at FQT_TEST_EFFORT."""
    return max(1, round(count * EFFORT))


def random_numbers(name: str) -> np.random.Generator:
    """The generator of the test of this name: it depends on FQT_TEST_SEED and on the name, not on the tests before it."""
    return np.random.default_rng((SEED, zlib.crc32(name.encode())))


def case_seeds(rng: np.random.Generator, count: int) -> list[int]:
    """Seeds of `count` random cases, or the one that FQT_TEST_CASE names."""
    alone = os.environ.get("FQT_TEST_CASE")
    return rng.integers(2**31, size=effort(count)).tolist() if alone is None else [int(alone)]


@contextmanager
def random_case(seed: int) -> Iterator[tuple[random.Random, torch.Generator]]:
    """The generators of one random case. A failure within says how to repeat this case without those before it."""
    try:
        yield random.Random(seed), torch.Generator().manual_seed(seed)
    except Exception as error:
        error.add_note(f"repeat this case alone: FQT_TEST_CASE={seed}, and pytest with the name of this test")
        raise


def fits_convolutions(recipe: Recipe) -> bool:
    """Whether a recipe is for convolutions too: one that is not sends them elsewhere by a rule."""
    return all(rule.match != "<conv>" for rule in recipe.rules)


def pickled(model: nn.Module) -> nn.Module:
    """A copy through pickle."""
    return pickle.loads(pickle.dumps(model))


def torch_saved(model: nn.Module) -> nn.Module:
    """A copy through torch.save."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def fingerprint(model: nn.Module) -> list[object]:
    """Everything of a model that a refused conversion could have touched."""
    parts: list[object] = [(k, v.data_ptr(), v._version) for k, v in model.state_dict().items()]
    for name, module in model.named_modules():
        hooks = [len(h) for h in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)]
        parts.append((name, id(module), type(module), module.training, sorted(module.__dict__), hooks))
    return parts


def small() -> nn.Sequential:
    """A network of convolutions and linear layers for images of 3 x 8 x 8."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 1, stride=2, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, groups=2),
        nn.ReLU6(),
        nn.Flatten(),
        nn.Linear(24, 8),
        nn.Tanh(),
        nn.Linear(8, 5),
    )
