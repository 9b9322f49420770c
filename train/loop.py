"""The training, top to bottom: set up, train an epoch, evaluate, report, save.

from train.config import load
from train.loop import run
result = run(load("fqt_1bit", ["optimizer.lr=0.003"]))
"""

import copy
import itertools
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import fqt
from train import checkpoint, data, measure, models, precision, ranks, report
from train.config import Config, dump
from train.optim import build_optimizer, build_schedule
from train.step import Parts, Step, forward
from train.tracking import Tracker
from train.wording import ConfigError, TrainingError

EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Result:
    """How a run ended. Accuracies are fractions; valid_accuracy is None where no images are held out.

    seconds: wall time of all epochs with their evaluation, set-up not counted.
    history: one row an epoch: loss, train_accuracy, valid_accuracy, test_accuracy, images_per_second, seconds.
    comparison: speed and memory against the unconverted model, where the run measured it.
    folder: where checkpoint and curves are, if there are any.
    """

    test_accuracy: float
    valid_accuracy: float | None
    seconds: float
    history: list[dict[str, Any]]
    comparison: measure.Comparison | None
    modelled_speedup: float
    folder: Path | None


def run(config: Config, *, resume: Path | None = None) -> Result:
    """Trains what the configuration says. resume: a checkpoint, a run's folder or a folder of runs to continue from.

    Raises ConfigError for a mistake of the user, before the first step, and TrainingError where training cannot go on.
    """
    with ranks.join(config.device) as place:
        return Trainer(config, place, resume).train()


def dry_run(config: Config) -> str:
    """The whole configuration and the summary of the model that it makes, without training."""
    with ranks.join(config.device) as place:
        summary, modelled = Trainer(config, place).describe()
        return f"{dump(config)}\n{summary}\n\nmodelled speed-up {modelled:.2f}x (multiply-adds times bits)"


