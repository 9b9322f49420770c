"""One part of `gpu_check`, in a process of its own: python -m benchmarks.gpu_part PART FILE [--dry-run]

A part is a list of named tasks. Before a task a line says that it began, each of its figures is a line as it comes, and a line
says that it ended, why it failed included. What FILE says to have ended is not done again, so that a part that was killed goes
on where it was. Exit status 3: the device answers no more, as after an illegal access; whoever started this starts it anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import gpu_machine, gpu_parts, gpu_proofs, gpu_steps, gpu_tiles
from benchmarks.gpu_machine import Machine
from benchmarks.gpu_parts import Row, Task

TASKS: dict[str, Callable[[Machine], Iterator[Task]]] = {
    "smoke": gpu_proofs.smoke,
    "products": gpu_parts.products,
    "quantize": gpu_parts.quantizers,
    "steps": gpu_steps.steps,
    "tiles": gpu_tiles.tiles,
    "sanitize": gpu_proofs.sanitize,
    "fuzz": gpu_proofs.fuzz,
    "layers": gpu_parts.layers,
}
"""Part -> its tasks, in order of worth."""
LOST = 3


def rows_of(path: Path) -> list[Row]:
    """The lines of a file of results; a last line that was not written whole is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def append(path: Path, row: Row) -> None:
    """Add a line, which is in the file when this returns: a process that is killed afterwards loses nothing."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def work(part: str, tasks: Iterator[Task], path: Path, alive: Callable[[], object]) -> int:
    """Do the tasks that have not ended; return the exit status. alive: raises when the device answers no more."""
    ended = {row["task"] for row in rows_of(path) if row["part"] == part and "ended" in row}
    for name, task in tasks:
        if name in ended:
            continue
        here: Row = {"part": part, "task": name}
        append(path, here | {"begun": True})
        failed: Row = {}
        try:
            for row in task():
                append(path, here | row)
                print(here | row, file=sys.stderr, flush=True)
        except Exception as error:  # noqa: BLE001  a task that fails is a finding, and the others go on
            failed = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        append(path, here | {"ended": True} | failed)
        if failed:
            try:
                alive()
            except Exception:  # noqa: BLE001  whatever it says, this process has lost its device
                return LOST
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=TASKS)
    parser.add_argument("file", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    machine = gpu_machine.dry() if args.dry_run else gpu_machine.gpu()
    torch.manual_seed(0)
    alive = (lambda: None) if args.dry_run else torch.cuda.synchronize
    here = {"name": machine.name, "capability": machine.capability, "torch": torch.__version__, "dry": args.dry_run}
    append(args.file, {"part": args.part, **here})
    sys.exit(work(args.part, TASKS[args.part](machine), args.file, alive))


if __name__ == "__main__":
    main()
