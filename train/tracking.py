"""What a run leaves to look at: TensorBoard's event file, the same scalars as JSON lines, a precision policy's decisions."""

import csv
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from train.log import BITS, CONFIG, DECISIONS, LINES, SKIPPED, csv_step, cut, json_step


def layout(metric: str) -> dict[str, list[Any]]:
    """TensorBoard's tab of custom scalars: what a person wants to see first."""
    return {
        "speed-up: measured, modelled": ["Multiline", ["speedup/measured", "speedup/modelled"]],
        "time saved, in seconds": ["Multiline", ["speedup/time_saved_s", "speedup/measuring_s"]],
        metric: ["Multiline", [f"{metric}/{part}" for part in ("train", "valid", "test")]],
        "loss": ["Multiline", ["loss/train", "loss/epoch"]],
        "flipped signs of binary weights, share a step": ["Multiline", ["flip_ratio/.*"]],
    }


class Tracker:
    """Writes scalars and texts to a run's folder; without a folder (tracking off, or not rank 0) it does nothing.

    step: optimizer steps done. A resumed run gives its first step, and what an interrupted run had written beyond it
    is dropped from all files, so that no step stands there twice. So is a line that is not whole.

    metric: how good the model is, for the first page of the curves.
    failure: why something could not be written; from then on nothing is.
    """

    def __init__(self, folder: Path | None, *, resumed_at: int | None = None, metric: str = "accuracy") -> None:
        self._writer = self._lines = self._folder = None
        self.failure: OSError | None = None
        if folder is None:
            return
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            if resumed_at is not None:
                for name, step_of in ((LINES, json_step), (SKIPPED, json_step), (DECISIONS, csv_step)):
                    cut(folder / name, resumed_at, step_of)
            _quiet_writer_thread()
            self._writer = SummaryWriter(folder, purge_step=None if resumed_at is None else resumed_at + 1)
            self._writer.add_custom_scalars({"fqt": layout(metric)})
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

    def config(self, text: str) -> None:
        """The run's whole configuration, in YAML."""
        self.text("config", text)
        if self._folder is not None:
            with self._writing():
                (self._folder / CONFIG).write_text(text, encoding="utf-8")

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

    def bits(self, tag: str, step: int, pixels_HWC: np.ndarray) -> None:
        """The heat map of the layers' bits so far, as a file too."""
        self.image(tag, step, pixels_HWC)
        if self._folder is not None:
            with self._writing():
                Image.fromarray(pixels_HWC).save(self._folder / BITS)

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


@cache
def _quiet_writer_thread() -> None:
    """TensorBoard's thread hands what it fails at to the next call; the traceback that Python would print too says no more."""
    told = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if not (isinstance(failed.exc_value, OSError) and "tensorboard" in type(failed.thread).__module__):
            told(failed)

    threading.excepthook = hook
