"""All that decides the future of a run, as a checkpoint holds it; and how a run takes it up again."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

import fqt
from train import checkpoint, files, messages, parallel
from train.config import Config
from train.data import Data
from train.precision import Timeline
from train.ranks import Ranks
from train.tasks import Task
from train.wording import ConfigError, TrainingError

PLAIN = (
    "epoch", "position", "steps", "seconds", "skipped", "streak", "best", "time_saved", "measuring", "bits", "history",
)  # fmt: skip
"""What is the same on every rank."""


@dataclass
class Progress:
    """How far a run is.

    epoch, position: whole epochs done, and steps of the next one; steps: all of them. seconds: spent in the epoch so far.
    skipped, streak: steps that left the weights as they were, all of them and those in a row. best: the best metric on
    held-out samples, so that more is better. time_saved: seconds that the steps so far took less than those of the unconverted
    model; measuring: seconds that timing it took. bits: of each layer's products, as logged last. history: a row an epoch.
    epoch_sums, recent_sums: this rank's, of the epoch and since the last point of the step curves.
    """

    epoch: int = 0
    position: int = 0
    steps: int = 0
    seconds: float = 0.0
    skipped: int = 0
    streak: int = 0
    best: float = -math.inf
    time_saved: float = 0.0
    measuring: float = 0.0
    bits: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    epoch_sums: Counter[str] = field(default_factory=Counter)
    recent_sums: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class RunState:
    """The parts of a run that have a state."""

    config: Config
    recipe: fqt.Recipe
    task: Task
    data: Data
    place: Ranks
    model: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler
    policy: fqt.Policy | None
    timeline: Timeline | None
    progress: Progress
    parallel: parallel.Parallel
    ema: AveragedModel | None

    def own(self) -> dict[str, Any]:
        """What is each rank's own."""
        sums = {name: dict(getattr(self.progress, name)) for name in checkpoint.SUMS}
        return {"generators": checkpoint.generators(), "parallel": self.parallel.state(), **sums}

    def of(self, each: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What a checkpoint holds. each: what every rank has of its own."""
        state = {
            "config": self.config.model_dump(mode="json"),
            "recipe": checkpoint.described(self.recipe),
            "samples": len(self.data.train),
            "vocabulary": self.data.vocabulary,
            "world": self.place.world,
            **{name: getattr(self.progress, name) for name in PLAIN},
            "model": parallel.whole(self.model.state_dict()),
            "optimizer": parallel.whole(self.optimizer.state_dict()),
            "schedule": self.schedule.state_dict(),
            "ranks": list(each),
        }
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        if self.policy and self.timeline:
            state["precision"] = {"policy": self.policy.state_dict(), "timeline": self.timeline.points}
        return state

    def write(self, state: dict[str, Any], folder: Path, previous: int | None, *, is_best: bool) -> None:
        """Writes last.pt and, if it is the best, best.pt. previous: the step of the checkpoint there. Raises TrainingError."""
        try:
            checkpoint.save_last(folder, state, keep=self.config.checkpoint.keep, previous=previous)
            if is_best:
                checkpoint.save(folder / checkpoint.BEST, state)
        except OSError as error:
            what = f"A checkpoint could not be written to {folder} ({files.reason(error)})"
            raise TrainingError(messages.broken_off(what, folder, previous)) from None

    def restore(self, state: dict[str, Any], path: Path, steps_per_epoch: int) -> None:
        """Continues where a checkpoint was written. Raises ConfigError where it does not fit this run."""
        then, now = state.get("samples"), len(self.data.train)
        if then != now:
            what = self.task.samples
            raise ConfigError(
                f"{path} was written by a run on {then} training {what}, and there are {now} now: "
                f"their order would be another. Bring the {what} back, or set model.weights to that file to start a new run."
            )
        expected = self.of([self.own()] * self.place.world)
        shapes = [parameter.shape for group in self.optimizer.param_groups for parameter in group["params"]]
        checkpoint.check_fit(state, expected, shapes, messages.row_keys(self.task), path)
        steps = state["epoch"] * steps_per_epoch + state["position"]
        if not state["steps"] == state["schedule"]["last_epoch"] == steps or len(state["history"]) != state["epoch"]:
            raise ConfigError(
                f"{path} contradicts itself: its steps, epochs, schedule and history are of different lengths. Give another."
            )
        try:
            own = state["ranks"][self.place.rank]
            self.model.load_state_dict(parallel.spread_model(state["model"], self.model))
            self.optimizer.load_state_dict(parallel.spread_optimizer(state["optimizer"], self.optimizer))
            self.parallel.load_state(own["parallel"])
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
            self.schedule.load_state_dict(state["schedule"])
            for name in PLAIN:
                setattr(self.progress, name, state[name])
            for name in checkpoint.SUMS:
                setattr(self.progress, name, Counter(own[name]))
            if self.policy and self.timeline:
                self.policy.load_state_dict(state["precision"]["policy"])
                self.timeline.points = [tuple(point) for point in state["precision"]["timeline"]]
            checkpoint.restore_generators(own["generators"])
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ConfigError(
                f"{path} does not fit this run ({' '.join(str(error).split())}): its model or its optimizer is another. Resume "
                "with what wrote it, or set model.weights to that file to start a new run from its weights."
            ) from None
