"""A precision policy within a run: configured, followed, logged and resumed."""

import csv
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import fqt
from fqt.precision.policy import POLICIES
from tests.train.helpers import assert_same, trained, weights
from train import config, loop, pictures, precision
from train.loop import run
from train.main import main
from train.tracking import Tracker
from train.wording import ConfigError

ADAPT = {"policy": "adapt", "lookback": [2, 4], "resolution": [20, 60], "max_word_length": 8}
KEYS = {"recipe": "adapt_calibrated", "model": {"name": "lenet5"}, "optimizer": {"name": "sgd", "lr": 0.05}}


def read_csv(folder):
    with (Path(folder) / "precision.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """Two epochs of four steps, with everything that a run writes."""
    tree = {
        **KEYS,
        "data": {"name": "digits", "batch_size": 64, "limit": 256},
        "training": {"epochs": 2},
        "precision": ADAPT,
        "tracking": {"every": 2, "variance_every": 0, "baseline_steps": 1},
        "device": "cpu",
        "output": str(tmp_path_factory.mktemp("precision")),
        "quiet": True,
    }
    return run(config.parse(tree))


def test_every_decision_is_logged_with_its_inputs(tracked):
    rows = read_csv(tracked.folder)
    assert len(rows) >= 10 and {row["layer"] for row in rows} == {"0", "4", "10", "13", "16"}
    assert [int(row["step"]) for row in rows] == sorted(int(row["step"]) for row in rows)
    named = {
        "before",
        "after",
        "output_bits",
        "lookback",
        "resolution",
        "push_down",
        "diversity",
        "strategy",
        "raise",
        "sparsity",
    }
    assert named <= rows[0].keys()
    last = weights(tracked.folder)["precision"]["policy"]["recipes"]
    for layer, recipe in last.items():
        assert [row["after"] for row in rows if row["layer"] == layer][-1] == recipe["name"]


def test_curves_say_formats_kernels_and_speed(tracked):
    events = EventAccumulator(str(tracked.folder), size_guidance={"images": 0})
    events.Reload()
    tags = set(events.Tags()["scalars"])
    for layer in ("0", "4", "10", "13", "16"):
        for what in ("word_length", "fraction_length", "sparsity", "resolution", "lookback"):
            assert f"precision/{what}/{layer}" in tags
    for what in ("strategy", "training_speedup_modelled", "training_speedup_papers_model", "training_speedup_measured"):
        assert [e.step for e in events.Scalars(f"precision/{what}")] == [2, 4, 6, 8], what
    for what in ("prediction_error", "training_speedup_predicted"):
        assert len(events.Scalars(f"precision/{what}")) == 4
    for what in (
        "model_error",
        "inference_speedup_modelled",
        "model_size",
        "switching_share_measured",
        "switching_share_modelled",
    ):
        assert f"precision/{what}" in tags
    modelled, measured, error = (
        events.Scalars(f"precision/{name}")[-1].value
        for name in ("training_speedup_modelled", "training_speedup_measured", "model_error")
    )
    assert error == pytest.approx(modelled / measured - 1, rel=1e-4)
    shares = [events.Scalars(tag)[-1].value for tag in tags if tag.startswith("precision/runs_on/")]
    assert sum(shares) == pytest.approx(1.0)
    (first, second) = events.Images("precision/bits")
    assert (first.step, second.step) == (4, 8) and first.height > 100
    assert "time/policy_ms" in tags
    summaries = [event.step for event in events.Tensors("summary/text_summary")]
    assert summaries == [0, 4, 8]


@pytest.mark.parametrize("policy", ["adapt", "variance"])
@pytest.mark.every(2)
def test_a_resumed_run_decides_bit_for_bit_alike(make, monkeypatch, policy):
    options = {"adapt": ADAPT, "variance": {"policy": "variance", "every": 3}}[policy]
    config_ = make(
        **KEYS, precision=options, training={"epochs": 3}, checkpoint={"enabled": True},
        tracking={"enabled": True, "every": 2, "baseline_steps": 0, "variance_every": 0},
    )  # fmt: skip
    whole = run(config_)

    class Interrupted(loop.Trainer):
        def save(self):
            if self.done.epoch == 3:  # some steps beyond the checkpoint, whose decisions must be forgotten
                raise KeyboardInterrupt
            super().save()

    with monkeypatch.context() as patch:
        patch.setattr(loop, "Trainer", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(config_.model_copy(update={"name": "stopped"}))
    resumed = run(config_.model_copy(update={"name": "stopped"}), resume=Path("runs/stopped"))
    assert_same(trained(resumed), trained(whole))
    assert_same(weights(resumed.folder)["precision"], weights(whole.folder)["precision"])
    assert read_csv(resumed.folder) == read_csv(whole.folder)
    assert len({row["step"] for row in read_csv(whole.folder)}) > 2


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's, which its compiler hides otherwise
def test_a_compiled_run_decides_too(make):
    result = run(make(**KEYS, precision=ADAPT, training={"compile": True}, checkpoint={"enabled": True}))
    assert weights(result.folder)["precision"]["timeline"][-1][0] > 0


def test_parts_of_a_batch_pay_the_penalty_once(make):
    trainers = []
    for accumulate in (1, 4):
        with loop.ranks.join("cpu") as place:
            policy = {"policy": "adapt", "l1": 0.5, "l2": 0.0}
            trainer = loop.Trainer(make(**KEYS, precision=policy, training={"accumulate": accumulate}), place)
        seen = []
        trainer.policy.step = lambda loss, *, epoch, seen=seen, trainer=trainer: (
            seen.append(trainer.model[0].weight.grad.clone()) or []
        )
        trainer.model.eval()  # BatchNorm of a part is not that of the batch
        trainer.step(next(iter(trainer.feed.batches(0))))
        trainers.append(seen[0])
    torch.testing.assert_close(*trainers, rtol=0.2, atol=0.05)


GOOD = "model: {name: mlp_small}\ndata: {name: digits, limit: 256}\nrecipe: adapt\n"
MISTAKES = {
    "unknown policy": ("precision: {policy: adpt}", ['precision.policy = "adpt"', "did you mean adapt?"]),
    "option alone": ("precision: {buffer: 4}", ["precision.buffer = 4", "it is an option of a policy; set precision.policy"]),
    "policy of fp32": ("recipe: fp32\nprecision: {policy: static}", ["precision.policy", "no effect", "fp32"]),
    "unknown option": ("precision: {policy: adapt, bufer: 4}", ["precision.policy = adapt", "no option 'bufer'", "buffer"]),
    "bad option": ("precision: {policy: adapt, lookback: [9, 3]}", ["minimum 9 is above its maximum 3"]),
    "too long": ("precision: {policy: adapt, max_word_length: 40}", ["max_word_length is 40, not an integer from 2 to 32"]),
    "no module": ("precision: {policy: 'no_such_module:Mine'}", ["precision.policy = no_such_module:Mine", "can be imported"]),
    "no class": ("precision: {policy: 'fqt:convert'}", ["precision.policy = fqt:convert", "no subclass of fqt.Policy"]),
    "missing option": ("precision: {policy: budget}", ["precision.policy = budget", "budget"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_paragraph(mistake, tmp_path, capsys):
    text, wanted = MISTAKES[mistake]
    base = GOOD.replace("recipe: adapt\n", "") if text.startswith("recipe") else GOOD
    (tmp_path / "bad.yaml").write_text(base + text)
    assert main(["--config", "bad.yaml", "--set", "device=cpu"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.strip().splitlines()) == 1
    assert [word for word in wanted if word not in printed.err] == []


def test_a_policy_of_ones_own(make, monkeypatch):
    module = types.ModuleType("mine")

    class Halving(fqt.Policy):
        def __init__(self, model: nn.Module, *, every: int = 1) -> None:
            super().__init__(model)
            self.every = every

        def decide(self, loss, epoch):
            if self.steps == self.every:
                for name, layer in self.layers.items():
                    yield self.decision(name, fqt.precision.at_gradient_bits(layer.recipe, 4), {"epoch": epoch})

    module.Halving = Halving  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mine", module)
    before = dict(POLICIES)
    try:
        kept = {"checkpoint": {"enabled": True}, "precision": {"policy": "mine:Halving", "every": 2}}
        result = run(make(**KEYS, **kept))
    finally:
        POLICIES.clear()
        POLICIES.update(before)
    assert [point[0] for point in weights(result.folder)["precision"]["timeline"]] == [0, 2]


def test_a_configuration_with_options_is_read_back(tmp_path):
    wanted = config.load("adapt_resnet20")
    assert wanted.precision.options["lookback"] == [25, 100]
    (tmp_path / "printed.yaml").write_text(config.dump(wanted))
    assert config.load(tmp_path / "printed.yaml", ["name=adapt_resnet20"]) == wanted


def test_the_heat_map_shows_bits_by_colour():
    model = fqt.convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "adapt")
    model(torch.ones(1, 4))
    policy = fqt.build_policy("static", model)
    timeline = precision.Timeline(policy, batch=1)
    model[0].recipe = fqt.precision.at_precision(model[0].recipe, fqt.Precision(5, 2))
    policy.steps = 10
    timeline.note(5)
    picture = timeline.image()
    row = pictures.HEAD + 4
    early, late = (tuple(picture[row, pictures.LABEL + x]) for x in (100, 500))
    assert (early, late) == (pictures.colour(16), pictures.colour(5))
    assert tuple(picture[row + pictures.CELL, pictures.LABEL + 500]) == pictures.colour(16)
    assert picture.dtype == np.uint8


def test_colours_tell_the_kernels_apart():
    greens = [pictures.colour(bits) for bits in range(1, 9)]
    assert all(green > red for red, green, _ in greens)
    assert all(red > green for red, green, _ in (pictures.colour(bits) for bits in range(17, 33)))
    assert len({pictures.colour(bits) for bits in range(1, 33)}) == 32
    with pytest.raises(ValueError, match="33 bits are more than 32"):
        pictures.colour(33)


def test_a_tracker_without_a_folder_logs_no_decision(tmp_path):
    tracker = Tracker(None)
    tracker.decisions([{"step": 1}])
    tracker.image("a", 1, np.zeros((2, 2, 3), np.uint8))
    assert not list(tmp_path.iterdir())


def test_a_policy_needs_a_known_name():
    with pytest.raises(ConfigError, match="did you mean schedule"):
        config.parse({"model": {"name": "lenet5"}, "data": {"name": "digits"}, "precision": {"policy": "schedul"}})
