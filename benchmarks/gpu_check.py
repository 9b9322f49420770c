"""What do the kernels reach on this GPU? Compares each with the reference, times it, and loses nothing that was found.

    make gpu-check        (= python -m benchmarks.gpu_check [--parts smoke,products,...] [--json F.jsonl] [--dry-run] [--again])

For a bare machine: torch, Triton, the source tree, no network. Each part is a process of its own with a time limit; one that
hangs in a task, or whose device is lost, is killed and started anew with the next task. Every figure is appended to F as it
comes. Run again with the same F, parts that are done are left out, and one whose time was over goes on where it was. What is
not installed is said. Exit status 2: no CUDA device; 1: a wrong result or a failure.

    smoke      every kernel at the tile that serves large operands, against the reference
    products   size^3 in a CUDA graph, beside torch's bf16, _int_mm and _scaled_mm
    quantize   (bytes of x read once + bytes of codes) / time, over the bandwidth of x.copy_
    steps      forward and backward of models, compiled and captured in a CUDA graph, against bf16 autocast alike
    tiles      every tile of some products; `python -m benchmarks.gpu_tiles F` makes the rule pick the fastest
    sanitize   compute-sanitizer and ncu, where they are installed
    fuzz       random cases, then pytest -m gpu
    layers     convolutions against cuDNN's bf16 in channels_last; only where it is named

`--dry-run` walks all of it without a GPU, on small operands, with Triton's interpreter and the emulator of the CUDA kernels.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu_part import LOST, append, rows_of
from benchmarks.gpu_parts import Row
from benchmarks.gpu_show import show

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Limit:
    """Seconds of a part, and how many of them one task may take to say something."""

    seconds: float
    silent: float


LIMITS = {
    "smoke": Limit(60, 30), "products": Limit(115, 40), "quantize": Limit(25, 20), "steps": Limit(170, 110),
    "tiles": Limit(80, 40), "sanitize": Limit(50, 50), "fuzz": Limit(40, 40), "layers": Limit(60, 40),
}  # fmt: skip
"""By part, in order of worth: nine minutes without `layers`."""


def finish(part: str, command: list[str], path: Path, limit: Limit) -> None:
    """Run a part's process until its tasks are done or its time is over, anew after each that hung or lost its device."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if "--dry-run" in command:  # the interpreter takes its time
        environment["TRITON_INTERPRET"] = "1"
        limit = Limit(10 * limit.seconds, 10 * limit.silent)
    deadline = time.monotonic() + limit.seconds
    while True:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        said, why = _watched(process, path, limit.silent, deadline)
        if why == "time":
            append(path, {"part": part, "stopped": f"{limit.seconds:.0f} s are over; run it again to go on"})
            return
        if why == "" and process.returncode == 0:
            append(path, {"part": part, "done": True})
            return
        task, reason = running(rows_of(path), part), why or f"exit status {process.returncode}"
        if task is not None:
            append(path, {"part": part, "task": task, "ended": True, "failed": reason})
        elif process.returncode != LOST or not said:  # it fails before, or after, all tasks
            append(path, {"part": part, "name": part, "failed": reason})
            return


def _watched(process: subprocess.Popen, path: Path, silent: float, deadline: float) -> tuple[bool, str]:
    """Wait; kill it with all that it started when it says nothing for `silent` seconds, or at the deadline. Return whether it
    said anything, and why it was killed: "", "time", or in words."""
    size = before = path.stat().st_size if path.exists() else 0
    spoke = time.monotonic()
    while process.poll() is None:
        time.sleep(0.05)
        now, at = path.stat().st_size if path.exists() else 0, time.monotonic()
        spoke, size = (at, now) if now != size else (spoke, size)
        why = "time" if at > deadline else f"hung: killed after {silent:.0f} s" if at - spoke > silent else ""
        if why:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return size != before, why
    return (path.stat().st_size if path.exists() else 0) != before, ""


def running(rows: list[Row], part: str) -> str | None:
    """The task that began and has not ended."""
    task = None
    for row in rows:
        if row["part"] == part and "begun" in row:
            task = str(row["task"])
        elif row["part"] == part and "ended" in row and row["task"] == task:
            task = None
    return task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(part for part in LIMITS if part != "layers"))
    parser.add_argument("--json", type=Path, help="append the rows here, a line each, and go on where it ends")
    parser.add_argument("--again", action="store_true", help="begin FILE anew")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU, on small operands")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if unknown := [part for part in parts if part not in LIMITS]:
        parser.error(f"unknown part {unknown[0]!r}; known: {', '.join(LIMITS)}")
    if not args.dry_run and not torch.cuda.is_available():
        print("no CUDA device: nothing to time. --dry-run walks the same code without one.")
        sys.exit(2)
    with tempfile.TemporaryDirectory() as folder:
        path = (args.json or Path(folder) / "rows.jsonl").absolute()
        if args.again:
            path.unlink(missing_ok=True)
        done = {row["part"] for row in rows_of(path) if "done" in row}
        for part in parts:
            if part not in done:
                command = [sys.executable, "-m", "benchmarks.gpu_part", part, str(path)] + ["--dry-run"] * args.dry_run
                finish(part, command, path, LIMITS[part])
        rows = rows_of(path)
    print(show(rows))
    sys.exit(any("wrong" in row or "failed" in row for row in rows))


if __name__ == "__main__":
    main()
