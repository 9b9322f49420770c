"""Does a run that is killed again and again end like one that was left alone?

    python -m benchmarks.kill_drill [--kills 30] [--recipes ...] [--worlds 1 2] [--seed 0] [--json F] [--quick]

Each run is killed with SIGKILL and started again with `--resume auto`: while it starts, after a random number of steps, or as
soon as it is seen to write a checkpoint; of two gloo ranks all of them, or one, after which the other has to end by itself. At
the end the weights, the optimizer, the schedule, the random generators, the precision policy, the history and the log are
compared bit for bit with those of a run that was never killed (times and what is computed from them excepted).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks import warm
from benchmarks.common import table, write_json
from train import checkpoint, log

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "train" / "main.py"
STEPS_AN_EPOCH, EVERY = 8, 3
RECIPES = {
    "fp32": ["recipe=fp32"],
    "int8": ["recipe=int8"],
    "fqt_1bit": ["recipe=fqt_1bit"],
    "adapt": [
        "recipe=adapt_calibrated",
        "precision.policy=adapt",
        "precision.lookback=[2, 4]",
        "precision.resolution=[20, 60]",
    ],
}
KEYS = ["name=run", "data.name=digits", f"data.limit={64 * STEPS_AN_EPOCH}", "data.batch_size=64", "data.augment=crop_flip"]
KEYS += [
    "data.validation=0.1",
    "training.accumulate=2",
    "tracking.every=2",
    "tracking.variance_every=5",
    "tracking.baseline_steps=0",
]
KEYS += ["model.name=vgg_small", f"checkpoint.every_steps={EVERY}", "device=cpu", "quiet=true"]
WAIT = 600.0
"""Seconds after which a process that does nothing is a failure of the drill; a busy machine may take minutes to start one."""


class Run:
    """The processes of one start of the training program."""

    def __init__(self, output: Path, recipe: str, world: int, epochs: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        keys = [*KEYS, *RECIPES[recipe], f"output={output}", f"training.epochs={epochs}"]
        arguments = ["--config", "fp32", "--resume", "auto", *(word for key in keys for word in ("--set", key))]
        output.mkdir(exist_ok=True)
        self.processes = []
        for rank in range(world):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)} if world > 1 else {}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            said = output / f"rank{rank}.txt"
            self.processes.append(
                warm.start(PROGRAM, *arguments, folder=ROOT, out=Path(os.devnull), err=said, environment=place)
            )

    def done(self) -> bool:
        """Whether all processes have ended. Raises RuntimeError where one failed by itself."""
        codes = [process.exitcode for process in self.processes]
        if any(code not in (None, 0) for code in codes):
            raise RuntimeError(f"a process ended by itself with status {codes}")
        return None not in codes

    def kill(self, alone: bool, chance: random.Random) -> None:
        """SIGKILL for one process, after which the others have to end, or for all."""
        for process in [chance.choice(self.processes)] if alone else self.processes:
            process.kill()
        for process in self.processes:
            process.join(WAIT)
        if any(process.exitcode is None for process in self.processes):
            raise RuntimeError(f"a process did not end in {WAIT:.0f} s after the other one was killed")


def steps_logged(output: Path) -> int:
    """How far the run's log is."""
    newest = max(output.glob(f"run/*/{log.LINES}"), key=lambda path: path.stat().st_mtime, default=None)
    return max((line["step"] for line in log.lines(newest.parent)), default=0) if newest else 0


