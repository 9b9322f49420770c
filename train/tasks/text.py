"""Texts: the next token of one, or one by class."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from train import pretrained, text
from train.catalogue import DECODERS
from train.config import Config
from train.data import Data
from train.decoders import Decoder
from train.tasks.base import Task
from train.tracking import Tracker
from train.wording import ConfigError

SAMPLE = 256
"""Tokens that a language model writes at the end of an epoch, behind a prompt from the test set."""
MISFITS = (RuntimeError, ValueError, IndexError, AssertionError, AttributeError, TypeError)
"""What a model raises that does not take a batch."""


class _Text(Task):
    """What both tasks of texts share."""

    def build(self, config: Config, data: Data) -> nn.Module:
        assert isinstance(data, text.Texts)
        wanted = config.model
        if wanted.name in DECODERS:
            sizes = {"blocks": wanted.blocks, "width": wanted.width, "heads": wanted.heads}
            llama = wanted.name == "llama_small"
            model = Decoder(data.tokens.size, data.classes, data.length, **sizes, llama=llama)
        else:
            _, _, name = wanted.name.partition(":")
            sizes = {"tokens": data.tokens.size, "classes": data.classes}
            model = pretrained.build(name, wanted.options, task=config.task, **sizes)
        self._try(model, config, data)
        return model

    def _try(self, model: nn.Module, config: Config, data: text.Texts) -> None:
        """A forward of two texts of full length: a model that is unfit for them says so before the training."""
        x_NT = torch.zeros(2, data.length, dtype=torch.int64)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                logits = self.logits(model, x_NT)
        except MISFITS as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f'model.name = "{config.model.name}": it does not take texts of data.length = {data.length} tokens ({reason}); '
                "lower that, or choose another."
            ) from error
        if logits.shape[-1] < data.classes or logits.shape[0] != 2:
            raise ConfigError(
                f'model.name = "{config.model.name}": for two texts it returns {tuple(logits.shape)}, with {data.classes} '
                "classes; choose another."
            )


class LanguageModel(_Text):
    """Perplexity: exp of the mean cross-entropy of the next token, in nats."""

    items, samples, metric = "tokens", "stretches of text", "perplexity"

    def load(self, config: Config, *, quiet: bool) -> text.Texts:
        return text.load_text(config.data, _tokenizer(config))

    def quality(self, loss: float, correct: float, items: float) -> float:
        return math.exp(min(loss, 700.0)) if items else math.nan

    def goodness(self, quality: float) -> float:
        return -quality

    def shown(self, quality: float) -> str:
        return f"{quality:.4g}"

    def show_start(self, tracker: Tracker, batch: tuple[Tensor, Tensor], data: Data) -> None:
        """A stretch that is trained on."""
        assert isinstance(data, text.Texts)
        tracker.text("text/train", data.tokens.decode(batch[0][0].cpu()), 0)

    def show_epoch(self, tracker: Tracker, step: int, model: nn.Module, data: Data, config: Config) -> None:
        """What the model writes behind the first tokens of the test set."""
        assert isinstance(data, text.Texts)
        (prompt_1T, _), *_ = data.test.batches([[0]])
        device = next(model.parameters()).device
        written = generate(self, model, prompt_1T[:, : data.length // 2].to(device), SAMPLE, data, config.seed)
        tracker.text("text/generated", data.tokens.decode(written[0].cpu()), step)


class ClassifyText(_Text):
    """Accuracy on texts."""

    items = samples = "texts"

    def load(self, config: Config, *, quiet: bool) -> text.Texts:
        return text.load_labelled(config.data, _tokenizer(config))

    def inputs(self, x: Tensor) -> Mapping[str, Tensor]:
        return {"input_ids": x.clamp(min=0), "attention_mask": (x != text.PADDING).long()}

    def show_start(self, tracker: Tracker, batch: tuple[Tensor, Tensor], data: Data) -> None:
        """A text that is trained on."""
        assert isinstance(data, text.Texts)
        tokens = batch[0][0].cpu()
        tracker.text("text/train", data.tokens.decode(tokens[tokens != text.PADDING]), 0)


@torch.no_grad()
def generate(task: Task, model: nn.Module, x_NT: Tensor, count: int, data: text.Texts, seed: int) -> Tensor:
    """So many tokens drawn behind a prompt, (N, T + count); the model sees the last `data.length`. In evaluation mode."""
    draws, training = torch.Generator().manual_seed(seed), model.training
    model.eval()
    for _ in range(count):
        shares_NK = task.logits(model, x_NT[:, -data.length :])[:, -1, : data.classes].float().softmax(1)
        x_NT = torch.cat([x_NT, torch.multinomial(shares_NK.cpu(), 1, generator=draws).to(x_NT.device)], 1)
    model.train(training)
    return x_NT


def _tokenizer(config: Config) -> str:
    """What data.tokenizer means, with the model's own file in place of "model"."""
    if config.data.tokenizer != "model":
        return config.data.tokenizer
    return pretrained.tokenizer_file(config.model.name.partition(":")[2])
