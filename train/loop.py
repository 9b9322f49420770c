"""The training, top to bottom: set up, train an epoch, evaluate, report, save.

from train.config import load
from train.loop import run
result = run(load("fqt_1bit", ["optimizer.lr=0.003"]))
"""

import copy
import itertools
import math
import random
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import fqt
from fqt.files import write_atomically
from train import checkpoint, data, diagnose, faults, files, measure, messages, models, pictures, precision, ranks
from train.config import Config, dump
from train.optim import build_optimizer, build_schedule
from train.step import Outcome, Parts, Step, forward
from train.stop import Stop, Stopped
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


def run(config: Config, *, resume: Path | None = None, anew: bool = False, stop: Stop | None = None) -> Result:
    """Trains what the configuration says.

    resume: a checkpoint, a run's folder or a folder of runs to continue from. anew: begin where there is no checkpoint yet.
    stop: who may ask the run to end.

    Raises ConfigError for a mistake of the user, before the first step, TrainingError where training cannot go on, and Stopped
    where `stop` asked for the end.
    """
    with ranks.join(config.device) as place, faults.told():
        if config.tracking.enabled or config.checkpoint.enabled:
            place.from_main(lambda: files.check_writable(config.output))
        found = place.from_main(lambda: find(resume, anew)) if resume else None
        return Trainer(config, place, found, stop).train()


def find(resume: Path, anew: bool) -> Path | None:
    """The checkpoint to continue from; says which newer ones are damaged. Raises ConfigError where there is none."""
    found, damaged = checkpoint.find(resume)
    for fault in damaged:
        print(f"train: {fault} Continuing from {found}.", file=sys.stderr)
    if found is None and not anew:
        raise ConfigError(
            f"--resume {resume}: there is no {checkpoint.NAME}; give the path of a checkpoint or of a run's folder, or "
            "--resume auto, which begins anew where there is none."
        )
    return found


def dry_run(config: Config) -> str:
    """The whole configuration and the summary of the model that it makes, without training."""
    with ranks.join(config.device) as place, faults.told():
        summary, modelled = Trainer(config, place).describe()
        return f"{dump(config)}\n{summary}\n\nmodelled speed-up {modelled:.2f}x (multiply-adds times bits)"


