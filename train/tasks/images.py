"""Images by class."""

import torch
from torch import Tensor, nn

from train import models, pictures
from train.config import Config
from train.data import Data, Images, load
from train.tasks.base import Task
from train.tracking import Tracker


class Classify(Task):
    """Accuracy on images."""

    items = samples = "images"

    def load(self, config: Config, *, quiet: bool) -> Images:
        return load(config.data, quiet=quiet)

    def build(self, config: Config, data: Data) -> nn.Module:
        assert isinstance(data, Images)
        return models.build(config.model.name, data.shape, data.classes)

    def memory_format(self, config: Config) -> torch.memory_format:
        return torch.channels_last if config.training.channels_last else torch.contiguous_format

    def show_start(self, tracker: Tracker, batch: tuple[Tensor, Tensor], data: Data) -> None:
        """Some images as the model gets them."""
        tracker.image("images/train", 0, pictures.grid(batch[0]))
