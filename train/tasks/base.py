"""Task: what a run trains for. The training loop, the step and the measurements know no more of it than this."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fqt.inspect.trial import feed
from train.config import Config
from train.data import Data
from train.tracking import Tracker


@dataclass(frozen=True)
class Score:
    """How one batch went.

    loss: mean cross-entropy, with its graph. correct: how many items were guessed right, () int64. items: how many there are.
    """

    loss: Tensor
    correct: Tensor
    items: int


class Task(ABC):
    """Data, model, loss and measure of quality.

    items: what loss and quality are means over, and what a second of training is counted in. samples: what a batch is cut from,
    for messages. metric: how good a model is.
    """

    items: ClassVar[str]
    samples: ClassVar[str]
    metric: ClassVar[str] = "accuracy"

    @abstractmethod
    def load(self, config: Config, *, quiet: bool) -> Data:
        """The data, split. Raises ConfigError."""

    @abstractmethod
    def build(self, config: Config, data: Data) -> nn.Module:
        """A freshly initialized model. Raises ConfigError for one that does not fit the data."""

    def inputs(self, x: Tensor) -> tuple[Tensor, ...] | Mapping[str, Tensor]:
        """The arguments of a model for the first tensor of a batch."""
        return (x,)

    def logits(self, module: nn.Module, x: Tensor) -> Tensor:
        """What the model says of a batch, classes last."""
        output: Any = feed(module, self.inputs(x))
        return output if isinstance(output, Tensor) else output.logits  # of transformers' models

    def forward(self, module: nn.Module, x: Tensor, y: Tensor, *, autocast: bool, label_smoothing: float = 0.0) -> Score:
        """The score of a batch. y: classes, or the share of each, (N, K): then the largest is the class."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            logits = self.logits(module, x)
        logits, y = logits.reshape(-1, logits.shape[-1]).float(), y if y.is_floating_point() else y.flatten()
        right = y.argmax(1) if y.is_floating_point() else y
        return Score(cross_entropy(logits, y, label_smoothing=label_smoothing), (logits.argmax(1) == right).sum(), len(y))

    def quality(self, loss: float, correct: float, items: float) -> float:
        """The metric, of a mean loss and of so many right ones among the items; not a number of no item."""
        return correct / items if items else torch.nan

    def goodness(self, quality: float) -> float:
        """The metric so that more is better."""
        return quality

    def shown(self, quality: float) -> str:
        """The metric as a person reads it."""
        return f"{100 * quality:.2f} %"

    def memory_format(self, config: Config) -> torch.memory_format:
        """Of the batches and of the model's weights."""
        return torch.contiguous_format

    def show_start(self, tracker: Tracker, batch: tuple[Tensor, Tensor], data: Data) -> None:
        """Before the first step: what the model learns from."""
        return

    def show_epoch(self, tracker: Tracker, step: int, model: nn.Module, data: Data, config: Config) -> None:
        """After an epoch, on one rank: what the model makes. The model is in its training mode, which it comes back to."""
        return
