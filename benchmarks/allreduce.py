"""Do gradients in a few bits on the wire cost accuracy? The main job on two gloo ranks, against gradients in float32.

    python -m benchmarks.allreduce [--bits 4 ...] [--seeds 3] [--epochs 3] [--limit N] [--log F] [--json F] [--quick]

Each run is `torchrun --nproc_per_node 2 train/main.py --config fqt_1bit --set distributed.gradient_bits=...`. Reported are the
means of test accuracies over seeds, their difference from float32's, and that difference in standard errors (Welch's t).
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import table, write_json
from benchmarks.runs import Row, run_all
from train import checkpoint, log

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Job:
    """A run: gradient_bits 0 is float32."""

    config: str
    gradient_bits: int
    error_feedback: bool
    seed: int
    epochs: int
    limit: int
    data: str


def run(job: Job) -> Row:
    """Trains, and reads what the run left."""
    with tempfile.TemporaryDirectory() as folder:
        keys = [f"seed={job.seed}", f"training.epochs={job.epochs}", f"data.name={job.data}", f"output={folder}", "name=run"]
        keys += ["device=cpu", "tracking.baseline_steps=0", "tracking.variance_every=0", "quiet=true"]
        keys += [f"data.limit={job.limit}"] if job.limit else []
        keys += [f"distributed.gradient_bits={job.gradient_bits}"] if job.gradient_bits else []
        keys += ["distributed.error_feedback=true"] if job.error_feedback else []
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train/main.py"]
        command += ["--config", job.config, *(word for key in keys for word in ("--set", key))]
        subprocess.run(command, check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
        found, _ = checkpoint.find(Path(folder) / "run")
        assert found is not None
        history = checkpoint.load(found)["history"]
        fewer = [line["distributed/times_fewer"] for line in log.lines(found.parent) if "distributed/times_fewer" in line]
    return {
        **vars(job),
        "test_accuracy": history[-1]["test_accuracy"],
        "loss": history[-1]["loss"],
        "times_fewer": fewer[-1] if fewer else 1.0,
    }


def summarized(runs: list[Row]) -> list[Row]:
    """A row for each number of bits, over its seeds."""
    by: dict[tuple[int, bool], list[Row]] = {}
    for row in runs:
        by.setdefault((row["gradient_bits"], row["error_feedback"]), []).append(row)
    base = [row["test_accuracy"] for row in by[0, False]]
    rows = []
    for (bits, feedback), group in by.items():
        found = [row["test_accuracy"] for row in group]
        error = math.sqrt((_variance(found) / len(found)) + (_variance(base) / len(base)))
        difference = statistics.mean(found) - statistics.mean(base)
        rows.append(
            {
                "bits": bits or 32,
                "error_feedback": feedback,
                "seeds": len(found),
                "test_accuracy": statistics.mean(found),
                "stdev": math.sqrt(_variance(found)),
                "difference": difference,
                "standard_errors": difference / error if bits and error else 0.0,
                "times_fewer": group[0]["times_fewer"],
                "runs": group,
            }
        )
    return rows


def _variance(values: list[float]) -> float:
    return statistics.variance(values) if len(values) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="fqt_1bit")
    parser.add_argument("--bits", nargs="+", type=int, default=[4])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--limit", type=int, default=0, help="training images; 0: all")
    parser.add_argument("--log", type=Path, help="finished runs, which are not repeated")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--quick", action="store_true", help="one epoch of the digits, one seed")
    args = parser.parse_args()
    size = ("digits", 1, 512) if args.quick else ("fashion_mnist", args.epochs, args.limit)
    jobs = [
        Job(args.config, bits, False, seed, size[1], size[2], size[0])
        for seed in range(1 if args.quick else args.seeds)
        for bits in [0, *args.bits]
    ]
    with tempfile.TemporaryDirectory() as folder:
        log_file = args.log or Path(folder) / "runs.jsonl"
        runs = run_all(jobs, run, log_file, 1, lambda row: f"{row['gradient_bits'] or 32} bits: {row['test_accuracy']:.4f}")
    rows = summarized(runs)
    head = [name for name in rows[0] if name != "runs"]
    print(table(head, [[f"{row[k]:.4g}" if isinstance(row[k], float) else row[k] for k in head] for row in rows]))
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