class Trainer:
    """One run: the model and all that trains it.

    found: the checkpoint to continue from.

    epoch, position: whole epochs done, and steps of the next one; steps: all of them. epoch_sums, recent_sums: this rank's, of
    the epoch and since the last point of the step curves. seconds: spent in the epoch so far. skipped, streak: steps that left
    the weights as they were, all of them and those in a row. best: the highest accuracy on held-out images. saved_step: when
    the newest checkpoint was written. ms_fp32: a step of the unconverted model, as timed last. time_saved: seconds that the
    steps so far took less than that; measuring: seconds that the timing took. bits: of each layer's products, as logged last.
    """

    def __init__(self, config: Config, place: ranks.Ranks, found: Path | None = None, stop: Stop | None = None) -> None:
        self.config, self.place, self.stop = config, place, stop or Stop()
        self.recipe = load_recipe(config.recipe)
        state = checkpoint.load(found) if found else None
        if found and state:
            checkpoint.check(state, config, self.recipe, place.world, found)
        with place.main_first():
            self.data = data.load(config.data, quiet=config.quiet or not place.main)
        self.steps_per_epoch = len(self.chunks(0))
        self.total_steps = self.steps_per_epoch * config.training.epochs

        seed(config.seed)  # the same initial weights on every rank
        self.model = models.build(config.model.name, self.data.shape, self.data.classes)
        if config.model.weights:
            load_weights(self.model, Path(config.model.weights))
        if config.training.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model.to(place.device)
        compares = config.tracking.enabled and config.tracking.baseline_steps > 0 and config.recipe != "fp32"
        self.unconverted = copy.deepcopy(self.model) if compares else None
        convert(self.model, self.recipe, config)
        self.policy = precision.build(config.precision, self.model)  # what it draws, every rank draws
        seed(config.seed + place.rank)  # quantization noise of its own on every rank

        self.step = self.make_step(self.model, place.wrap(self.model), self.policy, place.all)
        self.schedule = build_schedule(
            config.schedule, self.step.optimizer, epochs=config.training.epochs, steps_per_epoch=self.steps_per_epoch
        )
        self.epoch, self.position, self.steps, self.history = 0, 0, 0, list[dict[str, Any]]()
        self.epoch_sums, self.recent_sums, self.seconds = Counter[str](), Counter[str](), 0.0
        self.skipped, self.streak, self.best, self.saved_step = 0, 0, -1.0, None
        self.ms_fp32, self.time_saved, self.measuring = 0.0, 0.0, 0.0
        self.bits = measure.layer_bits(self.model)
        self.timeline: precision.Timeline | None = None
        if self.policy is not None:
            self.describe()  # counts the multiply-adds
            self.timeline = precision.Timeline(self.policy, config.data.batch_size)
        self.folder = found.parent if found else None
        if found and state:
            self.restore(state, found)

    def train(self) -> Result:
        """All that is left."""
        config, comparison = self.config, None
        resumed_at = self.steps if self.folder else None
        if config.tracking.enabled or config.checkpoint.enabled:
            self.folder = self.place.from_main(lambda: self.folder or files.new_folder(config.output, config.name))
        self.tracker = tracker = Tracker(
            self.folder if config.tracking.enabled and self.place.main else None, resumed_at=resumed_at
        )
        summary, modelled = self.describe()
        tracker.config(dump(config))
        tracker.text("summary", str(summary))
        self.say(messages.opening(config, self.place, self.folder, self.epoch, self.position))
        try:
            if self.unconverted is not None:
                comparison = self.compare(self.unconverted)
                if not config.tracking.baseline_every:
                    self.unconverted = None
                if self.timeline and self.place.main:
                    self.timeline.calibrate(next(self.batches(0)), comparison.ms_fp32)
            tracker.scalars(self.steps, messages.comparison_scalars(comparison, modelled))
            self.show_start()

            self.saved_at = time.monotonic()
            with self.stop.finishing():
                for epoch in range(self.epoch, config.training.epochs):
                    self.train_epoch(epoch)

            last = self.history[-1]
            tracker.hparams(checkpoint.flat(config.model_dump(mode="json")), messages.final_metrics(last))
        finally:
            tracker.close()
        seconds = sum(row["seconds"] for row in self.history)
        result = Result(last["test_accuracy"], last["valid_accuracy"], seconds, self.history, comparison, modelled, self.folder)
        self.say(messages.closing(config, self.history, comparison, modelled, self.time_saved, self.measuring, self.folder))
        return result

    def train_epoch(self, epoch: int) -> None:
        """What is left of one pass over the training images, its evaluation, its row in the history, and a checkpoint."""
        started = time.perf_counter() - self.seconds
        quiet = self.config.quiet or not self.place.main
        label = f"epoch {epoch + 1}/{self.config.training.epochs}"
        self.model.train()
        bar = tqdm(
            total=self.steps_per_epoch, initial=self.position, desc=label, unit="step", leave=False, disable=quiet or None
        )
        with bar:
            for parts in self.batches(epoch, self.position):
                started += self.time_baseline(parts)
                outcome = self.train_step(parts, epoch)
                self.seconds = time.perf_counter() - started
                bar.update()
                bar.set_postfix(loss=f"{outcome.loss:.3f}", refresh=False)
                self.between_steps()
        row = {"epoch": epoch + 1, **messages.epoch_means(self.over_ranks(self.epoch_sums), self.seconds)}
        row["valid_accuracy"] = self.evaluate(self.data.valid) if self.data.valid else None
        row["test_accuracy"] = self.evaluate(self.data.test)
        row["seconds"] = time.perf_counter() - started
        self.history.append(row)
        self.epoch, self.position, self.seconds = epoch + 1, 0, 0.0
        self.epoch_sums.clear()

        # the log first: what a checkpoint counts as done is in it
        self.tracker.scalars(self.steps, messages.epoch_scalars(row, measure.peak_bytes(self.place.device)))
        if self.config.tracking.enabled:
            self.tracker.scalars(self.steps, measure.zero_fractions(self.model))
            bits = measure.layer_bits(self.model)
            self.tracker.scalars(self.steps, {name: value for name, value in bits.items() if value != self.bits.get(name)})
            self.bits = bits
            self.show_precision()
        self.list_unreadable()
        self.save()
        self.say(messages.epoch_line(row, self.config.training.epochs))

    def train_step(self, parts: Parts, epoch: int) -> Outcome:
        """One optimizer step and its points of the curves."""
        tracking, tracker = self.config.tracking, self.tracker
        observe = tracking.enabled and tracking.variance_every > 0 and self.steps % tracking.variance_every == 0
        rate = float(self.schedule.get_last_lr()[0])
        epochs_done = (self.steps + 1) / self.steps_per_epoch
        outcome = self.step(parts, observe=observe and self.config.recipe != "fp32", epoch=epochs_done)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)  # the first step was skipped
            self.schedule.step()
        self.steps += 1
        if outcome.skipped:
            self.note_skipped(outcome, parts, epoch)
        else:
            self.streak = 0
        self.position += 1
        if self.timeline and outcome.decisions:
            self.timeline.note(self.steps)
            tracker.decisions([decision.row() for decision in outcome.decisions])

        tracker.scalars(self.steps, messages.gradient_scalars(outcome))
        self.time_saved += (self.ms_fp32 - outcome.ms["step"]) / 1e3 if self.ms_fp32 else 0.0
        self.epoch_sums.update(messages.sums(outcome))
        self.recent_sums.update(messages.sums(outcome))
        if tracking.enabled and self.steps % tracking.every == 0:
            sums = self.over_ranks(self.recent_sums)
            tracker.scalars(self.steps, messages.step_scalars(sums, rate))
            if self.ms_fp32:
                tracker.scalars(self.steps, messages.speed_scalars(sums, self.ms_fp32, self.time_saved, self.measuring))
            if self.timeline and self.place.main:
                spent = (sums[f"{phase}_ms"] / sums["steps"] for phase in ("step", "policy"))
                tracker.scalars(self.steps, self.timeline.scalars(*spent))
            self.recent_sums.clear()
        return outcome

    def note_skipped(self, outcome: Outcome, parts: Parts, epoch: int) -> None:
        """Lists a step that left the weights as they were. Raises TrainingError where it has to be the last."""
        self.skipped, self.streak = self.skipped + 1, self.streak + 1
        images = self.place.gather(self.chunks(epoch)[self.position])  # by rank, in the order of the training images
        self.tracker.skipped({"step": self.steps, "epoch": epoch + 1, "reason": outcome.skipped, "images": images})
        if self.streak >= (1 if self.config.training.nonfinite == "stop" else self.config.training.nonfinite_limit):
            diagnosis = diagnose.first_not_finite(self.model, parts, autocast=self.config.training.autocast)
            reason = f"{messages.in_a_row(outcome.skipped, self.streak)}, and the weights were left as they were. {diagnosis}"
            raise TrainingError(messages.diverged(reason, self.steps, self.folder, self.saved_step))
        if self.skipped & (self.skipped - 1) == 0:
            tqdm.write("", end="")  # clears the bar
            self.say(messages.skipped(outcome.skipped, self.steps, self.skipped))

    def between_steps(self) -> None:
        """Writes a checkpoint where one is due, and ends the run where a rank was asked to or cannot write."""
        wanted, now = self.config.checkpoint, time.monotonic()
        late = wanted.every_minutes is not None and now - self.saved_at > 60 * wanted.every_minutes
        stop, failed, late = self.place.any(
            self.stop.number is not None, self.tracker.failure is not None, late and self.place.main
        )
        if failed:
            self.fail_to_write()
        within = self.position < self.steps_per_epoch  # at its end, the epoch's own checkpoint follows
        due = late or (wanted.every_steps is not None and self.steps % wanted.every_steps == 0)
        if stop or (due and within):
            self.save()
        if stop:
            self.end()

    def fail_to_write(self) -> None:
        """Raises TrainingError: the curves cannot be written any more."""
        reason = [files.reason(failure) for failure in self.place.gather(self.tracker.failure) if failure]
        what = f"the curves in {self.folder} could not be written ({'; '.join(reason)})"
        raise TrainingError(messages.broken_off(what, self.folder, self.saved_step))

    def end(self) -> None:
        """Raises Stopped: a signal asked for it, on this rank or another."""
        number = max(number or 0 for number in self.place.gather(self.stop.number))
        kept = self.folder if self.config.checkpoint.enabled else None
        message = messages.stopped(signal.Signals(number).name, self.steps, self.total_steps, kept)
        raise Stopped(message, 0 if kept else 128 + number)

    @torch.no_grad()
    def evaluate(self, split: data.Split) -> float:
        """Accuracy on a split; every rank takes its share of it. The training's random numbers stay as they are."""
        self.place.broadcast(self.model.buffers())  # BatchNorm's running means: rank 0's count, as in the checkpoint
        self.model.eval()
        mine = list(range(self.place.rank, len(split), self.place.world))
        pieces = [mine[start : start + EVALUATION_BATCH] for start in range(0, len(mine), EVALUATION_BATCH)]
        most = -(-len(split) // (self.place.world * EVALUATION_BATCH))  # pieces of rank 0, which has no fewer than any other
        correct = seen = 0
        with measure.undisturbed():
            batches = split.batches(pieces)
            for _ in range(most):
                if (batch := next(batches, None)) is not None:
                    images = self.to_device(*batch)
                    correct += int(forward(self.model, *images, autocast=self.config.training.autocast)[1])
                    seen += len(images[1])
                if self.place.any(self.stop.number is not None)[0]:  # the epoch's steps are done, and are kept
                    self.save()
                    self.end()
        self.model.train()
        correct, seen = self.place.sum([correct, seen])
        return correct / seen if seen else math.nan

    def describe(self) -> tuple[fqt.Summary, float]:
        """The model's summary and its modelled speed-up."""
        blank = torch.zeros(2, *self.data.shape)
        return measure.describe(self.model, self.to_device(blank, blank)[0])

    def compare(self, unconverted: nn.Module) -> measure.Comparison:
        """Speed and memory against the unconverted model, on the run's own first batches."""
        started, count = time.perf_counter(), measure.WARM_UP + self.config.tracking.baseline_steps
        batches = itertools.chain.from_iterable(self.batches(epoch) for epoch in itertools.count())
        comparison = measure.compare(self.model, unconverted, self.make_replica, itertools.islice(batches, count))
        self.ms_fp32 = comparison.ms_fp32
        self.measuring += time.perf_counter() - started
        return comparison

    def time_baseline(self, parts: Parts) -> float:
        """Times the unconverted model again where that is due; returns the seconds that it took."""
        tracking, started = self.config.tracking, time.perf_counter()
        if self.unconverted is None or self.steps == 0 or self.steps % tracking.baseline_every:
            return 0.0
        self.ms_fp32 = measure.baseline_ms(self.unconverted, self.make_replica, parts, tracking.baseline_steps)
        spent = time.perf_counter() - started
        self.measuring += spent
        return spent

    def show_start(self) -> None:
        """Some images as the model gets them, and the bits of a recipe that no policy changes."""
        if self.steps or not self.config.tracking.enabled or not self.place.main:
            return
        (images_NCHW, _), *_ = next(self.batches(0))
        self.tracker.image("images/train", 0, pictures.grid(images_NCHW))
        if self.policy is None and self.config.recipe != "fp32":
            layers = [(name, layer.recipe) for name, layer in fqt.quantized_layers(self.model)]
            bits = {name: [bits] for name, bits in precision.bits_of(layers).items()}
            self.tracker.bits("bits", 0, pictures.heat_map([name for name, _ in layers], [0], bits, last=self.total_steps))

    def show_precision(self) -> None:
        """The policy's heat map so far, and which kernel serves each layer now."""
        if self.timeline and self.place.main:
            self.tracker.bits("precision/bits", self.steps, self.timeline.image())
            self.tracker.text("summary", str(fqt.summary(self.model)), self.steps)

    def make_replica(self, model: nn.Module) -> Step:
        """What trains a copy of a model as this run trains its own: with gradients averaged over the ranks."""
        return self.make_step(model, self.place.wrap(model))

    def make_step(
        self,
        model: nn.Module,
        module: nn.Module | None = None,
        policy: fqt.Policy | None = None,
        agree: Callable[[bool], bool] = bool,
    ) -> Step:
        """What trains a model, with an optimizer of its own."""
        optimizer = build_optimizer(self.config.optimizer, model)
        return Step(model, module or model, optimizer, self.config.training, policy, agree)

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

    def batches(self, epoch: int, start: int = 0) -> Iterator[Parts]:
        """This rank's batches of an epoch from a step on, cut into parts, on the device."""
        augment = self.data.augmentation(self.config.seed, epoch)
        parts = self.config.training.accumulate
        for batch in self.data.train.batches(self.chunks(epoch)[start:], augment, whole=True):
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
        """Prints, on one rank. The training does not end because nobody reads on, as in `... | head`."""
        if self.place.main and not self.config.quiet:
            faults.print_on(text)

    def list_unreadable(self) -> None:
        """Counts and lists the images that were left out so far."""
        left_out = {path: why for found in self.place.gather(self.data.unreadable) for path, why in found.items()}
        if not left_out:
            return
        self.tracker.scalars(self.steps, {"data/unreadable": len(left_out)})
        if self.folder and self.place.main:
            text = "".join(f"{path}\t{why}\n" for path, why in sorted(left_out.items()))
            write_atomically(self.folder / messages.UNREADABLE, lambda file: file.write(text.encode()))
        self.say(messages.unreadable(left_out, self.folder))

    def save(self) -> None:
        """Writes last.pt, and best.pt after an epoch that is the best so far, if checkpoints are on.

        Raises TrainingError where the weights are not finite, which finite gradients can do too: a checkpoint that works stays.
        """
        if not self.config.checkpoint.enabled or self.folder is None:
            return
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                reason = f"the weights in {name} are not finite any more"
                raise TrainingError(messages.diverged(reason, self.steps, self.folder, self.saved_step))
        each = self.place.gather(self.own_state())
        valid = self.history[-1]["valid_accuracy"] if self.history and self.position == 0 else None
        is_best = valid is not None and valid > self.best
        self.best = valid if is_best else self.best
        self.tracker.flush()
        self.place.from_main(lambda: self.write(each, is_best))
        self.saved_step, self.saved_at = self.steps, time.monotonic()

    def own_state(self) -> dict[str, Any]:
        """What is each rank's own."""
        sums = {"epoch_sums": dict(self.epoch_sums), "recent_sums": dict(self.recent_sums)}
        return {"generators": checkpoint.generators(), **sums}

    def state(self, each: list[dict[str, Any]]) -> dict[str, Any]:
        """What a checkpoint holds. each: what every rank has of its own."""
        state = {
            "config": self.config.model_dump(mode="json"),
            "recipe": checkpoint.described(self.recipe),
            "images": len(self.data.train),
            "world": self.place.world,
            "epoch": self.epoch,
            "position": self.position,
            "steps": self.steps,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "streak": self.streak,
            "best": self.best,
            "time_saved": self.time_saved,
            "measuring": self.measuring,
            "bits": self.bits,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ranks": each,
        }
        if self.policy and self.timeline:
            state["precision"] = {"policy": self.policy.state_dict(), "timeline": self.timeline.points}
        return state

    def write(self, each: list[dict[str, Any]], is_best: bool) -> None:
        """Rank 0's part of `save`. Raises TrainingError where the disk refuses."""
        state = self.state(each)
        folder = self.folder
        assert folder is not None  # `save` asked
        try:
            checkpoint.save_last(folder, state, keep=self.config.checkpoint.keep, previous=self.saved_step)
            if is_best:
                checkpoint.save(folder / checkpoint.BEST, state)
        except OSError as error:
            what = f"A checkpoint could not be written to {folder} ({files.reason(error)})"
            raise TrainingError(messages.broken_off(what, folder, self.saved_step)) from None

    def restore(self, state: dict[str, Any], path: Path) -> None:
        """Continues where a checkpoint was written. Raises ConfigError where it does not fit this run."""
        then, now = state.get("images"), len(self.data.train)
        if then != now:
            raise ConfigError(
                f"{path} was written by a run on {then} training images, and there are {now} now: "
                "their order would be another. Bring the images back, or set model.weights to that file to start a new run."
            )
        expected = self.state([self.own_state()] * self.place.world)
        shapes = [parameter.shape for group in self.step.optimizer.param_groups for parameter in group["params"]]
        checkpoint.check_fit(state, expected, shapes, path)
        steps = state["epoch"] * self.steps_per_epoch + state["position"]
        if not state["steps"] == state["schedule"]["last_epoch"] == steps or len(state["history"]) != state["epoch"]:
            raise ConfigError(
                f"{path} contradicts itself: its steps, epochs, schedule and history are of different lengths. Give another."
            )
        try:
            own = state["ranks"][self.place.rank]
            self.model.load_state_dict(state["model"])
            self.step.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.epoch, self.position, self.steps = state["epoch"], state["position"], state["steps"]
            self.history, self.seconds, self.best = state["history"], state["seconds"], state["best"]
            self.skipped, self.streak = state["skipped"], state["streak"]
            self.time_saved, self.measuring, self.bits = state["time_saved"], state["measuring"], state["bits"]
            self.epoch_sums, self.recent_sums = Counter(own["epoch_sums"]), Counter(own["recent_sums"])
            if self.policy and self.timeline:
                self.policy.load_state_dict(state["precision"]["policy"])
                self.timeline.points = [tuple(point) for point in state["precision"]["timeline"]]
            checkpoint.restore_generators(own["generators"])
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ConfigError(
                f"{path} does not fit this run ({' '.join(str(error).split())}): its model or its optimizer is another. Resume "
                "with what wrote it, or set model.weights to that file to start a new run from its weights."
            ) from None
        self.saved_step = self.steps if path.name == checkpoint.NAME else None


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
