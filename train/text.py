"""Texts as tokens: read, split, cut into what a model reads at once.

A language model's text is cut into stretches of `data.length` tokens, one behind the other; each token's label is the next
one. A text with a label keeps its first `data.length` tokens, and a batch is as long as its longest: PADDING fills the rest.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from train.data import Augment, Batch, Data, split
from train.sections import Data as DataConfig
from train.wording import ConfigError

PADDING = -1
"""What stands behind the end of a text in a batch."""
TEST_SHARE = 10
"""One part in so many of a text, or of the labelled texts, is the test set."""


class Tokens(Protocol):
    """How a text becomes numbers from 0 to size - 1. described: what decides that, for a checkpoint to compare."""

    size: int
    described: str

    def encode(self, text: str) -> Tensor:
        """The text's tokens, (T,) int64."""
        ...

    def decode(self, tokens_T: Tensor) -> str:
        """A text of these tokens."""
        ...


class Characters:
    """Each character of a text is a token; their numbers are in the order of Unicode."""

    def __init__(self, text: str) -> None:
        self.described = "".join(sorted(set(text)))
        self.size = len(self.described)
        self._number = {character: number for number, character in enumerate(self.described)}

    def encode(self, text: str) -> Tensor:
        return torch.tensor([self._number[character] for character in text], dtype=torch.int64)

    def decode(self, tokens_T: Tensor) -> str:
        return "".join(self.described[number] for number in tokens_T.tolist())


class Bytes:
    """Each byte of a text in UTF-8 is a token."""

    size, described = 256, "bytes"

    def encode(self, text: str) -> Tensor:
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long() if text else torch.zeros(0).long()

    def decode(self, tokens_T: Tensor) -> str:
        return bytes(tokens_T.tolist()).decode(errors="replace")


class Pieces:
    """The tokens of a file of the package tokenizers. Raises ConfigError where it is none."""

    def __init__(self, path: str) -> None:
        from tokenizers import Tokenizer  # the configuration has made sure that it is installed

        try:
            self._tokenizer = Tokenizer.from_file(path)
        except Exception as error:  # noqa: BLE001 (the package raises nothing more special)
            why = " ".join(str(error).split())
            raise ConfigError(f"data.tokenizer = {path}: it is no file of the package tokenizers ({why}).") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.size = self._tokenizer.get_vocab_size()
        self.described = f"sha256 {hashlib.sha256(Path(path).read_bytes()).hexdigest()}"

    def encode(self, text: str) -> Tensor:
        return torch.tensor(self._tokenizer.encode(text).ids, dtype=torch.int64)

    def decode(self, tokens_T: Tensor) -> str:
        return self._tokenizer.decode(tokens_T.tolist())


@dataclass(frozen=True)
class Texts(Data):
    """Texts. tokens: what made them numbers. length: the most tokens of a sample."""

    tokens: Tokens
    length: int


@dataclass(frozen=True)
class Stretches:
    """Pieces of one long text, that begin at `starts`."""

    tokens_T: Tensor
    starts: Tensor
    length: int

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, indices: Sequence[int]) -> "Stretches":
        return Stretches(self.tokens_T, self.starts[torch.as_tensor(indices)], self.length)

    def batches(self, chunks: Sequence[list[int]], augment: Augment | None = None, *, whole: bool = False) -> Iterator[Batch]:
        for chunk in chunks:
            places_NT = self.starts[torch.as_tensor(chunk)].unsqueeze(1) + torch.arange(self.length)
            yield self.tokens_T[places_NT], self.tokens_T[places_NT + 1]


@dataclass(frozen=True)
class Labelled:
    """Texts with a label each."""

    texts: Sequence[Tensor]
    y_N: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> "Labelled":
        return Labelled([self.texts[index] for index in indices], self.y_N[torch.as_tensor(indices)])

    def batches(self, chunks: Sequence[list[int]], augment: Augment | None = None, *, whole: bool = False) -> Iterator[Batch]:
        for chunk in chunks:
            x_NT = pad_sequence([self.texts[index] for index in chunk], batch_first=True, padding_value=PADDING)
            yield x_NT, self.y_N[torch.as_tensor(chunk)]


