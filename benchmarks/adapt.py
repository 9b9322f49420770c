"""AdaPT against float32 on the same schedule: accuracy, what the performance model says, and what is measured.

    python -m benchmarks.adapt --cifar10 FOLDER        LeNet-5, ResNet-20, AlexNet and an MLP; hours
    python -m benchmarks.adapt --quick                 seconds, on digits that need no download; a smoke test, not evidence
    python -m benchmarks.adapt --jobs lenet5 --seeds 0 1 2 --epochs 3 --limit 20000 --methods adapt fp32

Methods: `fp32`; `adapt`, the paper's settings (configs/adapt_*.yaml: weights and activations share <WL, FL>, 8 bits of
headroom, 4 for AlexNet); `adapt_int16`, the same with words of at most 16 bits, and `adapt_int8`, recipe adapt_calibrated with
words of at most 8 bits, so that every product runs on the kernels of 16-bit integers or of bytes. All train the same network
from the same seed on the same batches; the paper trains 100 epochs on lossless images, so compare within this table.

Measured: the median step at the formats in which training ended, in turns with the unconverted network on the same batches.
Predicted: by `fqt.precision.StepTime`, from each layer's products timed alone. Modelled: multiply-adds times bits.
Each finished run is a row of --json at once, and a run whose row is there is not repeated.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
from pathlib import Path

import torch

from benchmarks.common import table, where

JOBS = {"lenet5": "adapt_lenet5", "resnet20": "adapt_resnet20", "alexnet": "adapt_alexnet", "mlp": "adapt_int8"}
"""Name -> configuration."""
PAPER = {"papers_model_training": 1.27, "modelled_inference": 2.33, "size": 0.52, "accuracy": 0.98}
COLUMNS = {
    "measured_training": "training, measured",
    "predicted_training": "training, predicted",
    "modelled_training": "training, modelled",
    "papers_model_training": "training, the paper's model",
    "modelled_inference": "inference, modelled",
    "size": "size",
    "sparsity": "zeros",
    "word_length": "mean WL at the end",
}
CHANGES = {
    "fp32": ["recipe=fp32", "precision={}"],
    "adapt": ["recipe=adapt", "precision.max_word_length=32"],
    "adapt_int16": ["recipe=adapt", "precision.max_word_length=16"],
    "adapt_int8": ["recipe=adapt_calibrated", "precision.max_word_length=8", "precision.buffer=null"],
}


def train(job: str, method: str, seed: int, overrides: list[str], measured_steps: int) -> dict[str, object]:
    """One run, as a row."""
    from train import models, ranks
    from train.config import load
    from train.loop import Trainer

    overrides = [*overrides, f"seed={seed}", "tracking.enabled=false", "checkpoint.enabled=false", "quiet=true"]
    config = load(JOBS[job], [*overrides, *CHANGES[method]])
    with ranks.join("cpu") as place:
        trainer = Trainer(config, place)
        unconverted = models.build(config.model.name, trainer.data.shape, trainer.data.classes)
        result = trainer.train()
        row: dict[str, object] = {
            "job": job, "method": method, "seed": seed, "epochs": config.training.epochs, "data": config.data.name,
            "images": len(trainer.data.train), "batch": config.data.batch_size, "test": 100 * result.test,
            "loss": result.history[-1]["loss"], "seconds": result.seconds,
        }  # fmt: skip
        if trainer.policy is None or trainer.timeline is None:
            return row
        measuring = config.model_copy(
            update={"tracking": config.tracking.model_copy(update={"baseline_steps": measured_steps})}
        )
        trainer.config = measuring
        unconverted.load_state_dict(trainer.model.state_dict())
        layout = torch.channels_last if config.training.channels_last else torch.contiguous_format
        compared = trainer.compare(copy.deepcopy(unconverted).to(memory_format=layout))  # type: ignore[call-overload]
        trainer.timeline.calibrate(trainer.task, next(trainer.feed.batches(0)), compared.ms_fp32)
        predicted = trainer.timeline.predicted_ms() or compared.ms
        cost = trainer.timeline.cost()
        points = trainer.timeline.points
        words = [(step, statistics.mean(bits)) for step, bits, _ in points]
        return row | {
            "ms": compared.ms, "fp32_ms": compared.ms_fp32, "measured_training": compared.speedup,
            "predicted_training": compared.ms_fp32 / predicted, "prediction_error": compared.ms / predicted - 1,
            "modelled_training": cost.training_speedup, "papers_model_training": cost.paper_training_speedup,
            "modelled_inference": cost.inference_speedup, "size": cost.size, "switching_share": cost.switching_share,
            "sparsity": statistics.mean(trainer.policy.sparsity().values()),
            "runs_on": trainer.timeline.shares(),
            "word_length": words[-1][1], "word_length_over_time": words,
            "word_lengths": dict(zip(trainer.policy.layers, points[-1][1], strict=True)),
        }  # fmt: skip


def append(path: Path | None, row: dict[str, object]) -> None:
    """Add a row to the JSON file."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    here = where()
    path.write_text(json.dumps({"where": here, "rows": [*rows, row | {"commit": here["commit"]}]}, indent=1) + "\n")


