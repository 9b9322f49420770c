"""Whole runs: the same seed gives the same weights, whatever is measured, and however often it was interrupted."""

import errno
import itertools
import json
import math
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from benchmarks import warm
from tests.ranks import end_of_ranks
from tests.train.helpers import assert_same, interrupt, trained, weights
from train import checkpoint, data, diagnose, loop, measure
from train import stop as stop_module
from train.log import reproducible_lines
from train.loop import run
from train.stop import Stop
from train.tasks import TASKS
from train.wording import ConfigError, TrainingError


def second_conv(model):
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)][1]


FULL = """
import os, resource, signal, sys
from train import loop, main

class Limited(loop.Trainer):
    def train_epoch(self, epoch):
        if epoch == 1 and os.environ.get("RANK", "0") == "0":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        super().train_epoch(epoch)

loop.Trainer = Limited
keys = ["name=run", "data.name=digits", "data.limit=256", "data.batch_size=64", "device=cpu", "quiet=true", "tracking.every=1",
        "model.name=mlp_small", "training.epochs=2"]
sys.exit(main.main(["--config", "fp32", *(word for key in keys for word in ("--set", key))]))
"""
SAVED = {"checkpoint": {"enabled": True}, "training": {"epochs": 3}}


@pytest.mark.every(2)
@pytest.mark.parametrize("recipe", ["fp32", "fqt_1bit"])
def test_resumed_run_ends_like_one_that_never_stopped(make, monkeypatch, recipe):
    config = make(recipe=recipe, data={"augment": "crop_flip", "validation": 0.1}, **SAVED)
    whole = run(config)

    interrupt(monkeypatch, config.model_copy(update={"name": "stopped"}), 2)
    assert weights(next(Path("runs/stopped").iterdir()))["epoch"] == 2

    resumed = run(config.model_copy(update={"name": "stopped"}), resume=Path("runs/stopped"))
    assert_same(trained(resumed), trained(whole))
    assert resumed.test == whole.test
    assert [row["loss"] for row in resumed.history] == [row["loss"] for row in whole.history]
    assert len(list(Path("runs/stopped").iterdir())) == 1, "a resumed run stays in its folder"


LOGGED = {"tracking": {"enabled": True, "every": 3, "variance_every": 4, "baseline_steps": 0}}


@pytest.mark.parametrize(("recipe", "step"), [("fqt_1bit", 1), ("fqt_1bit", 3), ("fqt_1bit", 4), ("fqt_1bit", 6), ("fp32", 3)])
@pytest.mark.every(3)
def test_a_run_stopped_by_a_signal_goes_on_within_its_epoch(make, monkeypatch, recipe, step):
    config = make(
        recipe=recipe, data={"augment": "crop_flip", "validation": 0.1}, **{**SAVED, "training": {"epochs": 2}}, **LOGGED
    )
    whole = run(config)

    class Stopped(loop.Trainer):
        def train_step(self, parts, epoch):
            outcome = super().train_step(parts, epoch)
            if self.done.steps == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return outcome

    config, stop = config.model_copy(update={"name": "stopped"}), Stop()
    with monkeypatch.context() as patch, stop.listening():
        patch.setattr(loop, "Trainer", Stopped)
        with pytest.raises(
            stop_module.Stopped, match=f"stopped by SIGTERM after step {step} of 8; .*--resume runs/stopped/"
        ) as end:
            run(config, stop=stop)
    assert end.value.status == 0
    (folder,) = Path("runs/stopped").iterdir()
    assert (weights(folder)["position"], weights(folder)["steps"]) == (step % 4 or 4 * (step == 4), step)
    resumed = run(config, resume=Path("runs/stopped"))
    assert_same(trained(resumed), trained(whole))
    assert [row["loss"] for row in resumed.history] == [row["loss"] for row in whole.history]
    assert_same(reproducible_lines(resumed.folder), reproducible_lines(whole.folder))


def test_a_stop_with_checkpoints_off_keeps_nothing_and_says_so(make):
    stop = Stop()
    stop.number = signal.SIGINT
    with pytest.raises(stop_module.Stopped, match="stopped by SIGINT after step 1 of 4; checkpoints are off") as end:
        run(make(), stop=stop)
    assert end.value.status == 130