class Trainer:
    """One run: the model and all that trains it."""

    def __init__(self, config: Config, place: ranks.Ranks, resume: Path | None = None) -> None:
        self.config, self.place = config, place
        recipe = load_recipe(config.recipe)
        found = checkpoint.find(resume) if resume else None
        state = checkpoint.load(found) if found else None
        if found and state:
            checkpoint.check(state, config, place.world, found)
        with place.main_first():
            self.data = data.load(config.data)
        self.steps_per_epoch = len(self.chunks(0))

        seed(config.seed)  # the same initial weights on every rank
        self.model = models.build(config.model.name, self.data.shape, self.data.classes)
        if config.model.weights:
            load_weights(self.model, Path(config.model.weights))
        if config.training.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model.to(place.device)
        compares = config.tracking.enabled and config.tracking.baseline_steps > 0 and config.recipe != "fp32"
        self.unconverted = copy.deepcopy(self.model) if compares else None
        convert(self.model, recipe, config)
        self.policy = precision.build(config.precision, self.model)  # what it draws, every rank draws
        seed(config.seed + place.rank)  # quantization noise of its own on every rank

        self.step = self.make_step(self.model, place.wrap(self.model), self.policy)
        self.schedule = build_schedule(
            config.schedule, self.step.optimizer, epochs=config.training.epochs, steps_per_epoch=self.steps_per_epoch
        )
        self.epoch, self.steps, self.history = 0, 0, list[dict[str, Any]]()
        self.timeline: precision.Timeline | None = None
        if self.policy is not None:
            self.describe()  # counts the multiply-adds
            self.timeline = precision.Timeline(self.policy, config.data.batch_size)
        self.folder = found.parent if found else None
        if state:
            self.restore(state)

    def train(self) -> Result:
        """All epochs that are left."""
        config, comparison = self.config, None
        resumed_at = self.steps if self.folder else None
        if config.tracking.enabled or config.checkpoint.enabled:
            self.folder = self.place.gather(self.folder or new_folder(config))[0]
        tracker = Tracker(self.folder if config.tracking.enabled and self.place.main else None, resumed_at=resumed_at)
        summary, modelled = self.describe()
        tracker.text("config", dump(config))
        tracker.text("summary", str(summary))
        self.say(report.opening(config, self.place, self.folder, self.epoch))
        try:
            if self.unconverted is not None:
                comparison = self.compare(self.unconverted)
                self.unconverted = None
                if self.timeline and self.place.main:
                    self.timeline.calibrate(next(self.batches(0)), comparison.ms_fp32)
            tracker.scalars(self.steps, report.comparison_scalars(comparison, modelled))

            for epoch in range(self.epoch, config.training.epochs):
                started = time.perf_counter()
                row = {"epoch": epoch + 1, **self.train_epoch(epoch, tracker)}
                row["valid_accuracy"] = self.evaluate(self.data.valid) if self.data.valid else None
                row["test_accuracy"] = self.evaluate(self.data.test)
                row["seconds"] = time.perf_counter() - started
                self.history.append(row)
                self.epoch = epoch + 1
                self.save()
                tracker.scalars(self.steps, report.epoch_scalars(row, measure.peak_bytes(self.place.device)))
                if config.tracking.enabled:
                    tracker.scalars(self.steps, measure.layer_scalars(self.model))
                    self.show_precision(tracker)
                self.say(report.epoch_line(row, config.training.epochs))

            last = self.history[-1]
            tracker.hparams(checkpoint.flat(config.model_dump(mode="json")), report.final_metrics(last))
        except TrainingError as error:
            raise TrainingError(report.diverged(str(error), self.steps + 1, self.folder, self.epoch)) from None
        finally:
            tracker.close()
        seconds = sum(row["seconds"] for row in self.history)
        result = Result(last["test_accuracy"], last["valid_accuracy"], seconds, self.history, comparison, modelled, self.folder)
        self.say(report.closing(config, result.history, comparison, modelled, self.folder))
        return result

    def train_epoch(self, epoch: int, tracker: Tracker) -> dict[str, Any]:
        """One pass over the training images; returns the epoch's means over all ranks."""
        tracking, started = self.config.tracking, time.perf_counter()
        epoch_sums, recent_sums = Counter[str](), Counter[str]()
        quiet = self.config.quiet or not self.place.main
        label = f"epoch {epoch + 1}/{self.config.training.epochs}"
        self.model.train()
        with tqdm(total=self.steps_per_epoch, desc=label, unit="step", leave=False, disable=quiet or None) as bar:
            for parts in self.batches(epoch):
                observe = tracking.enabled and tracking.variance_every > 0 and self.steps % tracking.variance_every == 0
                rate = float(self.schedule.get_last_lr()[0])
                epochs_done = (self.steps + 1) / self.steps_per_epoch
                outcome = self.step(parts, observe=observe and self.config.recipe != "fp32", epoch=epochs_done)
                self.schedule.step()
                self.steps += 1
                if self.timeline and outcome.decisions:
                    self.timeline.note(self.steps)
                    tracker.decisions([decision.row() for decision in outcome.decisions])

                tracker.scalars(self.steps, report.gradient_scalars(outcome))
                epoch_sums.update(report.sums(outcome))
                recent_sums.update(report.sums(outcome))
                if tracking.enabled and self.steps % tracking.every == 0:
                    sums = self.over_ranks(recent_sums)
                    tracker.scalars(self.steps, report.step_scalars(sums, rate))
                    if self.timeline and self.place.main:
                        spent = (sums[f"{phase}_ms"] / sums["steps"] for phase in ("step", "policy"))
                        tracker.scalars(self.steps, self.timeline.scalars(*spent))
                    recent_sums.clear()
                bar.update()
                bar.set_postfix(loss=f"{outcome.loss:.3f}", refresh=False)
        sums = self.over_ranks(epoch_sums)
        return {
            "loss": sums["loss"] / sums["images"],
            "train_accuracy": sums["correct"] / sums["images"],
            "images_per_second": sums["images"] / (time.perf_counter() - started),
        }

    @torch.no_grad()
    def evaluate(self, split: data.Split) -> float:
        """Accuracy on a split; every rank takes its share of it. The training's random numbers stay as they are."""
        self.place.broadcast(self.model.buffers())  # BatchNorm's running means: rank 0's count, as in the checkpoint
        self.model.eval()
        mine = list(range(self.place.rank, len(split), self.place.world))
        pieces = [mine[start : start + EVALUATION_BATCH] for start in range(0, len(mine), EVALUATION_BATCH)]
        correct = 0
        with measure.undisturbed():
            for x_NCHW, y_N in split.batches(pieces):
                images = self.to_device(x_NCHW, y_N)
                correct += int(forward(self.model, *images, autocast=self.config.training.autocast)[1])
        self.model.train()
        return self.place.sum([correct])[0] / len(split)

    def describe(self) -> tuple[fqt.Summary, float]:
        """The model's summary and its modelled speed-up."""
        blank = torch.zeros(2, *self.data.shape)
        return measure.describe(self.model, self.to_device(blank, blank)[0])

    def compare(self, unconverted: nn.Module) -> measure.Comparison:
        """Speed and memory against the unconverted model, on the run's own first batches."""
        count = measure.WARM_UP + self.config.tracking.baseline_steps
        batches = itertools.chain.from_iterable(self.batches(epoch) for epoch in itertools.count())
        return measure.compare(self.model, unconverted, self.make_step, itertools.islice(batches, count))

    def show_precision(self, tracker: Tracker) -> None:
        """The policy's heat map so far, and which kernel serves each layer now."""
        if self.timeline and self.place.main:
            tracker.image("precision/bits", self.steps, self.timeline.image())
            tracker.text("summary", str(fqt.summary(self.model)), self.steps)

    def make_step(self, model: nn.Module, module: nn.Module | None = None, policy: fqt.Policy | None = None) -> Step:
        """What trains a model, with an optimizer of its own."""
        return Step(model, module or model, build_optimizer(self.config.optimizer, model), self.config.training, policy)

    def chunks(self, epoch: int) -> list[list[int]]:
        """Indices of this rank's images in each step of an epoch. Raises ConfigError where they make no step."""
        size, world, parts = self.config.data.batch_size, self.place.world, self.config.training.accumulate
        if size % (world * parts):
            raise ConfigError(
                f"data.batch_size = {size}: {world} processes with training.accumulate = {parts} need a multiple of "
                f"{world * parts}."
            )
        chunks = data.chunks(
            len(self.data.train), size // world, seed=self.config.seed, epoch=epoch, rank=self.place.rank, world=world
        )
        if not chunks:
            raise ConfigError(f"data.batch_size = {size}: there are {len(self.data.train)} images to train on; lower it.")
        return chunks

    def batches(self, epoch: int) -> Iterator[Parts]:
        """This rank's batches of an epoch, cut into parts, on the device."""
        augment = self.data.augmentation(self.config.seed, epoch)
        parts = self.config.training.accumulate
        for batch in self.data.train.batches(self.chunks(epoch), augment):
            x_NCHW, y_N = self.to_device(*batch)
            yield list(zip(x_NCHW.chunk(parts), y_N.chunk(parts), strict=True))

    def to_device(self, x_NCHW: Tensor, y_N: Tensor) -> tuple[Tensor, Tensor]:
        """A batch where, and in the memory format in which, the model wants it."""
        layout = torch.channels_last if self.config.training.channels_last else torch.contiguous_format
        return x_NCHW.to(self.place.device, memory_format=layout), y_N.to(self.place.device)

    def over_ranks(self, sums: Counter[str]) -> dict[str, float]:
        """Sums of the ranks added up."""
        return dict(zip(sums, self.place.sum(list(sums.values())), strict=True))

    def say(self, text: str) -> None:
        """Prints, on one rank."""
        if self.place.main and not self.config.quiet:
            print(text, flush=True)

    def save(self) -> None:
        """Writes last.pt, if checkpoints are on."""
        if not self.config.checkpoint.enabled or self.folder is None:
            return
        generators = self.place.gather(checkpoint.generators())
        if self.place.main:
            state = {
                "config": self.config.model_dump(mode="json"),
                "world": self.place.world,
                "epoch": self.epoch,
                "steps": self.steps,
                "history": self.history,
                "model": self.model.state_dict(),
                "optimizer": self.step.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "generators": generators,
            }
            if self.policy and self.timeline:
                state["precision"] = {"policy": self.policy.state_dict(), "timeline": self.timeline.points}
            checkpoint.save(self.folder / checkpoint.NAME, state)

    def restore(self, state: dict[str, Any]) -> None:
        """Continues where a checkpoint was written."""
        self.model.load_state_dict(state["model"])
        self.step.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.epoch, self.steps, self.history = state["epoch"], state["steps"], state["history"]
        if self.policy and self.timeline:
            self.policy.load_state_dict(state["precision"]["policy"])
            self.timeline.points = [tuple(point) for point in state["precision"]["timeline"]]
        checkpoint.restore_generators(state["generators"][self.place.rank])


