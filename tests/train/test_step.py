"""One optimizer step: parts add up to the batch, times add up, and nothing bad reaches the weights."""

import copy
import math
import re

import pytest
import torch
from torch import nn

import fqt
from tests.train.helpers import assert_same
from train.sections import Training
from train.step import Step
from train.tasks import TASKS


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))


def batch(images=8, parts=1, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    x, y = scale * torch.randn(images, 3, 2, 2, generator=generator), torch.arange(images) % 3
    return list(zip(x.chunk(parts), y.chunk(parts), strict=True))


def step_for(model, **training):
    return Step(model, model, torch.optim.SGD(model.parameters(), lr=0.5), Training(**training), TASKS["classify"])


def test_step_is_one_of_plain_torch():
    model, twin = linear(), linear()
    outcome = step_for(model)(batch())
    (x, y), *_ = batch()
    loss = nn.functional.cross_entropy(twin(x), y)
    correct = (twin(x).argmax(1) == y).sum()
    loss.backward()
    torch.optim.SGD(twin.parameters(), lr=0.5).step()
    assert torch.equal(model[1].weight, twin[1].weight)
    assert (outcome.loss, outcome.correct, outcome.items) == (loss.item(), correct, 8)
    assert model[1].weight.grad is None


def test_parts_add_up_to_the_batch():
    whole, cut = linear(), linear()
    one, four = step_for(whole)(batch()), step_for(cut, accumulate=4)(batch(parts=4))
    torch.testing.assert_close(whole[1].weight, cut[1].weight)
    assert one.loss == pytest.approx(four.loss)
    assert (one.correct, one.items) == (four.correct, four.items)


def test_phases_add_up_to_the_step():
    ms = step_for(linear())(batch()).ms
    assert set(ms) == {"forward", "backward", "optimizer", "step"}
    assert all(value > 0 for value in ms.values())
    assert ms["step"] == pytest.approx(ms["forward"] + ms["backward"] + ms["optimizer"])


def test_clipping_bounds_the_update():
    model = linear()
    before = copy.deepcopy(model)
    step_for(model, clip_norm=1e-3)(batch())
    moved = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before.parameters(), strict=True)])
    assert moved.norm().item() == pytest.approx(0.5 * 1e-3, rel=1e-3)


class Poisoned(nn.Module):
    """A linear layer behind a BatchNorm, with a gradient that is not finite though the loss is."""

    def __init__(self, bad):
        super().__init__()
        self.flatten, self.norm, self.linear = nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 3)
        self.bad = bad

    def forward(self, x):
        y = self.linear(self.norm(self.flatten(x)))
        y.register_hook(lambda g: g * self.bad)
        return y


def everything(step):
    """All that a step may change, as values."""
    return copy.deepcopy((step.model.state_dict(), step.optimizer.state_dict()))


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("training", [{}, {"clip_norm": 1.0}])
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_leaves_everything(training, what, bad, parts):
    torch.manual_seed(0)
    model = Poisoned(1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
    step = Step(model, model, optimizer, Training(accumulate=parts, **training), TASKS["classify"])
    good = batch(parts=parts)
    assert step(good).skipped == ""
    before = everything(step)
    model.bad = bad if what == "gradient" else 1.0
    images, labels = good[-1]
    outcome = step([*good[:-1], (images * (bad if what == "loss" else 1.0), labels)])
    assert re.fullmatch("the (norm of the gradients|loss) is (nan|inf)", outcome.skipped)
    assert_same(everything(step), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    model.bad = 1.0
    assert step(good).skipped == "" and step(good).gradient_norm > 0


def test_all_ranks_skip_or_none():
    model = linear()
    before = copy.deepcopy(model.state_dict())
    step = Step(model, model, torch.optim.SGD(model.parameters(), lr=0.5), Training(), TASKS["classify"], agree=lambda _: False)
    assert step(batch()).skipped == "another process's loss is not finite"
    assert_same(model.state_dict(), before)


def test_autocast_runs_layers_in_bfloat16():
    seen = []
    model = linear()
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    step_for(model, autocast=True)(batch())
    step_for(model)(batch())
    assert seen == [torch.bfloat16, torch.float32]
    assert model[1].weight.dtype == torch.float32


def test_ddp_averages_with_the_last_part_only():
    """A stand-in for DistributedDataParallel, whose no_sync must surround all parts but the last."""
    events = []

    class Wrapped(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.syncs = model, True

        def forward(self, x):
            events.append(self.syncs)
            return self.model(x)

        def no_sync(self):
            wrapped = self

            class Without:
                def __enter__(self):
                    wrapped.syncs = False

                def __exit__(self, *_):
                    wrapped.syncs = True

            return Without()

    model = linear()
    step = Step(model, Wrapped(model), torch.optim.SGD(model.parameters(), lr=0.1), Training(accumulate=4), TASKS["classify"])
    step(batch(parts=4))
    assert events == [False, False, False, True]


def test_gradient_error_is_observed_on_request():
    torch.manual_seed(0)
    layers = [nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU()]
    model = fqt.convert(nn.Sequential(nn.Flatten(), *layers, nn.Linear(16, 3)), "fqt_1bit")
    step = step_for(model)
    assert step(batch()).gradient_error == {}
    (products,) = step(batch(), observe=True).gradient_error.values()
    assert set(products) == {"grad_input", "grad_weight"}
    assert all(error > 0 for error in products.values())


def test_compiled_model_is_what_runs(monkeypatch):
    compiled = []

    def compile(module):
        compiled.append(module)
        return torch.nn.Sequential(module)

    monkeypatch.setattr(torch, "compile", compile)
    model = linear()
    step = step_for(model, compile=True)
    step(batch())
    assert compiled == [model]