@pytest.mark.parametrize("policy", ["best of all", "best of the first"])
def test_checkpoints_within_an_epoch_and_the_best_are_kept(make, monkeypatch, policy):
    accuracies = iter([0.3, 0.1, 0.5, 0.1] if policy == "best of all" else [0.6, 0.1, 0.5, 0.1])
    monkeypatch.setattr(loop.Trainer, "evaluate", lambda *_: next(accuracies))
    kept = {"checkpoint": {"enabled": True, "every_steps": 3, "keep": 3}, "data": {"validation": 0.1}}
    result = run(make(training={"epochs": 2}, **kept))
    assert sorted(path.name for path in result.folder.iterdir()) == [
        "best.pt",
        "last.pt",
        "step_000000004.pt",
        "step_000000006.pt",
    ]
    assert weights(result.folder)["steps"] == 8
    assert checkpoint.load(result.folder / "best.pt")["steps"] == (8 if policy == "best of all" else 4)


def test_checkpoints_by_time(make, monkeypatch):
    clock = itertools.count(step=25.0)
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock))
    saved = []
    monkeypatch.setattr(loop.checkpoint, "save", lambda path, state, **_: saved.append(state["steps"]))
    run(make(training={"epochs": 1}, checkpoint={"enabled": True, "every_minutes": 0.8}))
    assert saved == [2, 4]


def test_skipped_steps_are_listed_and_the_run_goes_on(make, monkeypatch, capsys):
    class Bad(loop.Feed):
        def batches(self, epoch, start=0):
            for number, parts in enumerate(super().batches(epoch, start), start):
                bad = (epoch, number) in ((0, 0), (0, 1), (1, 2))
                yield [(x * (math.inf if bad else 1), y) for x, y in parts]

    monkeypatch.setattr(loop, "Feed", Bad)
    result = run(make(training={"epochs": 2, "nonfinite_limit": 3}, quiet=False, **LOGGED))
    rows = [json.loads(line) for line in (result.folder / "skipped.jsonl").read_text().splitlines()]
    assert [(row["step"], row["epoch"], row["reason"]) for row in rows] == [
        (1, 1, "the loss is nan"),
        (2, 1, "the loss is nan"),
        (7, 2, "the loss is nan"),
    ]
    assert [len(images) for row in rows for images in row["samples"]] == [64] * 3
    assert all(math.isfinite(row["loss"]) for row in result.history)
    assert [line["skipped_steps"] for line in reproducible_lines(result.folder) if "skipped_steps" in line] == [2, 0]
    out = capsys.readouterr().out
    assert "step 1 left the weights as they were: the loss is nan (1 skipped so far; skipped.jsonl lists them)" in out
    assert "(2 skipped" in out and "(3 skipped" not in out


@pytest.mark.parametrize("recipe", ["fp32", "fqt_1bit"])
def test_the_diagnosis_names_the_first_layer(make, recipe):
    with loop.ranks.join("cpu") as place:
        trainer = loop.Trainer(make(recipe=recipe), place)
    parts = next(trainer.feed.batches(0))
    name, state = second_conv(trainer.model), torch.get_rng_state()
    assert diagnose.first_not_finite(trainer.copy(), trainer.task, parts, autocast=False).startswith(
        "A repetition of the last such batch gave"
    )
    trainer.model.get_submodule(name).weight.data[0] = math.nan
    sentence = diagnose.first_not_finite(trainer.copy(), trainer.task, parts, autocast=False)
    kind = "Conv2d" if recipe == "fp32" else "QuantConv2d, recipe fqt_1bit"
    assert sentence.startswith(f"First not finite is the output of layer {name} ({kind}); input ")
    assert re.search(r"weight -?[\d.]+ to [\d.]+ \(\d+ not finite\)", sentence)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_diagnosis_names_where_a_gradient_breaks(make):
    with loop.ranks.join("cpu") as place:
        trainer = loop.Trainer(make(), place)

    class Break(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, g):
            return g * math.inf

    class Breaking(torch.nn.Module):
        def forward(self, x):
            return Break.apply(x)

    trainer.model.insert(3, Breaking())
    sentence = diagnose.first_not_finite(trainer.copy(), trainer.task, next(trainer.feed.batches(0)), autocast=False)
    assert sentence.startswith("First not finite is the gradient that arrives at layer 2 (ReLU): ")


