"""The training, top to bottom: set up, train an epoch, evaluate, report, save.

from train.config import load
from train.loop import run
result = run(load("fqt_1bit", ["optimizer.lr=0.003"]))
"""

import copy
import itertools
import math
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import fqt
from fqt.files import write_atomically
from train import (
    checkpoint,
    data,
    diagnose,
    faults,
    files,
    measure,
    messages,
    parallel,
    pictures,
    precision,
    ranks,
    regularize,
)
from train.config import Config, dump
from train.feed import Feed
from train.monitors import Monitors
from train.optim import build_optimizer, build_schedule
from train.start import begin, convert, find, load_recipe, load_weights, seed
from train.state import Progress, RunState
from train.step import Outcome, Parts, Step
from train.stop import Stop, Stopped
from train.tasks import TASKS
from train.tracking import Tracker
from train.wording import TrainingError

EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Result:
    """How a run ended.

    test, valid: the task's metric, an accuracy (a fraction) or a perplexity; valid is None where nothing is held out.
    seconds: wall time of all epochs with their evaluation, set-up not counted.
    history: one row an epoch, of `messages.row_keys`.
    comparison: speed and memory against the unconverted model, where the run measured it.
    folder: where checkpoint and curves are, if there are any.
    """

    test: float
    valid: float | None
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


def dry_run(config: Config) -> str:
    """The whole configuration and the summary of the model that it makes, without training."""
    with ranks.join(config.device) as place, faults.told():
        summary, modelled = Trainer(config, place).describe()
        return f"{dump(config)}\n{summary}\n\nmodelled speed-up {modelled:.2f}x (multiply-adds times bits)"