def seed(number: int) -> None:
    """Seeds torch, and what libraries may draw from beside it."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002


def load_recipe(recipe: str) -> fqt.Recipe:
    """Raises ConfigError with fqt's own words."""
    try:
        return fqt.load_recipe(recipe)
    except ValueError as error:
        raise ConfigError(f"recipe = {recipe}: {error}.") from error


def convert(model: nn.Module, recipe: fqt.Recipe, config: Config) -> None:
    """Makes the model a low-bit one, in place. Raises ConfigError with fqt's own words."""
    if config.recipe == "fp32":
        return
    try:
        fqt.convert(model, recipe, skip=config.skip)
    except ValueError as error:
        raise ConfigError(f"recipe = {config.recipe}: {error}.") from error


def load_weights(model: nn.Module, path: Path) -> None:
    """A warm start. Raises ConfigError where the file's tensors are not the model's."""
    try:
        model.load_state_dict(checkpoint.load_weights(path))
    except RuntimeError as error:
        raise ConfigError(f"model.weights = {path}: it does not fit the model. {' '.join(str(error).split())}") from None


def new_folder(config: Config) -> Path:
    """<output>/<name>/<date-time>, not there yet."""
    folder = Path(config.output) / config.name / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    return next(
        path for n in itertools.count(1) if not (path := folder if n == 1 else folder.with_name(f"{folder.name}_{n}")).exists()
    )