def test_an_output_that_cannot_be_written_is_told_before_the_data_is_read(make, monkeypatch):
    monkeypatch.setattr(loop.data, "load", None)
    Path("file").write_text("")
    for output in ("file", "file/below"):
        with pytest.raises(ConfigError, match=f"output = {output}: nothing can be written there .*set output to a folder"):
            run(make(output=output, checkpoint={"enabled": True}))
    assert Path("file").is_file()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="output = new/runs: nothing can be written there .No space left on device.;"):
        run(make(output="new/runs", checkpoint={"enabled": True}))
    assert not Path("new").exists(), "what the probe made is gone"


def test_a_disk_that_fills_up_keeps_the_old_checkpoint(make):
    """In a process of its own, whose files may not grow beyond 300 kB: the second checkpoint, with curves, does not fit."""
    Path("full.py").write_text(FULL)
    result = warm.run(Path("full.py").absolute(), folder=Path.cwd())
    assert result.returncode == 1, result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert re.search(r"train: A checkpoint could not be written to runs/.* \(File too large\)", result.stderr)
    (folder,) = Path("runs/run").iterdir()
    assert weights(folder)["steps"] == 4
    assert not [path for path in folder.iterdir() if path.suffix == ".part"]


def test_a_disk_that_fills_up_ends_all_ranks(make):
    """The disk of the one that writes."""
    (status, said), (other_status, other_said) = end_of_ranks(FULL, 2, Path.cwd())
    assert (status, other_status) == (1, 1), said + other_said
    assert re.search(r"^train: A checkpoint could not be written to runs/.* \(File too large\).*\n\Z", said, re.M), said
    assert "train:" not in other_said and "Traceback" not in said + other_said
    (folder,) = Path("runs/run").iterdir()
    assert weights(folder)["steps"] == 4
    assert not [path for path in folder.iterdir() if path.suffix == ".part"]


