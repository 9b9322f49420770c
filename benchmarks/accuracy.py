"""Does low-bit training learn? Test accuracy of each method, from scratch, at the best of a few learning rates.

    python -m benchmarks.accuracy              about an hour on 2 cores: README's table
    python -m benchmarks.accuracy --quick      a few minutes: 1,000 images, one seed; a smoke test, not evidence

Every method trains the same network (the main job's `vgg_small`) on Fashion-MNIST with Adam and a one-cycle schedule, from the
same initial weights and the same batches for one seed. First its learning rate is chosen: one shorter run for each
candidate, judged on a tenth of the *training* set that is held out. Then it trains on the whole training set with several
other seeds at that rate, and only then is the test set looked at.

Each finished run is a line of --log at once, and a run whose line is there is not repeated, so an interrupted benchmark goes
on where it stopped.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.common import table, write_json
from benchmarks.runs import Row, run_all

METHODS = ("fp32", "xnor", "psq_b1", "psq_b4", "fqt_1bit", "fqt_1bit_topk", "fqt_w1a1g4", "fqt_w1a1g6", "dorefa_w1a2g6")
RATES = (6e-3, 2e-2, 6e-2)
SEED_OF_RATES = 100


@dataclass(frozen=True)
class Job:
    """One training run. `validation`: fraction of the training set held out (0: the run whose test accuracy counts)."""

    data: str
    method: str
    rate: float
    seed: int
    epochs: int
    limit: int | None
    validation: float


def train(job: Job) -> Row:
    """Run a job on one thread."""
    import torch

    from train.config import parse
    from train.loop import run

    torch.set_num_threads(1)
    logging.getLogger("fqt").setLevel(logging.ERROR)
    result = run(
        parse(
            {
                "recipe": job.method,
                "model": {"name": "vgg_small"},
                "data": {"name": job.data, "limit": job.limit, "validation": job.validation},
                "optimizer": {"name": "adam", "lr": job.rate},
                "schedule": {"name": "onecycle"},
                "training": {"epochs": job.epochs},
                "tracking": {"enabled": False},
                "checkpoint": {"enabled": False},
                "seed": job.seed,
                "quiet": True,
            }
        )
    )
    return {**asdict(job), "valid": result.valid, "test": result.test, "seconds": result.seconds}


def said(row: Row) -> str:
    """What is printed of a finished run."""
    score = row["test"] if row["valid"] is None else row["valid"]
    return f"{row['method']} lr {row['rate']:g} seed {row['seed']}: {100 * score:.2f} %"


def measure(
    methods: Sequence[str], data: str, *, quick: bool, workers: int = 2, log: Path | None = None
) -> list[dict[str, object]]:
    """A row for each method: its learning rate, and the test accuracies (in %) of the seeds at that rate."""
    epochs, limit, seeds = (1, 1000, (0,)) if quick else (3, None, (0, 1, 2))
    log = log or Path("runs") / f"accuracy{'-quick' if quick else ''}.jsonl"
    rate_limit, rate_epochs = (500, 1) if quick else (18000, 2)
    searches = [Job(data, m, r, SEED_OF_RATES, rate_epochs, rate_limit, 0.1) for m in methods for r in RATES]
    found = run_all(searches, train, log, workers, said)
    best = {
        method: max((row for row in found if row["method"] == method), key=lambda row: float(str(row["valid"])))["rate"]
        for method in methods
    }
    finals = [Job(data, m, float(str(best[m])), seed, epochs, limit, 0.0) for seed in seeds for m in methods]
    results = run_all(finals, train, log, workers, said)
    rows = []
    for method in methods:
        scores = [100 * float(str(row["test"])) for row in results if row["method"] == method]
        mean, spread = statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else 0.0
        rows.append({"method": method, "rate": best[method], "mean": mean, "stdev": spread, "scores": scores})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few minutes, no evidence")
    parser.add_argument("--data", default="fashion_mnist", help="a data set of the training program")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="recipes to compare")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--log", type=Path, help="lines of finished runs (default: runs/accuracy.jsonl, or accuracy-quick)")
    parser.add_argument("--json", type=Path, help="write the table's rows here")
    args = parser.parse_args()
    rows = measure(args.methods, args.data, quick=args.quick, workers=args.workers, log=args.log)
    float_gradients = next((row["mean"] for row in rows if row["method"] == "xnor"), None)
    print(
        table(
            ["recipe", "learning rate", "test accuracy, %", "stdev", "against xnor"],
            [
                [row["method"], f"{row['rate']:g}", f"{row['mean']:.2f}", f"{row['stdev']:.2f}",
                 "" if float_gradients is None else f"{row['mean'] - float_gradients:+.2f}"]
                for row in rows
            ],
        )
    )  # fmt: skip
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