class Trainer:
    """One run: the model and all that trains it.

    found: the checkpoint to continue from.

    done: how far it is. ms_fp32: a step of the unconverted model, as timed last. saved_step: when the newest checkpoint was
    written. begun: what was done to the converted model before the first step, "" if nothing.
    """

    def __init__(self, config: Config, place: ranks.Ranks, found: Path | None = None, stop: Stop | None = None) -> None:
        self.config, self.place, self.stop = config, place, stop or Stop()
        self.task, self.recipe = TASKS[config.task], load_recipe(config.recipe)
        state = checkpoint.load(found) if found else None
        if found and state:
            checkpoint.check(state, config, self.recipe, place.world, found)
        with place.main_first():
            self.data = self.task.load(config, quiet=config.quiet or not place.main)
        self.feed = Feed(config, self.task, self.data, place)
        self.total_steps = self.feed.steps * config.training.epochs

        self.parallel = parallel.Parallel(config.distributed, place)
        seed(config.seed)  # the same initial weights on every rank
        self.model = self.build_model()
        if config.model.weights:
            load_weights(self.model, Path(config.model.weights))
        compares = config.tracking.enabled and config.tracking.baseline_steps > 0 and config.recipe != "fp32"
        self.unconverted = copy.deepcopy(self.model) if compares else None
        self.example = self.feed.example()
        convert(self.model, self.recipe, config, self.task.inputs(self.example))
        first = (self.task.inputs(x) for parts in self.feed.batches(0) for x, _ in parts)
        self.begun = begin(self.model, config, first, resumed=found is not None)
        self.ema = regularize.averaged(self.model, config.training.ema)
        self.policy = precision.build(config.precision, self.model)  # what it draws, every rank draws
        seed(config.seed + place.rank)  # quantization noise of its own on every rank

        module, self.parallel.hook = self.parallel.wrap(self.model)
        self.step = self.make_step(self.model, module, self.policy, place.all)
        self.schedule = build_schedule(
            config.schedule, self.step.optimizer, epochs=config.training.epochs, steps_per_epoch=self.feed.steps
        )
        self.done, self.ms_fp32, self.saved_step = Progress(bits=measure.layer_bits(self.model)), 0.0, None
        self.timeline: precision.Timeline | None = None
        if self.policy is not None:
            self.describe()  # counts the multiply-adds
            self.timeline = precision.Timeline(self.policy, config.data.batch_size)
        self.state = RunState(
            config, self.recipe, self.task, self.data, place, self.model, self.step.optimizer, self.schedule, self.policy,
            self.timeline, self.done, self.parallel, self.ema,
        )  # fmt: skip
        self.folder = found.parent if found else None
        if found and state:
            self.state.restore(state, found, self.feed.steps)
            self.saved_step = self.done.steps if found.name == checkpoint.NAME else None

    def train(self) -> Result:
        """All that is left."""
        config, comparison = self.config, None
        resumed_at = self.done.steps if self.folder else None
        if config.tracking.enabled or config.checkpoint.enabled:
            self.folder = self.place.from_main(lambda: self.folder or files.new_folder(config.output, config.name))
        tracked = self.folder if config.tracking.enabled and self.place.main else None
        self.tracker = tracker = Tracker(tracked, resumed_at=resumed_at, metric=self.task.metric)
        self.monitors = Monitors(config.tracking, self.folder if self.place.main else None)
        summary, modelled = self.describe()
        tracker.config(dump(config))
        tracker.text("summary", str(summary))
        self.say(messages.opening(config, self.place, self.folder, self.done.epoch, self.done.position))
        if self.begun and resumed_at is None:
            self.say(f"start: {self.begun}")
        try:
            if self.unconverted is not None:
                comparison = self.compare(self.unconverted)
                if not config.tracking.baseline_every:
                    self.unconverted = None
                if self.timeline and self.place.main:
                    self.timeline.calibrate(self.task, next(self.feed.batches(0)), comparison.ms_fp32)
            tracker.scalars(self.done.steps, messages.comparison_scalars(comparison, modelled))
            self.show_start()

            self.saved_at = time.monotonic()
            with self.stop.finishing():
                for epoch in range(self.done.epoch, config.training.epochs):
                    self.train_epoch(epoch)

            history, metric = self.done.history, self.task.metric
            last = history[-1]
            tracker.hparams(checkpoint.flat(config.model_dump(mode="json")), messages.final_metrics(last, self.task))
        finally:
            self.monitors.stop()
            tracker.close()
        seconds = sum(row["seconds"] for row in history)
        times = self.done.time_saved, self.done.measuring
        self.say(messages.closing(config, self.task, history, comparison, modelled, *times, self.folder))
        return Result(last[f"test_{metric}"], last[f"valid_{metric}"], seconds, history, comparison, modelled, self.folder)

    def train_epoch(self, epoch: int) -> None:
        """What is left of one pass over the training samples, its evaluation, its row in the history, and a checkpoint."""
        done, task = self.done, self.task
        started = time.perf_counter() - done.seconds
        quiet = self.config.quiet or not self.place.main
        label = f"epoch {epoch + 1}/{self.config.training.epochs}"
        self.model.train()
        bar = tqdm(total=self.feed.steps, initial=done.position, desc=label, unit="step", leave=False, disable=quiet or None)
        with bar:
            for parts in self.feed.batches(epoch, done.position):
                started += self.time_baseline(parts)
                outcome = self.train_step(parts, epoch)
                done.seconds = time.perf_counter() - started
                bar.update()
                bar.set_postfix(loss=f"{outcome.loss:.3f}", refresh=False)
                self.between_steps()
        row = {"epoch": epoch + 1, **messages.epoch_means(self.over_ranks(done.epoch_sums), done.seconds, task)}
        row[f"valid_{task.metric}"] = self.evaluate(self.data.valid) if self.data.valid else None
        row[f"test_{task.metric}"] = self.evaluate(self.data.test)
        row["seconds"] = time.perf_counter() - started
        done.history.append(row)
        done.epoch, done.position, done.seconds = epoch + 1, 0, 0.0
        done.epoch_sums.clear()

        # the log first: what a checkpoint counts as done is in it
        self.tracker.scalars(done.steps, messages.epoch_scalars(row, measure.peak_bytes(self.place.device), task))
        if self.config.tracking.enabled:
            self.show_epoch()
        self.list_unreadable()
        self.save()
        self.say(messages.epoch_line(row, self.config.training.epochs, task))

    def train_step(self, parts: Parts, epoch: int) -> Outcome:
        """One optimizer step and its points of the curves."""
        tracking, tracker, done = self.config.tracking, self.tracker, self.done
        observe = tracking.enabled and tracking.variance_every > 0 and done.steps % tracking.variance_every == 0
        rate = float(self.schedule.get_last_lr()[0])
        epochs_done = (done.steps + 1) / self.feed.steps
        self.monitors.before(self.model, done.steps)
        outcome = self.step(parts, observe=observe and self.config.recipe != "fp32", epoch=epochs_done)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)  # the first step was skipped
            self.schedule.step()
        done.steps += 1
        if outcome.skipped:
            self.note_skipped(outcome, parts, epoch)
        else:
            done.streak = 0
            if self.ema is not None:
                self.ema.update_parameters(self.model)
        done.position += 1
        if self.timeline and outcome.decisions:
            self.timeline.note(done.steps)
            tracker.decisions([decision.row() for decision in outcome.decisions])

        tracker.scalars(done.steps, messages.gradient_scalars(outcome))
        tracker.scalars(done.steps, self.monitors.after(self.model, done.steps))
        done.time_saved += (self.ms_fp32 - outcome.ms["step"]) / 1e3 if self.ms_fp32 else 0.0
        done.epoch_sums.update(messages.sums(outcome))
        done.recent_sums.update(messages.sums(outcome))
        if tracking.enabled and done.steps % tracking.every == 0:
            sums = self.over_ranks(done.recent_sums)
            tracker.scalars(done.steps, messages.step_scalars(sums, rate, measure.used_bytes(self.place.device), self.task))
            if self.ms_fp32:
                tracker.scalars(done.steps, messages.speed_scalars(sums, self.ms_fp32, done.time_saved, done.measuring))
            tracker.scalars(done.steps, self.parallel.scalars())
            if self.timeline and self.place.main:
                spent = (sums[f"{phase}_ms"] / sums["steps"] for phase in ("step", "policy"))
                tracker.scalars(done.steps, self.timeline.scalars(*spent))
            done.recent_sums.clear()
        return outcome

    def note_skipped(self, outcome: Outcome, parts: Parts, epoch: int) -> None:
        """Lists a step that left the weights as they were. Raises TrainingError where it has to be the last."""
        done = self.done
        done.skipped, done.streak = done.skipped + 1, done.streak + 1
        samples = self.place.gather(self.feed.chunks(epoch)[done.position])  # by rank, in the order of the training samples
        self.tracker.skipped({"step": done.steps, "epoch": epoch + 1, "reason": outcome.skipped, "samples": samples})
        if done.streak >= (1 if self.config.training.nonfinite == "stop" else self.config.training.nonfinite_limit):
            diagnosis = diagnose.first_not_finite(self.copy(), self.task, parts, autocast=self.config.training.autocast)
            reason = f"{messages.in_a_row(outcome.skipped, done.streak)}, and the weights were left as they were. {diagnosis}"
            raise TrainingError(messages.diverged(reason, done.steps, self.folder, self.saved_step))
        if done.skipped & (done.skipped - 1) == 0:
            tqdm.write("", end="")  # clears the bar
            self.say(messages.skipped(outcome.skipped, done.steps, done.skipped))

    def between_steps(self) -> None:
        """Writes a checkpoint where one is due, and ends the run where a rank was asked to or cannot write."""
        wanted, now = self.config.checkpoint, time.monotonic()
        late = wanted.every_minutes is not None and now - self.saved_at > 60 * wanted.every_minutes
        stop, failed, late = self.place.any(
            self.stop.number is not None, self.tracker.failure is not None, late and self.place.main
        )
        if failed:
            self.fail_to_write()
        steps = self.done.steps
        if self.parallel.due(steps) and (odd := self.parallel.differing(self.model)):
            what = f"The processes' weights are not the same any more after step {steps}: {odd} differs from rank 0's"
            raise TrainingError(messages.broken_off(what, self.folder, self.saved_step))
        within = self.done.position < self.feed.steps  # at its end, the epoch's own checkpoint follows
        due = late or (wanted.every_steps is not None and steps % wanted.every_steps == 0)
        due |= steps == 1 and self.place.world > 1  # what cannot be gathered or written fails now, not after hours
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
        message = messages.stopped(signal.Signals(number).name, self.done.steps, self.total_steps, kept)
        raise Stopped(message, 0 if kept else 128 + number)

    @torch.no_grad()
    def evaluate(self, split: data.Split) -> float:
        """The task's metric on a split; every rank takes its share of it. The training's random numbers stay as they are."""
        # BatchNorm's running means: rank 0's count, as in the checkpoint
        self.place.broadcast(self.model.buffers())
        model = self.model if self.ema is None else regularize.follow(self.ema, self.model)
        self.place.broadcast(model.buffers())
        model.eval()
        mine = list(range(self.place.rank, len(split), self.place.world))
        pieces = [mine[start : start + EVALUATION_BATCH] for start in range(0, len(mine), EVALUATION_BATCH)]
        most = -(-len(split) // (self.place.world * EVALUATION_BATCH))  # pieces of rank 0, which has no fewer than any other
        loss, correct, items = 0.0, 0, 0
        with measure.undisturbed():
            batches = split.batches(pieces)
            quiet = self.config.quiet or not self.place.main
            for _ in tqdm(range(most), desc="evaluating", unit="batch", leave=False, disable=quiet or None):
                if (batch := next(batches, None)) is None:
                    self.task.logits(model, self.example)  # a sharded model's forward is an operation of all ranks
                else:
                    score = self.task.forward(model, *self.feed.to_device(*batch), autocast=self.config.training.autocast)
                    loss += score.items * score.loss.item()
                    correct += int(score.correct)
                    items += score.items
                if self.place.any(self.stop.number is not None)[0]:  # the epoch's steps are done, and are kept
                    self.save()
                    self.end()
        self.model.train()
        loss, correct, items = self.place.sum([loss, correct, items])
        return self.task.quality(loss / items if items else math.nan, correct, items)

    def describe(self) -> tuple[fqt.Summary, float]:
        """The model's summary and its modelled speed-up."""
        return measure.describe(self.model, self.copy(), self.task, self.example)

    def compare(self, unconverted: nn.Module) -> measure.Comparison:
        """Speed and memory against the unconverted model, on the run's own first batches."""
        started, count = time.perf_counter(), measure.WARM_UP + self.config.tracking.baseline_steps
        batches = itertools.chain.from_iterable(self.feed.batches(epoch) for epoch in itertools.count())
        comparison = measure.compare(self.copy(), unconverted, self.make_replica, itertools.islice(batches, count))
        self.ms_fp32 = comparison.ms_fp32
        self.done.measuring += time.perf_counter() - started
        return comparison

    def time_baseline(self, parts: Parts) -> float:
        """Times the unconverted model again where that is due; returns the seconds that it took."""
        tracking, started = self.config.tracking, time.perf_counter()
        if self.unconverted is None or self.done.steps == 0 or self.done.steps % tracking.baseline_every:
            return 0.0
        self.ms_fp32 = measure.baseline_ms(self.unconverted, self.make_replica, parts, tracking.baseline_steps)
        spent = time.perf_counter() - started
        self.done.measuring += spent
        return spent

    def show_start(self) -> None:
        """Something of what the model gets, and the bits of a recipe that no policy changes."""
        if self.done.steps or not self.config.tracking.enabled or not self.place.main:
            return
        first, *_ = next(self.feed.batches(0))
        self.task.show_start(self.tracker, first, self.data)
        if self.policy is None and self.config.recipe != "fp32":
            layers = [(name, layer.recipe) for name, layer in fqt.quantized_layers(self.model)]
            bits = {name: [bits] for name, bits in precision.bits_of(layers).items()}
            self.tracker.bits("bits", 0, pictures.heat_map([name for name, _ in layers], [0], bits, last=self.total_steps))

    def show_epoch(self) -> None:
        """What the layers are now, the policy's heat map so far, which kernel serves each layer, and what the model makes."""
        done, bits = self.done, measure.layer_bits(self.model)
        self.tracker.scalars(done.steps, measure.zero_fractions(self.model))
        self.tracker.scalars(done.steps, {name: value for name, value in bits.items() if value != done.bits.get(name)})
        done.bits = bits
        if self.place.main:
            if self.timeline:
                self.tracker.bits("precision/bits", done.steps, self.timeline.image())
                self.tracker.text("summary", str(fqt.summary(self.model)), done.steps)
            with measure.undisturbed():
                self.task.show_epoch(self.tracker, done.steps, self.model, self.data, self.config)

    def make_replica(self, model: nn.Module) -> Step:
        """What trains a copy of a model as this run trains its own: with gradients averaged over the ranks."""
        return self.make_step(model, self.parallel.wrap(model)[0])

    def make_step(
        self,
        model: nn.Module,
        module: nn.Module | None = None,
        policy: fqt.Policy | None = None,
        agree: Callable[[bool], bool] = bool,
    ) -> Step:
        """What trains a model, with an optimizer of its own."""
        optimizer = build_optimizer(self.config.optimizer, model)
        return Step(model, module or model, optimizer, self.config.training, self.task, policy, agree)

    def build_model(self) -> nn.Module:
        """The unconverted model, on the device, with weights as torch's generator draws them."""
        model = self.task.build(self.config, self.data)
        if self.config.distributed.engine != "fsdp2":  # which has no weights of another memory format
            model.to(memory_format=self.task.memory_format(self.config))  # type: ignore[call-overload]
        return model.to(self.place.device)

    def copy(self) -> nn.Module:
        """A whole copy of the model."""

        def build() -> nn.Module:
            with measure.undisturbed():
                model = self.build_model()
                convert(model, self.recipe, self.config, self.task.inputs(self.example))
            return model

        return self.parallel.copy(self.model, build)

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
        self.tracker.scalars(self.done.steps, {"data/unreadable": len(left_out)})
        if self.folder and self.place.main:
            text = "".join(f"{path}\t{why}\n" for path, why in sorted(left_out.items()))
            write_atomically(self.folder / messages.UNREADABLE, lambda file: file.write(text.encode()))
        self.say(messages.unreadable(left_out, self.folder))

    def save(self) -> None:
        """Writes last.pt, and best.pt after an epoch that is the best so far, if checkpoints are on.

        Raises TrainingError where the weights are not finite, which finite gradients can do too: a checkpoint that works stays.
        """
        done = self.done
        folder = self.folder
        if not self.config.checkpoint.enabled or folder is None:
            return
        named = ((name, parallel.own_part(parameter)) for name, parameter in self.model.named_parameters())
        broken = [name for name in self.place.gather(next((n for n, w in named if not w.isfinite().all()), "")) if name]
        if broken:
            reason = f"the weights in {broken[0]} are not finite any more"
            raise TrainingError(messages.diverged(reason, done.steps, self.folder, self.saved_step))
        each = self.place.gather(self.state.own())
        valid = done.history[-1][f"valid_{self.task.metric}"] if done.history and done.position == 0 else None
        goodness = -math.inf if valid is None else self.task.goodness(valid)
        is_best, done.best = goodness > done.best, max(goodness, done.best)
        self.tracker.flush()
        state = self.state.of(each)  # on every rank: each may hold a part
        self.place.from_main(lambda: self.state.write(state, folder, self.saved_step, is_best=is_best))
        self.saved_step, self.saved_at = done.steps, time.monotonic()
