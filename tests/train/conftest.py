"""Every test runs in an empty folder of its own, as a process alone, and finds no data but what it makes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from train.config import Config, parse


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The work here is small, and threads that wait for each other on a busy machine cost more than they bring."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("FQT_DATA", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for what a test starts


@pytest.fixture
def make() -> Callable[..., Config]:
    """A quick configuration, with keys overridden: make(recipe="int8", training={"epochs": 2})."""

    def build(**overrides: Any) -> Config:
        tree: dict[str, Any] = {
            "model": {"name": "vgg_small"},
            "data": {"name": "digits", "batch_size": 64, "limit": 256},
            "tracking": {"enabled": False},
            "checkpoint": {"enabled": False},
            "device": "cpu",
            "quiet": True,
        }
        for key, value in overrides.items():
            tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
        return parse(tree)

    return build