def done(path: Path | None, job: str, method: str, seed: int) -> dict[str, object] | None:
    """The row of a run that is there already."""
    rows = json.loads(path.read_text())["rows"] if path is not None and path.exists() else []
    return next((row for row in rows if (row["job"], row["method"], row["seed"]) == (job, method, seed)), None)


def show(rows: list[dict]) -> str:
    """The table: means over seeds, accuracy against float32 of the same seeds, and the paper's averages below."""
    lines = []
    for job, method in dict.fromkeys((row["job"], row["method"]) for row in rows):
        mine = [row for row in rows if (row["job"], row["method"]) == (job, method)]
        float32 = {row["seed"]: row["test"] for row in rows if (row["job"], row["method"]) == (job, "fp32")}
        gains = [row["test"] - float32[row["seed"]] for row in mine if row["seed"] in float32]
        gain = f"{statistics.mean(gains):+.2f}" if gains else ""

        def mean(key: str, mine=mine) -> str:
            return f"{statistics.mean(row[key] for row in mine):.2f}" if key in mine[0] else ""

        trained = f"{mine[0]['images']:,} x {mine[0]['epochs']}"
        lines.append([job, method, trained, len(mine), mean("test"), gain, *map(mean, COLUMNS)])
    paper = [PAPER.get(key, "") for key in COLUMNS]
    lines.append(["the paper's", "averages", "", "", "", f"{PAPER['accuracy']:+}", *paper])
    head = ["model", "method", "images x epochs", "seeds", "test accuracy, %", "against fp32", *COLUMNS.values()]
    return table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps on digits, no evidence")
    parser.add_argument("--cifar10", help="folder of CIFAR-10: cifar-10-batches-py/, or train/ and test/ with images")
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=JOBS)
    parser.add_argument("--methods", nargs="+", default=list(CHANGES), choices=CHANGES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="in place of the configuration's")
    parser.add_argument("--limit", type=int, help="train on this many images")
    parser.add_argument("--set", nargs="+", default=[], help="further keys of the configuration")
    parser.add_argument("--json", type=Path, help="rows are added here as they come")
    args = parser.parse_args()
    logging.getLogger("fqt").setLevel(logging.ERROR)
    rows = []
    for seed in args.seeds[:1] if args.quick else args.seeds:
        for job in args.jobs:
            overrides = list(args.set)
            overrides += [f"training.epochs={args.epochs}"] if args.epochs else []
            overrides += [f"data.limit={args.limit}"] if args.limit else []
            overrides += [f"data.path={args.cifar10}"] if args.cifar10 and job in ("resnet20", "alexnet") else []
            if args.quick:
                overrides = ["data.name=digits", "data.limit=256", "data.batch_size=32", "training.epochs=1"]
                overrides += ["precision.lookback=[2, 4]"]
            for method in args.methods:
                row = done(args.json, job, method, seed)
                if row is None:
                    row = train(job, method, seed, overrides, measured_steps=1 if args.quick else 5)
                    append(args.json, row)
                rows.append(row)
                print(f"{job} {method} seed {seed}: {row['test']:.2f} %, {row['seconds']:.0f} s", flush=True)
    print(show(rows))


if __name__ == "__main__":
    main()
