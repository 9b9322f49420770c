"""What a run leaves to look at: TensorBoard's event file, the same scalars as JSON lines, a precision policy's decisions."""

import csv
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from train import files

LINES = "metrics.jsonl"
"""File name, in a run's folder, of the scalars: an object a line."""
DECISIONS = "precision.csv"
"""File name, in a run's folder, of what its precision policy decided."""
SKIPPED = "skipped.jsonl"
"""File name, in a run's folder, of the steps that were skipped, with the indices of their images."""


LAYOUT = {
    "speed-up: measured, modelled": ["Multiline", ["speedup/measured", "speedup/modelled"]],
    "time saved, in seconds": ["Multiline", ["speedup/time_saved_s", "speedup/measuring_s"]],
    "accuracy": ["Multiline", ["accuracy/train", "accuracy/valid", "accuracy/test"]],
    "loss": ["Multiline", ["loss/train", "loss/epoch"]],
}
"""TensorBoard's tab of custom scalars: what a person wants to see first."""
MEASURED = (
    "time",
    "speedup/",
    "memory/",
    "images_per_second",
    "precision/training_speedup",
    "precision/switching_share_measured",
)
MEASURED += ("precision/model_error", "precision/prediction_error")
"""How the names of those scalars begin that are measured, so that no two runs have them alike."""


def lines(folder: Path) -> list[dict[str, Any]]:
    """The scalars that a run wrote, an object a line; a line that a crash left half written is not there."""
    text = (folder / LINES).read_text(encoding="utf-8", errors="replace")
    return [json.loads(line) for line in text.splitlines() if _kept(line, sys.maxsize, _json_step)]


def reproducible_lines(folder: Path) -> list[dict[str, Any]]:
    """The same without what is measured: alike in all runs of one configuration on one machine."""
    plain = [{name: value for name, value in line.items() if not name.startswith(MEASURED)} for line in lines(folder)]
    return [line for line in plain if len(line) > 1]


class Tracker:
    """Writes scalars and texts to a run's folder; without a folder (tracking off, or not rank 0) it does nothing.

    step: optimizer steps done. A resumed run gives its first step, and what an interrupted run had written beyond it
    is dropped from all files, so that no step stands there twice. So is a line that is not whole.

    failure: why something could not be written; from then on nothing is.
    """

    def __init__(self, folder: Path | None, *, resumed_at: int | None = None) -> None:
        self._writer = self._lines = self._folder = None
        self.failure: OSError | None = None
        if folder is None:
            return
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            if resumed_at is not None:
                for name, step_of in ((LINES, _json_step), (SKIPPED, _json_step), (DECISIONS, _csv_step)):
                    cut(folder / name, resumed_at, step_of)
            _quiet_writer_thread()
            self._writer = SummaryWriter(folder, purge_step=None if resumed_at is None else resumed_at + 1)
            self._writer.add_custom_scalars({"fqt": LAYOUT})
            self._lines = (folder / LINES).open("a", buffering=1)
            self._folder = folder

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point of each curve."""
        if self._writer is None or self._lines is None or not values:
            return
        now = time.time()
        with self._writing():
            self._lines.write(json.dumps({"step": step, "time": round(now, 3), **values}) + "\n")
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step, walltime=now)

    def text(self, tag: str, text: str, step: int | None = None) -> None:
        """A text, shown as it stands."""
        if self._writer is not None:
            with self._writing():
                self._writer.add_text(tag, "\n".join(f"    {line}" for line in text.splitlines()), step)

    def image(self, tag: str, step: int, pixels_HWC: np.ndarray) -> None:
        """A picture, uint8."""
        if self._writer is not None:
            with self._writing():
                self._writer.add_image(tag, pixels_HWC, step, dataformats="HWC")

    def decisions(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """What a precision policy decided, a line each, the first column the step; floats so that they read back exactly."""
        if self._folder is None or not rows:
            return
        with self._writing(), (self._folder / DECISIONS).open("a", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerows(rows)

    def skipped(self, row: Mapping[str, Any]) -> None:
        """A step that left the weights as they were."""
        if self._folder is not None:
            with self._writing(), (self._folder / SKIPPED).open("a") as file:
                file.write(json.dumps(row) + "\n")

    def hparams(self, config: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """The row of this run in TensorBoard's table of runs."""
        if self._writer is not None:
            plain = {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in config.items()}
            with self._writing():
                self._writer.add_hparams(plain, {f"hparam/{name}": value for name, value in metrics.items()}, run_name=".")

    def flush(self) -> None:
        """Has all that was written on the disk, as a checkpoint that counts on it needs."""
        if self._writer is not None and self._lines is not None:
            with self._writing():
                self._writer.flush()
                os.fsync(self._lines.fileno())

    def close(self) -> None:
        """Writes out what is buffered."""
        writer, lines, self._writer, self._lines, self._folder = self._writer, self._lines, None, None, None
        for file in (writer, lines):
            if file is not None:
                with self._writing():
                    file.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Keeps the first failure for whoever can end the run on all ranks, and writes nothing after it."""
        try:
            yield
        except OSError as error:
            if self.failure is None:
                self.failure = error
            self.close()


def cut(path: Path, last: int, step_of: Callable[[str], int]) -> None:
    """Drops the lines of later steps, and what a crash left half written. step_of: raises ValueError for such a line."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    text = "".join(line for line in lines if line.endswith("\n") and _kept(line, last, step_of))
    files.write_atomically(path, lambda file: file.write(text.encode()))


def _kept(line: str, last: int, step_of: Callable[[str], int]) -> bool:
    try:
        return step_of(line) <= last
    except (ValueError, TypeError, KeyError):
        return False


def _json_step(line: str) -> int:
    return int(json.loads(line)["step"])


def _csv_step(line: str) -> int:
    first = line.split(",")[0]
    return -1 if first == "step" else int(first)  # the head stays


@cache
def _quiet_writer_thread() -> None:
    """TensorBoard's thread hands what it fails at to the next call; the traceback that Python would print too says no more."""
    told = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if not (isinstance(failed.exc_value, OSError) and "tensorboard" in type(failed.thread).__module__):
            told(failed)

    threading.excepthook = hook
