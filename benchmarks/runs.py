"""Training runs by the dozen: each finished one is a line of a log at once, and is not repeated.

A job is a frozen dataclass of plain values; a run returns a row that holds the job's fields beside what came out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.warm import SERVER

Job = TypeVar("Job")
Row = dict[str, Any]


def run_all(jobs: Sequence[Job], run: Callable[[Job], Row], log: Path, workers: int, say: Callable[[Row], str]) -> list[Row]:
    """The rows of `jobs`, from the log where they stand there, else by running them, each in a process of its own.

    Args:
        log: JSON lines.
        workers: processes at a time.
        say: what is printed of a finished run.
    """
    if not jobs:
        return []
    log.parent.mkdir(parents=True, exist_ok=True)
    names = [field.name for field in fields(jobs[0])]  # type: ignore[arg-type]
    kind = type(jobs[0])
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    rows = {kind(**{name: row[name] for name in names}): row for row in done}
    with ProcessPoolExecutor(workers, SERVER) as pool:
        futures = {pool.submit(run, job): job for job in jobs if job not in rows}
        for future in as_completed(futures):
            row = rows[futures[future]] = future.result()
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(say(row), flush=True)
    return [rows[job] for job in jobs]