def test_curves_that_cannot_be_written_end_the_run(make, monkeypatch):
    class Full:
        def write(self, *_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def fileno(self):
            return os.open(os.devnull, os.O_WRONLY)

        def close(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Filling(loop.Trainer):
        def train_epoch(self, epoch):
            if epoch == 1:
                self.tracker._lines.close()
                self.tracker._lines = Full()
            super().train_epoch(epoch)

    monkeypatch.setattr(loop, "Trainer", Filling)
    wanted = (
        r"the curves in runs/run/.* could not be written \(No space left on device\)\. .*last.pt holds the state after step 4"
    )
    with pytest.raises(TrainingError, match=wanted):
        run(make(**SAVED, **LOGGED))


def test_a_checkpoint_of_other_images_or_another_model_is_refused(make, monkeypatch):
    first = run(make(**SAVED))
    state = checkpoint.load(first.folder / "last.pt")
    moments = state["optimizer"]["state"]
    short = {**moments, 0: {**moments[0], "exp_avg": torch.zeros(2)}}
    group = state["optimizer"]["param_groups"][0]
    for changes, wanted in (
        ({"samples": 255}, "written by a run on 255 training images, and there are 256 now"),
        ({"model": {}}, "does not fit this run: model.0.weight is missing"),
        (
            {"model": {**state["model"], "0.weight": torch.zeros(3)}},
            r"model.0.weight is no torch.float32 of shape \[16, 1, 3, 3\]",
        ),
        ({"optimizer": {"state": {}, "param_groups": []}}, "optimizer.param_groups is no list of 1"),
        ({"optimizer": {**state["optimizer"], "state": short}}, "optimizer.state does not belong to the model's parameters"),
        ({"optimizer": {"state": moments, "param_groups": [{**group, "amsgrad": True}]}}, "amsgrad is true, and false here"),
        ({"ranks": []}, "ranks is no list of 1"),
        ({"history": 3}, "history is no list of epochs"),
        ({"schedule": None}, "schedule is NoneType and not a section"),
        ({"steps": 5}, "contradicts itself: its steps, epochs, schedule and history"),
        ({"config": None}, "does not say which configuration wrote it"),
    ):
        checkpoint.save(Path("changed.pt"), {**state, **changes})
        with pytest.raises(ConfigError, match=wanted) as error:
            run(make(**SAVED), resume=Path("changed.pt"))
        assert "\n" not in str(error.value)


def test_finished_run_resumes_to_its_result(make):
    config = make(**SAVED)
    whole = run(config)
    again = run(config, resume=whole.folder)
    assert again.history == whole.history


def test_seed_decides_and_measuring_does_not(make):
    def train(**keys):
        return trained(run(make(recipe="fqt_1bit", checkpoint={"enabled": True}, **keys)))

    plain = train()
    measured = train(tracking={"enabled": True, "every": 1, "variance_every": 1, "baseline_steps": 1})
    assert_same(measured, plain)
    other = train(seed=1)
    assert not torch.equal(other["model"]["0.weight"], plain["model"]["0.weight"])


def test_validation_images_are_not_trained_on_and_reported_apart(make):
    without = run(make())
    with_some = run(make(data={"validation": 0.2}))
    assert without.valid is None
    assert 0 <= with_some.valid <= 1
    assert with_some.valid == with_some.history[-1]["valid_accuracy"]
    assert with_some.valid * 300 == pytest.approx(round(with_some.valid * 300))


def test_result_of_a_run_that_learns(make):
    result = run(make(data={"limit": None}, training={"epochs": 3}, optimizer={"lr": 8e-3}))
    assert result.test > 0.9
    assert result.test * 297 == pytest.approx(round(result.test * 297))
    assert result.history[0]["loss"] > result.history[-1]["loss"]
    assert result.seconds == sum(row["seconds"] for row in result.history) > 0
    assert (result.folder, result.comparison) == (None, None)
    assert result.modelled_speedup == 1.0
    assert not list(Path().iterdir()), "nothing is written without tracking and checkpoints"


def test_two_runs_have_two_folders(make):
    folders = {run(make(checkpoint={"enabled": True})).folder for _ in range(2)}
    assert len(folders) == 2
    assert all((folder / "last.pt").is_file() for folder in folders)


def test_quiet_prints_nothing(make, capfd):
    run(make())
    assert capfd.readouterr() == ("", "")
    run(make(quiet=False))
    out = capfd.readouterr().out
    assert out.splitlines()[0] == "vgg_small on digits, recipe fp32, cpu"
    assert "epoch 1/1  loss " in out
    assert out.splitlines()[-1].startswith("test accuracy ")


def test_accuracy_is_that_of_the_saved_model(make):
    config = make(checkpoint={"enabled": True})
    result = run(config)
    again = run(make(model={"weights": str(result.folder / "last.pt")}, optimizer={"lr": 1e-30}))
    assert again.history[0]["loss"] < result.history[0]["loss"]
    # BatchNorm's running means move on, the weights do not
    assert abs(again.test - result.test) < 0.5


@pytest.mark.parametrize("recipe", ["fp32", "xnor"])
def test_warm_start_has_the_weights_of_the_file(make, recipe):
    first = run(make(checkpoint={"enabled": True}))
    config = make(recipe=recipe, seed=5, model={"weights": str(first.folder / "last.pt")})
    with loop.ranks.join("cpu") as place:
        model = loop.Trainer(config, place).model
    for name, value in weights(first.folder)["model"].items():
        assert torch.equal(model.state_dict()[name], value), name


def test_warm_start_from_another_model(make):
    first = run(make(model={"name": "mlp_small"}, checkpoint={"enabled": True}))
    with pytest.raises(ConfigError, match="model.weights = .*last.pt: it does not fit the model.*Missing key") as error:
        run(make(model={"weights": str(first.folder / "last.pt")}))
    assert "\n" not in str(error.value)


def test_diverging_run_stops_with_step_and_remedy(make):
    diverging = {"optimizer": {"name": "sgd", "lr": 1e30}, "schedule": {"name": "constant"}}
    wanted = (
        r"stopped in step [2-4]: the loss is nan, and the weights were left as they were. First not finite is the output of "
    )
    with pytest.raises(TrainingError, match=wanted + r"layer \d \(Conv2d\); input .*lower optimizer.lr"):
        run(make(training={"nonfinite": "stop"}, **diverging))
    with pytest.raises(
        TrainingError, match=r"stopped in step [3-4]: the loss is nan and in the 1 before, .*lower optimizer.lr"
    ):
        run(make(training={"nonfinite_limit": 2}, **diverging))


def test_divergence_keeps_the_checkpoint(make, monkeypatch):
    class Diverging(loop.Trainer):
        def train_epoch(self, epoch):
            if epoch == 1:
                self.model[0].weight.data.fill_(math.nan)
            super().train_epoch(epoch)

    monkeypatch.setattr(loop, "Trainer", Diverging)
    with pytest.raises(
        TrainingError, match=r"in step 8: the weights in 0.weight are not .*last.pt holds the state after step 4\."
    ):
        run(make(**SAVED))
    (folder,) = Path("runs/run").iterdir()
    assert all(value.isfinite().all() for value in weights(folder)["model"].values())


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"data": {"batch_size": 512}}, "data.batch_size = 512: there are 256 images to train on; lower it"),
        ({"recipe": "dorefa_w99a1g1"}, "recipe = dorefa_w99a1g1: .*bits"),
        ({"recipe": "fqt_1bit", "skip": ["layr*"]}, "recipe = fqt_1bit: skip pattern 'layr[*]' matches no layer"),
        ({"device": "cuda"}, 'device = "cuda": torch finds no GPU'),
    ],
)
def test_mistakes_that_need_the_model(make, keys, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=wanted):
        run(make(**keys))


