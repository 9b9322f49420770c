"""What is measured beside the training is right, and disturbs nothing."""

import copy

import pytest
import torch
from torch import nn

import fqt
from train import checkpoint, measure, models
from train.sections import Training
from train.step import Step
from train.tasks import TASKS

SHAPE = (1, 8, 8)


@pytest.fixture
def pair():
    torch.manual_seed(0)
    unconverted = models.build("vgg_small", SHAPE, 10)
    return fqt.convert(copy.deepcopy(unconverted), "fqt_1bit"), unconverted


def batches(count=4, images=16):
    return [[(torch.randn(images, *SHAPE), torch.arange(images) % 10)] for _ in range(count)]


def make_step(model):
    return Step(model, model, torch.optim.Adam(model.parameters(), lr=1e30), Training(), TASKS["classify"])


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_compare_disturbs_neither_models_nor_random_numbers(pair):
    data, before = batches(), [snapshot(model) for model in pair]
    state = torch.get_rng_state()
    comparison = measure.compare(*pair, make_step, data)
    assert torch.equal(torch.get_rng_state(), state)
    for model, old in zip(pair, before, strict=True):
        assert model.training
        assert all(torch.equal(value, old[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
    assert comparison.speedup == comparison.ms_fp32 / comparison.ms > 0


def test_compare_takes_medians_after_warm_up_of_the_same_batches(pair):
    seen, clock = [], iter([9.0, 9.0, 9.0, 9.0, 3.0, 1.0, 4.0, 2.0, 500.0, 3.0])

    class Fake:
        def __init__(self, model):
            self.model, self.config, self.task = model, Training(), TASKS["classify"]
            self.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

        def __call__(self, parts):
            assert self.optimizer.param_groups[0]["lr"] == 0, "a copy that learns may diverge"
            seen.append(parts)
            return type("Outcome", (), {"ms": {"step": next(clock)}})

    data = batches(5)
    comparison = measure.compare(*pair, Fake, data)  # type: ignore[arg-type]
    assert [id(parts) for parts in seen] == [id(parts) for parts in data for _ in range(2)], "in turn, on the same batch"
    assert (comparison.ms, comparison.ms_fp32) == (4.0, 2.0)


def test_saved_bytes_of_a_layer_by_hand():
    model = nn.Sequential(nn.Linear(64, 10))
    x = torch.randn(32, 64)
    saved = measure.saved_bytes(make_step(model), x, torch.zeros(32, dtype=torch.int64))
    # the input (32 x 64 floats), and for cross_entropy: log-probabilities (32 x 10 floats), labels, the total weight
    assert saved == pytest.approx(4 * 32 * 64 + 4 * 32 * 10 + 8 * 32, abs=64)


def test_converted_model_saves_less(pair):
    comparison = measure.compare(*pair, make_step, batches(3))
    assert 0 < comparison.saved_bytes < comparison.saved_bytes_fp32


def test_describe_knows_sizes_without_a_trace_in_the_model(pair):
    converted, unconverted = pair
    before, state = snapshot(converted), torch.get_rng_state()
    summary, modelled = measure.describe(converted, copy.deepcopy(converted), TASKS["classify"], torch.zeros(2, *SHAPE))
    assert modelled > 1
    row = summary.rows[0]
    assert (row.name, row.madds) == ("0", 8 * 8 * 16 * 1 * 9)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in converted.state_dict().items())
    assert measure.describe(unconverted, copy.deepcopy(unconverted), TASKS["classify"], torch.zeros(2, *SHAPE))[1] == 1.0


def test_bits_and_zeros_of_layers():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    fqt.convert(model, "int8")
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(8))
    zeros, bits = measure.zero_fractions(model), measure.layer_bits(model)
    assert zeros == {"zero_fraction/1": 56 / 64}
    assert {bits[f"bits/1/{product}"] for product in ("output", "grad_input", "grad_weight")} == {8}
    assert bits["bits/0/output"] == 32


def test_the_baseline_alone_is_timed_after_one_step_of_warm_up(pair):
    (parts,) = batches(1)
    seen, before, state = [], snapshot(pair[1]), torch.get_rng_state()

    def timed(model):
        step = make_step(model)
        return lambda_step(step, lambda parts: seen.append(parts) or type("Outcome", (), {"ms": {"step": 9.0 - len(seen)}}))

    assert measure.baseline_ms(pair[1], timed, parts, 3) == 6.0
    assert len(seen) == 4
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in pair[1].state_dict().items())


def lambda_step(step, call):
    """A step whose optimizer is real and whose work is another."""
    return type("Fake", (), {"optimizer": step.optimizer, "__call__": lambda self, parts: call(parts)})()


def test_peak_is_that_of_the_process():
    before = measure.peak_bytes(torch.device("cpu"))
    block = torch.ones(before // 4 + 2**26)  # four bytes each: more than all that was ever used
    assert measure.peak_bytes(torch.device("cpu")) > before + 2**26
    del block


def test_undisturbed_gives_everything_back_even_after_an_error():
    before = str(checkpoint.generators())

    def draw_and_fail():
        with measure.undisturbed():
            torch.rand(3)
            raise KeyError

    with pytest.raises(KeyError):
        draw_and_fail()
    assert str(checkpoint.generators()) == before
