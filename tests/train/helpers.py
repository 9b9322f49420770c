"""What runs left behind, and whether it is the same."""

from pathlib import Path

import pytest
import torch

from train import checkpoint, loop


def interrupt(monkeypatch, config, epoch):
    """Run until an epoch begins, counted from 0, as if Ctrl-C were pressed then twice: nothing is written any more."""

    class Interrupted(loop.Trainer):
        def train_epoch(self, number):
            if number == epoch:
                raise KeyboardInterrupt
            super().train_epoch(number)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "Trainer", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.run(config)


def weights(folder):
    return checkpoint.load(Path(folder) / "last.pt")


def assert_same(a, b, path="state"):
    """Equality of nested states, bit for bit."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same(left, right, f"{path}.{index}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b or (a != a and b != b), path


def trained(result):
    """What must be equal in two equal runs; times are not."""
    state = weights(result.folder)
    kept = {key: state[key] for key in ("model", "optimizer", "schedule", "epoch", "position", "steps", "skipped", "best")}
    return {**kept, "generators": [rank["generators"] for rank in state["ranks"]]}
