"""What does accuracy cost in speed? Test accuracy against the measured speed-up of a step, a point for each recipe.

    python -m benchmarks.pareto [--threads T] [--json F] [--picture F.svg] [--train] [--quick]

Accuracies are those of benchmarks/results/accuracy.json (`python -m benchmarks.accuracy`), or of a training here and now with
--train. Speed is measured in this run, on the same job: vgg_small on images of Fashion-MNIST's size, batch 128, Adam, a whole
step against the best float32 one, by `benchmarks.step`, correctness gate included. --quick: a batch of 4, three rounds, no
torch.compile, and the picture goes to runs/: no evidence. Needs matplotlib (pip install 'fqt[benchmarks]').
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import shutil
from pathlib import Path

import torch

from benchmarks import accuracy, step
from benchmarks.common import table, write_json

RESULTS = Path(__file__).parent / "results"
SHAPE = (1, 28, 28)


def points(accuracies: list[dict], *, batch: int, rounds: int, compiled: bool) -> list[dict]:
    """Each method's accuracy with the speed of its step; fp32 is 1 by definition."""
    recipes = [row["method"] for row in accuracies if row["method"] != "fp32"]
    steps = step.compare("vgg_small", recipes, batch=batch, shape=SHAPE, rounds=rounds, compiled=compiled)
    speed = {row["recipe"]: row for row in steps}
    return [
        {
            "recipe": row["method"], "accuracy": row["mean"], "stdev": row["stdev"], "batch": batch,
            "threads": torch.get_num_threads(), "speedup": speed[row["method"]]["speedup"] if row["method"] in speed else 1.0,
            "ms": speed[row["method"]]["fqt_ms"] if row["method"] in speed else steps[0]["fp32_ms"],
        }
        for row in accuracies
    ]  # fmt: skip


def draw(rows: list[dict], path: Path) -> None:
    """The picture, the same bytes for the same rows."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    matplotlib.rcParams |= {"svg.hashsalt": "fqt", "svg.fonttype": "none"}
    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    for row, marker in zip(sorted(rows, key=lambda row: -row["accuracy"]), itertools.cycle("osD^vP*X")):
        axes.errorbar(row["speedup"], row["accuracy"], yerr=row["stdev"], fmt=marker, capsize=3, label=row["recipe"])
    axes.axvline(1.0, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xlabel(f"measured speed-up of a training step, batch {rows[0]['batch']}, threads: {rows[0]['threads']}")
    axes.set_ylabel("test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--train", action="store_true", help="train for the accuracies, rather than read them")
    parser.add_argument("--data", default="fashion_mnist", help="with --train: a data set of the training program")
    parser.add_argument("--quick", action="store_true", help="a batch of 4, no evidence")
    parser.add_argument("--picture", type=Path, help="SVG or PNG (default: benchmarks/results/pareto.svg; --quick: runs/)")
    parser.add_argument("--json", type=Path, help="write the points here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    logging.getLogger("fqt").setLevel(logging.ERROR)
    if args.train:
        accuracies = accuracy.measure(accuracy.METHODS, args.data, quick=args.quick)
    else:
        accuracies = json.loads((RESULTS / "accuracy.json").read_text())["rows"]
    compiled = not args.quick and any(map(shutil.which, ("c++", "g++", "clang++")))
    batch, rounds = (4, 3) if args.quick else (128, 7)
    rows = points(accuracies, batch=batch, rounds=rounds, compiled=compiled)
    print(
        table(
            ["recipe", "test accuracy, %", "stdev", "speed-up", "ms a step"],
            [
                [row["recipe"], f"{row['accuracy']:.2f}", f"{row['stdev']:.2f}", f"{row['speedup']:.2f}", f"{row['ms']:.1f}"]
                for row in rows
            ],
        )
    )
    picture = args.picture or (Path("runs/pareto-quick.svg") if args.quick else RESULTS / "pareto.svg")
    draw(rows, picture)
    print(f"\ndrawn: {picture}")
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
