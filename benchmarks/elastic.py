"""Does torchrun bring a run back whose rank was killed, and do two agents train what one does?

    python -m benchmarks.elastic [--recipe fqt_1bit] [--kills 2] [--json F] [--quick]

Three runs of the same configuration on two gloo ranks, each with `--resume auto`: one agent with two processes, left alone; the
same with `--max-restarts`, one of its processes killed with SIGKILL now and then; two agents of one process each, as on two
machines, which meet at a port of the loopback interface. Weights, optimizer, random generators, history and log have to be
equal bit for bit.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import table, write_json
from benchmarks.kill_drill import KEYS, RECIPES, ROOT, STEPS_AN_EPOCH, WAIT, differences, result, steps_logged


def agent(output: Path, recipe: str, epochs: int, *flags: str) -> subprocess.Popen[bytes]:
    """Starts torchrun with the training program."""
    keys = [*KEYS, *RECIPES[recipe], f"output={output}", f"training.epochs={epochs}"]
    command = [sys.executable, "-m", "torch.distributed.run", *flags, str(ROOT / "train" / "main.py"), "--config", "fp32"]
    command += ["--resume", "auto", *(word for key in keys for word in ("--set", key))]
    output.mkdir(exist_ok=True)
    with (output / "said.txt").open("a") as said:
        return subprocess.Popen(command, stderr=said, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def ranks_of(agent: subprocess.Popen[bytes]) -> list[int]:
    """Process ids of what an agent has started."""
    return [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]


def kill_one(run: subprocess.Popen[bytes], output: Path, chance: random.Random) -> None:
    """SIGKILL for one rank, some steps later. Raises RuntimeError where the run ended or stood still."""
    goal, until = steps_logged(output) + chance.randrange(3, 8), time.monotonic() + WAIT
    while steps_logged(output) < goal:
        if run.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"the run ended with status {run.poll()}, or did nothing for {WAIT:.0f} s")
        time.sleep(0.02)
    os.kill(chance.choice(ranks_of(run)), signal.SIGKILL)


def compare(recipe: str, kills: int, folder: Path, chance: random.Random) -> list[dict[str, Any]]:
    """A row for the killed run, and one for the two agents."""
    epochs = max(2, kills * 10 // STEPS_AN_EPOCH)
    two = ("--standalone", "--nproc_per_node=2")
    alone = agent(folder / "alone", recipe, epochs, *two)
    assert alone.wait() == 0, (folder / "alone" / "said.txt").read_text()
    killed = agent(folder / "killed", recipe, epochs, *two, f"--max-restarts={kills}")
    for _ in range(kills):
        kill_one(killed, folder / "killed", chance)
    status = [killed.wait()]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = ("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=elastic")
    agents = [agent(folder / "agents", recipe, epochs, *meet) for _ in range(2)]
    status.append(max(abs(each.wait()) for each in agents))
    expected = result(folder / "alone")
    rows = []
    for name, code in zip(("killed", "agents"), status, strict=True):
        found = differences(expected, result(folder / name)) if code == 0 else ["the run did not end well"]
        row = {"run": name, "recipe": recipe, "steps": expected["steps"], "kills": kills if name == "killed" else 0}
        rows.append({**row, "status": code, "differences": found[:5], "equal": not found})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=list(RECIPES), default="fqt_1bit")
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--quick", action="store_true", help="one kill")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="elastic_") as folder:
        rows = compare(args.recipe, 1 if args.quick else args.kills, Path(folder), random.Random(args.seed))
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    if args.json:
        write_json(args.json, rows)
    if not all(row["equal"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
