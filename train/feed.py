"""The training samples on their way to the model: which are whose in each step, cut into parts, on the device."""

from collections.abc import Iterator

from torch import Tensor

from train import data, regularize
from train.config import Config
from train.ranks import Ranks
from train.step import Parts
from train.tasks import Task
from train.wording import ConfigError

EXAMPLE = 8
"""Samples at most that tell how a model's layers hang together."""


class Feed:
    """This rank's batches of every epoch. steps: in an epoch. Raises ConfigError where the samples make none."""

    def __init__(self, config: Config, task: Task, samples: data.Data, place: Ranks) -> None:
        self.config, self.task, self.data, self.place = config, task, samples, place
        self.steps = len(self.chunks(0))

    def chunks(self, epoch: int) -> list[list[int]]:
        """Indices of this rank's samples in each step of an epoch."""
        size, world, parts = self.config.data.batch_size, self.place.world, self.config.training.accumulate
        if size % (world * parts):
            raise ConfigError(
                f"data.batch_size = {size}: {world} processes with training.accumulate = {parts} need a multiple of "
                f"{world * parts}."
            )
        count = len(self.data.train)
        chunks = data.chunks(count, size // world, seed=self.config.seed, epoch=epoch, rank=self.place.rank, world=world)
        if not chunks:
            raise ConfigError(f"data.batch_size = {size}: there are {count} {self.task.samples} to train on; lower it.")
        return chunks

    def batches(self, epoch: int, start: int = 0) -> Iterator[Parts]:
        """This rank's batches of an epoch from a step on, cut into parts, on the device."""
        augment = self.data.augmentation(self.config.seed, epoch)
        parts, of = self.config.training.accumulate, self.config.data
        mix = regularize.Mix(of.mixup, of.cutmix, self.data.classes, self.config.seed, self.place.rank)
        for step, batch in enumerate(self.data.train.batches(self.chunks(epoch)[start:], augment, whole=True), start):
            x, y = self.to_device(*(mix(*batch, epoch, step) if of.mixup or of.cutmix else batch))
            yield list(zip(x.chunk(parts), y.chunk(parts), strict=True))

    def example(self) -> Tensor:
        """What a model reads of the first few samples, on the device."""
        batch = next(self.data.train.batches([self.chunks(0)[0][:EXAMPLE]], whole=True))
        return self.to_device(*batch)[0]

    def to_device(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """A batch where, and in the memory format in which, the model wants it."""
        return x.to(self.place.device, memory_format=self.task.memory_format(self.config)), y.to(self.place.device)
