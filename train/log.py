"""The files of a run's log: what they are called, how they are read, and how a resumed run cuts them back to its step."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

LINES = "metrics.jsonl"
"""File name, in a run's folder, of the scalars: an object a line."""
DECISIONS = "precision.csv"
"""File name, in a run's folder, of what its precision policy decided."""
SKIPPED = "skipped.jsonl"
"""File name, in a run's folder, of the steps that were skipped, with the indices of their images."""
CONFIG = "config.yaml"
"""File name, in a run's folder, of its whole configuration."""
BITS = "bits.png"
"""File name, in a run's folder, of the heat map of its layers' bits."""
MEASURED = (
    "time",
    "speedup/",
    "memory/",
    "images_per_second",
    "tokens_per_second",
    "texts_per_second",
    "precision/training_speedup",
    "precision/switching_share_measured",
    "precision/model_error",
    "precision/prediction_error",
)
"""How the names of those scalars begin that are measured, so that no two runs have them alike."""


def lines(folder: Path) -> list[dict[str, Any]]:
    """The scalars that a run wrote, an object a line; a line that a crash left half written is not there."""
    text = (folder / LINES).read_text(encoding="utf-8", errors="replace")
    return [json.loads(line) for line in text.splitlines() if _is_kept(line, sys.maxsize, json_step)]


def reproducible_lines(folder: Path) -> list[dict[str, Any]]:
    """The same without what is measured: alike in all runs of one configuration on one machine."""
    plain = [{name: value for name, value in line.items() if not name.startswith(MEASURED)} for line in lines(folder)]
    return [line for line in plain if len(line) > 1]


def cut(path: Path, last: int, step_of: Callable[[str], int]) -> None:
    """Drops the lines of later steps, and what a crash left half written. step_of: raises ValueError for such a line."""
    if not path.exists():
        return
    from fqt.files import write_atomically  # not at import: it loads torch, which who reads a run does without

    written = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    text = "".join(line for line in written if line.endswith("\n") and _is_kept(line, last, step_of))
    write_atomically(path, lambda file: file.write(text.encode()))


def _is_kept(line: str, last: int, step_of: Callable[[str], int]) -> bool:
    try:
        return step_of(line) <= last
    except (ValueError, TypeError, KeyError):
        return False


def json_step(line: str) -> int:
    """The step of a line of JSON. Raises ValueError, TypeError or KeyError where it has none."""
    return int(json.loads(line)["step"])


def csv_step(line: str) -> int:
    """The step of a line of CSV; of its head, one before all others. Raises ValueError where it has none."""
    first = line.split(",")[0]
    return -1 if first == "step" else int(first)  # the head stays
