"""What is looked at around a step, each figure against one that is counted by hand."""

import json

import pytest
import torch
from torch import nn

import fqt
from train.config import Tracking
from train.monitors import Monitors, scalars


def layer(recipe: str) -> nn.Sequential:
    torch.manual_seed(0)
    return fqt.convert(nn.Sequential(nn.Linear(13, 7)), fqt.load_recipe(recipe).everywhere())


def test_flipped_signs_of_one_step():
    model, monitors = layer("xnor"), Monitors(Tracking(monitor_every=2), None)
    monitors.before(model, 0)
    assert monitors.after(model, 1) == {}, "not due"
    monitors.before(model, 1)
    with torch.no_grad():
        model[0].weight[2, 4:9] *= -1
    found = monitors.after(model, 2)
    assert found["flip_ratio/0"] == 5 / 91
    means = model[0].weight.abs().mean(1)
    assert found["scale/0/min"] == pytest.approx(means.min().item())
    assert found["scale/0/max"] == pytest.approx(means.max().item())
    monitors.before(model, 3)
    assert monitors.after(model, 4)["flip_ratio/0"] == 0


def test_saturation_and_underflow():
    model = layer("adapt")
    quantizer = model[0].recipe.quantizer("output", "w")
    step, most = 2.0**-quantizer.fraction_length, (2 ** (quantizer.bits - 1) - 1) * 2.0**-quantizer.fraction_length
    with torch.no_grad():
        model[0].weight.fill_(most / 2)
        model[0].weight[0, :3] = most + 3 * step
        model[0].weight[1, :2] = step / 100
        model[0].weight[2, :4] = 0
    found = scalars(model, {})
    assert found["saturation/0"] == pytest.approx(3 / 91)
    assert found["underflow/0"] == pytest.approx(2 / 91)


def test_the_profiler_sees_the_steps_that_were_named(tmp_path):
    monitors = Monitors(Tracking(profile=(2, 3), monitor_every=0), tmp_path)
    for step in range(4):
        monitors.before(nn.Identity(), step)
        torch.full((step + 1,), 7.0).mul_(2)
        monitors.after(nn.Identity(), step + 1)
    events = json.loads((tmp_path / "trace_2_3.json").read_text())["traceEvents"]
    assert sum(event["name"] == "aten::mul_" for event in events) == 2


def test_a_trace_is_written_where_the_run_ends_first(tmp_path):
    monitors = Monitors(Tracking(profile=(1, 9), monitor_every=0), tmp_path)
    monitors.before(nn.Identity(), 0)
    monitors.stop()
    assert (tmp_path / "trace_1_9.json").is_file()
