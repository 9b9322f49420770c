"""Writes README's tables from benchmarks/results/, so that no figure there is typed by hand.

python -m benchmarks.readme            rewrite README.md
python -m benchmarks.readme --check    exit 1 if README.md says something else (a test calls this)
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.adapt import show as adapt
from benchmarks.common import table

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


def accuracy(rows: list[dict]) -> str:
    float_gradients = next(row["mean"] for row in rows if row["method"] == "xnor")
    return table(
        ["recipe", "test accuracy, %", "stdev", "against `xnor`", "peak learning rate"],
        [
            [f"`{row['method']}`", f"{row['mean']:.2f}", f"{row['stdev']:.2f}", f"{row['mean'] - float_gradients:+.2f}",
             f"{row['rate']:g}"]
            for row in rows
        ],
    )  # fmt: skip


def saved(rows: list[dict]) -> str:
    return table(
        ["recipe", "converted layers, MiB", "float32", "", "whole model, MiB", "float32"],
        [
            [f"`{row['recipe']}`", f"{row['layers_bytes'] / 2**20:.1f}", f"{row['fp32_layers_bytes'] / 2**20:.1f}",
             f"1/{row['fp32_layers_bytes'] / row['layers_bytes']:.1f}", f"{row['bytes'] / 2**20:.0f}",
             f"{row['fp32_bytes'] / 2**20:.0f}"]
            for row in rows
        ],
    )  # fmt: skip


def step(rows: list[dict]) -> str:
    return table(
        ["a training step", "recipe", "batch", "threads", "float32, ms", "by", "fqt, ms", "speed-up", "saved bytes"],
        [
            [row["model"], f"`{row['recipe']}`", row["batch"], row["threads"], f"{row['fp32_ms']:.0f}", row["fp32_variant"],
             f"{row['fqt_ms']:.0f}", f"{row['speedup']:.2f}", f"{row['fqt_saved_bytes'] / row['fp32_saved_bytes']:.2f}"]
            for row in rows
        ],
    )  # fmt: skip


def gradients(rows: list[dict]) -> str:
    return table(
        ["product", "quantizer of g", "error of g", "bias", "error of the product", "time / copy"],
        [
            [f"`{row['product']}`", f"{row['name']}, {row['quantizer']}", f"{row['error']:.3g}",
             f"{row['bias']:+.1g}", f"{row['product_error']:.3g}", f"{row['time_over_copy']:.0f}"]
            for row in rows
        ],
    )  # fmt: skip


def layers(rows: list[dict]) -> str:
    """How many shapes lose, and at most a dozen of them, from the slowest to the fastest at the smallest batch."""
    batches = sorted({row["batch"] for row in rows}, reverse=True)
    ratios: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        ratios.setdefault((row["model"].removeprefix("torchvision:"), row["shape"]), {})[row["batch"]] = row["ratio"]
    order = sorted(ratios, key=lambda shape: ratios[shape][batches[-1]])
    shown = order if len(order) <= 12 else [order[round(i * (len(order) - 1) / 11)] for i in range(12)]
    counts = [f"{sum(of[batch] < 1 for of in ratios.values())} of {len(ratios)} at batch {batch}" for batch in batches]
    heading = f"Slower than float32 under `{rows[0]['recipe']}`: {', '.join(counts)}. {len(shown)} of them and of the others:"
    head = ["network", "layer", *(f"speed-up, batch {batch}" for batch in batches)]
    cells = [[*shape, *(f"{ratios[shape][batch]:.2f}" for batch in batches)] for shape in shown]
    return f"{heading}\n\n{table(head, cells)}"


def pareto(rows: list[dict]) -> str:
    """The picture that stands beside its points."""
    return f"![test accuracy against the measured speed-up of a step, {len(rows)} recipes](benchmarks/results/pareto.svg)"


TABLES: dict[str, Callable[[list[dict]], str]] = {
    **{make.__name__: make for make in (accuracy, pareto, step, saved, gradients, layers)},
    "adapt": adapt,
    "step_avx2": step,
    "step_avx2_blocks": step,
}


def rewritten(text: str) -> str:
    """README's text with each `<!-- name: begin -->` block made again from results/name.json."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        result = json.loads((RESULTS / f"{name}.json").read_text())
        head, rest = text.split(begin)
        _, tail = rest.split(end)
        where = result["where"]
        code = f"torch {where['torch']}, commit {where['commit']}, {where['date']}"
        module, _, capability = name.partition("_")
        limited = f", limited to {capability.split('_')[0].upper()}" if capability else ""
        source = f"`python -m benchmarks.{module}`{limited}; {where['machine']}, {code}"
        text = f"{head}{begin}\n{make(result['rows'])}\n\n{source}\n{end}{tail}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether README.md is up to date")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    new = rewritten(text)
    if args.check:
        sys.exit("README.md is not what benchmarks/results/ say: python -m benchmarks.readme" if new != text else 0)
    readme.write_text(new)


if __name__ == "__main__":
    main()
