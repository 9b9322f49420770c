"""What a run leaves to look at: TensorBoard's event file and, beside it, the same scalars as JSON lines."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class Tracker:
    """Writes scalars and texts to a run's folder; without a folder (tracking off, or not rank 0) it does nothing.

    step: optimizer steps done. A resumed run gives its first step, and what an interrupted run had written beyond it
    is dropped from both files, so that no step stands there twice.
    """

    def __init__(self, folder: Path | None, *, resumed_at: int | None = None) -> None:
        self._writer = self._lines = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        lines = folder / "metrics.jsonl"
        if resumed_at is not None and lines.exists():
            kept = [line for line in lines.read_text().splitlines() if json.loads(line)["step"] <= resumed_at]
            lines.write_text("".join(f"{line}\n" for line in kept))
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

    def text(self, tag: str, text: str) -> None:
        """A text, shown as it stands."""
        if self._writer is not None:
            self._writer.add_text(tag, "\n".join(f"    {line}" for line in text.splitlines()))

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
