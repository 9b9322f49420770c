"""Optimizers are torch's or apex's own; schedules follow their formulas."""

import sys
import types

import pytest
import torch
from torch import nn

from train.config import Optimizer, Schedule
from train.optim import build_optimizer, build_schedule, factor
from train.wording import ConfigError


@pytest.mark.parametrize(
    ("keys", "kind", "settings"),
    [
        ({"name": "sgd", "lr": 0.1, "momentum": 0.5}, torch.optim.SGD, {"lr": 0.1, "momentum": 0.5, "weight_decay": 0}),
        ({"name": "adam", "betas": (0.8, 0.9)}, torch.optim.Adam, {"lr": 1e-3, "betas": (0.8, 0.9), "weight_decay": 0}),
        ({"name": "adamw", "weight_decay": 0.1}, torch.optim.AdamW, {"betas": (0.9, 0.999), "weight_decay": 0.1}),
    ],
)
def test_optimizer_is_torchs_fused_one(keys, kind, settings):
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(Optimizer(**keys), model)
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert {**settings, "fused": True}.items() <= group.items()
    model(torch.ones(1, 3)).sum().backward()
    before = model.weight.clone()
    optimizer.step()
    assert (model.weight < before).all()


def test_frozen_parameters_are_left_out():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    (group,) = build_optimizer(Optimizer(), model).param_groups
    assert group["params"] == [model.weight]


@pytest.fixture
def apex(monkeypatch):
    """An import system in which apex is whatever the test puts there."""

    def install(**optimizers):
        package = types.ModuleType("apex")
        package.__spec__ = types.SimpleNamespace(name="apex")  # type: ignore[assignment]
        package.__path__ = []
        monkeypatch.setitem(sys.modules, "apex", package)
        if optimizers:
            package.optimizers = types.ModuleType("apex.optimizers")
            vars(package.optimizers).update(optimizers)
            monkeypatch.setitem(sys.modules, "apex.optimizers", package.optimizers)

    return install


@pytest.mark.parametrize("name", ["apex_adam", "apex_sgd"])
def test_apex_is_missing(name):
    with pytest.raises(ConfigError, match=f"{name}: NVIDIA apex is not installed.*optimizer.name={name[5:]},"):
        build_optimizer(Optimizer(name=name), nn.Linear(1, 1))


@pytest.mark.parametrize("optimizers", [{}, {"other": None}], ids=["no module", "no class"])
def test_apex_of_pypi_is_not_it(apex, optimizers):
    apex(**optimizers)
    with pytest.raises(ConfigError, match=r"no apex\.optimizers\.FusedAdam; it is PyPI's web toolkit"):
        build_optimizer(Optimizer(name="apex_adam"), nn.Linear(1, 1))


def test_apex_needs_a_gpu(apex):
    apex(FusedSGD=torch.optim.SGD)
    with pytest.raises(ConfigError, match="need a GPU; use optimizer.name=sgd"):
        build_optimizer(Optimizer(name="apex_sgd"), nn.Linear(1, 1))


@pytest.mark.parametrize("name", ["apex_adam", "apex_sgd"])
def test_apex_gets_its_settings(apex, name):
    made = {}

    def fused(parameters, **settings):
        made.update(settings)
        return "made"

    class OnGpu:
        """Parameters that say they are on a GPU."""

        def parameters(self):
            return [types.SimpleNamespace(requires_grad=True, device=torch.device("cuda"))]

    apex(FusedAdam=fused, FusedSGD=fused)
    assert build_optimizer(Optimizer(name=name, lr=0.5, weight_decay=0.1), OnGpu()) == "made"  # type: ignore[arg-type]
    kind = {"betas": (0.9, 0.999), "adam_w_mode": False} if name == "apex_adam" else {"momentum": 0.9}
    assert made == {"lr": 0.5, "weight_decay": 0.1, **kind}


@pytest.mark.parametrize(
    ("keys", "expected"),
    # 100 steps, 10 an epoch; step -> factor
    [
        ({"name": "constant"}, {0: 1, 99: 1}),
        ({"name": "constant", "warmup": 0.1}, {0: 0.1, 4: 0.5, 9: 1, 10: 1, 99: 1}),
        ({"name": "cosine"}, {0: 1, 50: 0.5, 100: 0}),
        ({"name": "cosine", "warmup": 0.2}, {0: 0.05, 19: 1, 20: 1, 60: 0.5, 100: 0}),
        ({"name": "step", "milestones": (2, 5.5), "gamma": 0.1}, {0: 1, 19: 1, 20: 0.1, 54: 0.1, 55: 0.01, 99: 0.01}),
    ],
)
def test_factor(keys, expected):
    for step, value in expected.items():
        assert factor(Schedule(**keys), step, 100, 10) == pytest.approx(value), step


def rates(schedule, epochs=4, steps_per_epoch=5, lr=0.1):
    optimizer = build_optimizer(Optimizer(lr=lr), nn.Linear(1, 1))
    scheduler = build_schedule(schedule, optimizer, epochs=epochs, steps_per_epoch=steps_per_epoch)
    seen = []
    for _ in range(epochs * steps_per_epoch):
        seen.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return seen


def test_schedule_sets_the_rate():
    assert rates(Schedule(name="step", milestones=(1,), gamma=0.5)) == pytest.approx([0.1] * 5 + [0.05] * 15)


@pytest.mark.parametrize(("warmup", "peak"), [(None, 5), (0.5, 9)])
def test_onecycle_rises_and_falls(warmup, peak):
    seen = rates(Schedule(name="onecycle", warmup=warmup))
    assert seen[0] == pytest.approx(0.1 / 25)
    assert seen[peak] == pytest.approx(max(seen)) == pytest.approx(0.1)
    assert seen[:peak] == sorted(seen[:peak])
    assert seen[peak:] == sorted(seen[peak:], reverse=True)
    assert seen[-1] < 1e-6
