"""memory: the prediction against a measured step, within 10 %, and its rows against figures worked out by hand."""

from __future__ import annotations

import copy
import functools
import logging

import pytest
import torch
from torch import nn

import fqt
from fqt.cpu import library
from fqt.inspect.memory import ROWS, Bytes, Memory
from tests.fqt.helpers import fingerprint
from train import models

ONE_BIT = fqt.load_recipe("fqt_1bit").everywhere()
SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
built = pytest.mark.skipif(not library.LIBRARY.exists(), reason="not built: the reference's scratch is large")


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "fqt")


@built
@pytest.mark.parametrize(
    ("name", "batch", "optimizer"),
    [("vgg_small", 32, torch.optim.Adam), ("alexnet", 16, SGD), ("resnet20", 4, SGD)],
    ids=["vgg_small", "alexnet", "resnet20"],
)
@pytest.mark.every(3)
def test_the_prediction_is_within_a_tenth_of_the_measurement(name: str, batch: int, optimizer) -> None:
    model = models.build(name, (3, 32, 32), 10).to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    for recipe in ("fqt_1bit", "fqt_w1a1g4"):
        result = fqt.memory(model, images, recipe=recipe, optimizer=optimizer)
        for side in (result.float, result.converted):
            assert side.measured is not None
            assert side.predicted == pytest.approx(side.measured, rel=0.1)
        assert result.converted.rows["saved activations"] < result.float.rows["saved activations"]
        assert result.note == ""


def test_rows_by_hand() -> None:
    """A linear layer of 64 to 32: the peak is in the optimizer, or, with a batch of 512, when the backward begins."""
    layer = nn.Linear(64, 32)
    weights = (64 * 32 + 32) * 4
    small = fqt.memory(layer, torch.randn(2, 64), recipe=ONE_BIT, measure=False).float.rows
    assert small["master weights"] == small["gradients"] == weights
    assert small["optimizer"] == 2 * weights + 2 * 4  # two moments, and a step counter a parameter
    assert small["input and buffers"] == 2 * 64 * 4
    assert small["packed weights"] == small["masks"] == small["scales"] == small["saved activations"] == 0
    many = fqt.memory(layer, torch.randn(512, 64), recipe=ONE_BIT, optimizer=torch.optim.SGD, measure=False).converted.rows
    assert many["packed weights"] == 64 * 32 // 8
    assert many["masks"] == 512 * 64 // 8, "the activation's; the weight's estimator has none"
    assert many["scales"] == (1 + 32) * 4
    assert many["saved activations"] >= 512 * 64 // 8, "codes, and what of the output is still alive"
    assert many["optimizer"] == 0


def test_the_optimizers_state_is_that_of_the_optimizer() -> None:
    layer = nn.Linear(8, 4)
    weights = (8 * 4 + 4) * 4
    for optimizer, expected in ((SGD, weights), (torch.optim.SGD, 0), (torch.optim.Adagrad, weights + 2 * 4)):
        rows = fqt.memory(layer, torch.randn(2, 8), recipe=ONE_BIT, optimizer=optimizer, measure=False).float.rows
        assert rows["optimizer"] == expected


def test_a_frozen_model_part_has_neither_gradient_nor_state() -> None:
    model = nn.Sequential(nn.Linear(64, 64).requires_grad_(False), nn.Linear(64, 4))
    rows = fqt.memory(model, torch.randn(2, 64), recipe=ONE_BIT, measure=False).float.rows
    trained = (64 * 4 + 4) * 4
    assert rows["master weights"] == (64 * 64 + 64) * 4 + trained and rows["optimizer"] == 2 * trained + 2 * 4


@pytest.mark.parametrize("converted", [False, True])
def test_the_model_and_the_generator_stay_as_they_were(converted: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(288, 4))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    if converted:
        fqt.convert(model, ONE_BIT)
    images = torch.randn(4, 3, 8, 8)
    state, parts, values = torch.get_rng_state(), fingerprint(model), copy.deepcopy(model.state_dict())
    fqt.memory(model, images, recipe=None if converted else ONE_BIT)
    assert fingerprint(model) == parts and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert all(p.grad is not None for p in model.parameters())


def test_a_loss_of_ones_own_counts() -> None:
    layer, x = nn.Linear(4, 1000), torch.randn(64, 4)
    summed = fqt.memory(layer, x, recipe=ONE_BIT, measure=False).float.predicted
    entropy = lambda y: nn.functional.cross_entropy(y, torch.zeros(64, dtype=torch.int64))  # noqa: E731
    assert fqt.memory(layer, x, recipe=ONE_BIT, loss=entropy, measure=False).float.predicted >= summed + 64 * 1000 * 4


def test_a_batch_that_would_not_fit_is_predicted() -> None:
    x = torch.empty(1, 4).expand(2**36, 4)  # a fake copy of the shape takes no memory; a real step would take terabytes
    result = fqt.memory(nn.Linear(4, 4), x, recipe=ONE_BIT, measure=False)
    assert result.float.predicted > 2**40 and result.float.measured is None
    assert "measured" not in str(result)


def test_the_references_scratch_is_said_not_to_be_predicted() -> None:
    result = fqt.memory(fqt.convert(nn.Linear(8, 4), ONE_BIT, backend="reference"), torch.randn(2, 8), measure=False)
    assert str(result).endswith(result.note) and "the reference serves some products" in result.note


def test_the_table() -> None:
    rows = dict.fromkeys(ROWS, 0)
    result = Memory(Bytes({**rows, "master weights": 2**20}, 2**21), Bytes({**rows, "masks": 2**18}, 2**20), "")
    lines = str(result).splitlines()
    assert lines[0] == "                      float  converted  ratio"
    assert lines[2] == "master weights     1.00 MiB   0.00 MiB  0.000"
    assert lines[5] == "masks              0.00 MiB   0.25 MiB"
    assert lines[-2:] == ["predicted peak     1.00 MiB   0.25 MiB  0.250", "measured peak      2.00 MiB   1.00 MiB  0.500"]


def test_what_memory_refuses() -> None:
    with pytest.raises(ValueError, match=r"nothing in this Linear is converted: pass recipe=\.\.\., or convert it first"):
        fqt.memory(nn.Linear(2, 2), torch.randn(2, 2))
    with pytest.raises(ValueError, match="converted already"):
        fqt.memory(fqt.convert(nn.Linear(2, 2), ONE_BIT), torch.randn(2, 2), recipe=ONE_BIT)
