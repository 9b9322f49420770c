"""Random numbers of each test's own, and uninitialized memory made visible."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.fqt.helpers import SEED, random_numbers


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(SEED)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers of this test's own: they depend on the seed and on the test's name, not on the tests before it."""
    return random_numbers(request.node.nodeid)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill torch.empty and its kin, those within operators included: NaN in floats, the largest integer in codes."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
