"""What every benchmark shares: where it ran, its table, its JSON."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path

import torch

from fqt.inspect.doctor import processor


def where() -> dict[str, object]:
    """The machine and the code that a row of results belongs to."""
    command = ["git", "describe", "--always", "--dirty"]
    git = shutil.which("git")  # a machine that only measures may have none
    here = Path(__file__).parent
    commit = subprocess.run(command, capture_output=True, text=True, cwd=here).stdout.strip() if git else ""
    return {
        "date": date.today().isoformat(),
        "commit": commit or "unknown",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
    }


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(head), *lines]) for i in range(len(head))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in [list(head), rule, *lines]
    )


def write_json(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write {"where": ..., "rows": [...]}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"where": where(), "rows": list(rows)}, indent=1) + "\n")