def parts(output: Path) -> set[tuple[str, int]]:
    """Checkpoints that are being written, each with the time of its last change."""
    found = set()
    for path in output.glob("run/*/*.part"):
        with contextlib.suppress(FileNotFoundError):  # it was renamed meanwhile
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def wait_for(run: Run, output: Path, kind: str, chance: random.Random) -> bool:
    """Waits for the moment to kill at; False where the run was done before it came."""
    if kind == "start":
        time.sleep(chance.uniform(0, 2))
        return not run.done()
    left = parts(output)  # by a process that was killed while it wrote
    goal, until = steps_logged(output) + chance.randrange(2, 9), time.monotonic() + WAIT
    while time.monotonic() < until:
        if run.done():
            return False
        if kind == "write" and parts(output) - left:
            return True
        if kind == "step" and steps_logged(output) >= goal:
            time.sleep(chance.uniform(0, 0.05))
            return not run.done()
        time.sleep(0 if kind == "write" else 0.01)
    raise RuntimeError(f"nothing happened for {WAIT:.0f} s")


def result(output: Path) -> dict[str, Any]:
    """What a finished run left, without times."""
    found, _ = checkpoint.find(output / "run")  # one that was killed before its first checkpoint left a folder too
    assert found is not None, f"no checkpoint in {output}"
    folder, state = found.parent, checkpoint.load(found)
    kept = ("model", "optimizer", "schedule", "precision", "epoch", "position", "steps", "skipped", "best")
    timed = ("seconds", "images_per_second")
    decisions = folder / log.DECISIONS
    return {
        **{name: state[name] for name in kept if name in state},
        "generators": [rank["generators"] for rank in state["ranks"]],
        "history": [{name: value for name, value in row.items() if name not in timed} for row in state["history"]],
        "log": log.reproducible_lines(folder),
        "decisions": decisions.read_text() if decisions.exists() else "",
    }


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """The paths at which two nested values are not equal bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [found for index, pair in enumerate(zip(a, b, strict=True)) for found in differences(*pair, f"{path}.{index}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    return [] if a == b else [path]


def drill(recipe: str, world: int, kills: int, folder: Path, chance: random.Random) -> dict[str, Any]:
    """One run left alone, the same run killed so many times, and whether they ended alike."""
    epochs = max(2, kills * 6 // STEPS_AN_EPOCH)
    alone, killed = folder / "alone", folder / "killed"
    quiet = Run(alone, recipe, world, epochs)
    while not quiet.done():
        time.sleep(0.1)
    kinds: Counter[str] = Counter()
    while True:
        run = Run(killed, recipe, world, epochs)
        kind = chance.choice(["start", "step", "step", "write", "write"])
        if kinds.total() == kills or not wait_for(run, killed, kind, chance):
            break
        one = (
            world > 1 and kind != "start" and chance.random() < 0.5
        )  # before they know each other, the launcher has to end the rest
        run.kill(one, chance)
        kinds[kind] += 1
    while not run.done():
        time.sleep(0.1)
    expected, seen = result(alone), result(killed)
    errors = "".join((killed / f"rank{rank}.txt").read_text() for rank in range(world))
    found = differences(expected, seen)
    return {
        "recipe": recipe,
        "processes": world,
        "steps": expected["steps"],
        "kills": kinds.total(),
        **{f"kills_{kind}": kinds[kind] for kind in ("start", "step", "write")},
        "tracebacks": errors.count("Traceback"),
        "differences": found[:5],
        "equal": not found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="of each run")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--worlds", nargs="+", type=int, default=[1, 2], help="numbers of processes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--quick", action="store_true", help="one kill")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    rows = []
    for recipe in args.recipes:
        for world in args.worlds:
            folder = Path(tempfile.mkdtemp(prefix="kill_drill_"))
            chance = random.Random(f"{args.seed} {recipe} {world}")
            rows.append(drill(recipe, world, 1 if args.quick else args.kills, folder, chance))
            print(
                f"{recipe}, {world} processes: {'equal' if rows[-1]['equal'] else 'DIFFERENT, see ' + str(folder)}", flush=True
            )
            if rows[-1]["equal"]:
                shutil.rmtree(folder)
            if args.json:
                write_json(args.json, rows)
    head = [name for name in rows[0] if name != "differences"]
    print(table(head, [[row[name] for name in head] for row in rows]))
    if not all(row["equal"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
