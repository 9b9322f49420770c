"""What a run leaves to look at: TensorBoard's event file, the same scalars as JSON lines, a precision policy's decisions."""

import csv
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

DECISIONS = "precision.csv"
"""File name, in a run's folder, of what its precision policy decided."""


class Tracker:
    """Writes scalars and texts to a run's folder; without a folder (tracking off, or not rank 0) it does nothing.

    step: optimizer steps done. A resumed run gives its first step, and what an interrupted run had written beyond it
    is dropped from both files, so that no step stands there twice.
    """

    def __init__(self, folder: Path | None, *, resumed_at: int | None = None) -> None:
        self._writer = self._lines = self._folder = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, lines, decisions = folder, folder / "metrics.jsonl", folder / DECISIONS
        if resumed_at is not None and lines.exists():
            kept = [line for line in lines.read_text().splitlines() if json.loads(line)["step"] <= resumed_at]
            lines.write_text("".join(f"{line}\n" for line in kept))
        if resumed_at is not None and decisions.exists():
            head, *rows = decisions.read_text().splitlines(keepends=True)
            decisions.write_text("".join([head, *(row for row in rows if int(row.split(",")[0]) <= resumed_at)]))
        self._writer = SummaryWriter(folder, purge_step=None if resumed_at is None else resumed_at + 1)
        self._lines = lines.open("a", buffering=1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point of each curve."""
        if self._writer is None or self._lines is None or not values:
            return
        now = time.time()
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step, walltime=now)
        self._lines.write(json.dumps({"step": step, "time": round(now, 3), **values}) + "\n")

    def text(self, tag: str, text: str, step: int | None = None) -> None:
        """A text, shown as it stands."""
        if self._writer is not None:
            self._writer.add_text(tag, "\n".join(f"    {line}" for line in text.splitlines()), step)

    def image(self, tag: str, step: int, pixels_HWC: np.ndarray) -> None:
        """A picture, uint8."""
        if self._writer is not None:
            self._writer.add_image(tag, pixels_HWC, step, dataformats="HWC")

    def decisions(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """What a precision policy decided, a line each, the first column the step; floats so that they read back exactly."""
        if self._folder is None or not rows:
            return
        path = self._folder / DECISIONS
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(rows)

    def hparams(self, config: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """The row of this run in TensorBoard's table of runs."""
        if self._writer is not None:
            plain = {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in config.items()}
            self._writer.add_hparams(plain, {f"hparam/{name}": value for name, value in metrics.items()}, run_name=".")

    def close(self) -> None:
        """Writes out what is buffered."""
        if self._writer is not None and self._lines is not None:
            self._writer.close()
            self._lines.close()
