"""Does a long run grow? Memory, open files and threads of the training program over its steps.

    python -m benchmarks.leaks [--steps 2000] [--recipes fp32 int8 fqt_1bit adapt] [--json F] [--quick]

Each recipe trains with everything on that writes or looks: curves, observed gradients, monitors, checkpoints, the unconverted
model timed again. From the end of the first quarter to the end of the run files and threads may not grow at all, and memory by
less than 2 %.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import table, write_json
from benchmarks.kill_drill import RECIPES
from train import config, loop

STEPS_AN_EPOCH = 25
KEYS = ["name=run", "model.name=mlp_small", "data.name=digits", f"data.limit={32 * STEPS_AN_EPOCH}", "data.batch_size=32"]
KEYS += ["tracking.every=2", "tracking.variance_every=10", "tracking.monitor_every=10", "tracking.baseline_steps=1"]
KEYS += ["tracking.baseline_every=50", "checkpoint.every_steps=10", "device=cpu", "quiet=true", "optimizer.lr=0.0001"]
GROWTH = 0.02


def used() -> dict[str, float]:
    """Of this process: resident memory in MiB, open files, threads."""
    process = psutil.Process()
    return {"mib": process.memory_info().rss / 2**20, "files": process.num_fds(), "threads": process.num_threads()}


def watch(recipe: str, steps: int) -> dict[str, Any]:
    """A row: what was used after each quarter of the run."""
    epochs = max(4, steps // STEPS_AN_EPOCH)
    seen: list[dict[str, float]] = []
    train_epoch = loop.Trainer.train_epoch

    def watched(trainer: loop.Trainer, epoch: int) -> None:
        train_epoch(trainer, epoch)
        if (epoch + 1) % (epochs // 4) == 0:
            seen.append(used())

    loop.Trainer.train_epoch = watched  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            keys = [*KEYS, *RECIPES[recipe], f"output={folder}", f"training.epochs={epochs}"]
            loop.run(config.load("fp32", keys))
    finally:
        loop.Trainer.train_epoch = train_epoch  # type: ignore[method-assign]
    first, last = seen[0], seen[-1]
    still = last["files"] <= first["files"] and last["threads"] <= first["threads"]
    row: dict[str, Any] = {"recipe": recipe, "steps": epochs * STEPS_AN_EPOCH}
    row |= {f"{name} at {quarter}/4": round(at[name], 1) for name in first for quarter, at in enumerate(seen[:4], 1)}
    return {**row, "still": still and last["mib"] <= first["mib"] * (1 + GROWTH)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--quick", action="store_true", help="100 steps, of which the first allocate: memory is not judged")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    rows = [watch(recipe, 100 if args.quick else args.steps) for recipe in args.recipes]
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    if args.json:
        write_json(args.json, rows)
    if not args.quick and not all(row["still"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