def test_recipe_file_with_a_mistake(make, tmp_path):
    (tmp_path / "own.yaml").write_text("output: flaot\n")
    with pytest.raises(ConfigError, match="recipe = own.yaml: .*flaot"):
        run(make(recipe="own.yaml"))


def test_more_processes_than_the_batch_divides_into(make):
    config = make()
    with pytest.raises(ConfigError, match="data.batch_size = 64: 3 processes .*multiple of 3"):
        loop.Feed(config, TASKS["classify"], data.load(config.data), loop.ranks.Ranks(0, 3, torch.device("cpu")))


@pytest.mark.parametrize("wanted", [True, False])
def test_memory_format(make, wanted):
    with loop.ranks.join("cpu") as place:
        trainer = loop.Trainer(make(training={"channels_last": wanted}), place)
    (x, _), *_ = next(trainer.feed.batches(0))
    weight = trainer.model.get_submodule(second_conv(trainer.model)).weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == wanted
    assert x.shape[1] == 1 or x.is_contiguous(memory_format=torch.channels_last) == wanted


def test_accumulated_parts_cut_the_batch(make):
    with loop.ranks.join("cpu") as place:
        trainer = loop.Trainer(make(training={"accumulate": 4}), place)
    assert trainer.feed.steps == 4
    assert [len(y) for _, y in next(trainer.feed.batches(0))] == [16] * 4


def test_evaluation_counts_every_image_in_evaluation_mode(make):
    with loop.ranks.join("cpu") as place:
        trainer = loop.Trainer(make(recipe="fqt_1bit"), place)
    state, mode = torch.get_rng_state(), []
    trainer.model.register_forward_hook(lambda module, inputs, output: mode.append((module.training, len(output))))
    trainer.evaluate(trainer.data.test)
    assert mode == [(False, 256), (False, 41)]
    assert trainer.model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_comparison_is_part_of_the_result(make):
    result = run(make(recipe="xnor", tracking={"enabled": True, "baseline_steps": 1}))
    assert isinstance(result.comparison, measure.Comparison)
    assert result.modelled_speedup > 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", ["fp32", "fqt_1bit"])
def test_run_on_a_gpu(make, recipe):
    keys = {"device": "cuda", "tracking": {"enabled": True, "baseline_steps": 1}, "recipe": recipe, **SAVED}
    result = run(make(**keys))
    assert 0 <= result.test <= 1
    assert run(make(**keys), resume=result.folder).history == result.history