def load_text(config: DataConfig, tokenizer: str) -> Texts:
    """The text of `text:<path>`, its first nine tenths in stretches to train on. Raises ConfigError.

    tokenizer: "characters", "bytes" or a path.
    """
    root = Path(config.name.partition(":")[2])
    files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    if not files:
        raise ConfigError(f'data.name = "{config.name}": there is no text there; give a file, or a folder of text files.')
    text = "".join(_read(path) for path in files)
    tokens = _tokens(tokenizer, text)
    tokens_T = tokens.encode(text)
    ends = len(tokens_T) - len(tokens_T) // TEST_SHARE
    train, test = (_stretches(part, config.length) for part in (tokens_T[:ends], tokens_T[ends:]))
    if not len(train) or not len(test):
        raise ConfigError(
            f"data.length = {config.length}: the text of {config.name} has {len(tokens_T)} tokens, of which the last tenth is "
            f"for the test; it needs more than {TEST_SHARE * (config.length + 1)}. Lower data.length, or give more text."
        )
    held_out, kept = split(len(train), config, "stretches of text")
    return Texts(
        train.take(kept),
        train.take(held_out) if held_out else None,
        test,
        tokens.size,
        tokens,
        config.length,
        vocabulary=tokens.described,
    )


def load_labelled(config: DataConfig, tokenizer: str) -> Texts:
    """The texts of `tsv:<file>`. Raises ConfigError with the line that is not a text, a tabulator and a label."""
    path = Path(config.name.partition(":")[2])
    rows: list[tuple[str, str]] = []
    for number, line in enumerate(_read(path).rstrip("\n").split("\n"), 1):
        text, tab, label = line.rpartition("\t")
        if not tab or not text.strip() or not label.strip():
            raise ConfigError(f"{path}, line {number}: it should be a text, a tabulator and a label; it is {line[:60]!r}.")
        rows.append((text, label.strip()))
    labels = sorted({label for _, label in rows})
    if len(labels) < 2 or len(rows) < 2 * TEST_SHARE:
        raise ConfigError(
            f"{path} has {len(rows)} texts of {len(labels)} labels; {2 * TEST_SHARE} texts of two labels are the least."
        )
    tokens = _tokens(tokenizer, "".join(text for text, _ in rows))
    texts = [tokens.encode(text)[: config.length] for text, _ in rows]
    if empty := [number for number, text in enumerate(texts, 1) if not len(text)]:
        raise ConfigError(f"{path}, line {empty[0]}: data.tokenizer = {config.tokenizer} makes no token of it; remove it.")
    every = Labelled(texts, torch.tensor([labels.index(label) for _, label in rows]))
    order = range(len(rows))
    train, test = (every.take([index for index in order if (index % TEST_SHARE == 0) == in_test]) for in_test in (False, True))
    held_out, kept = split(len(train), config, "texts")
    vocabulary = "\n".join([tokens.described, *labels])
    valid = train.take(held_out) if held_out else None
    return Texts(train.take(kept), valid, test, len(labels), tokens, config.length, vocabulary=vocabulary)


def _stretches(tokens_T: Tensor, length: int) -> Stretches:
    return Stretches(tokens_T, torch.arange(0, max(len(tokens_T) - length, 0), length), length)


def _tokens(tokenizer: str, text: str) -> Tokens:
    if tokenizer == "characters":
        return Characters(text)
    return Bytes() if tokenizer == "bytes" else Pieces(tokenizer)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}): convert or remove it.") from None
    except OSError as error:
        raise ConfigError(f"{os.fspath(path)} cannot be read ({error.strerror}): give a text file.") from None
