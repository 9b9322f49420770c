"""Writes the tables of README.md and docs/ from benchmarks/results/, so that no figure there is typed by hand.

python -m benchmarks.readme            rewrite them
python -m benchmarks.readme --check    exit 1 if one says something else (a test calls this)
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
    return f"![test accuracy against the measured speed-up of a step, {len(rows)} recipes](../benchmarks/results/pareto.svg)"


WISHES = {
    "what float32 learns, on any network": "int8",
    "the same, faster, for transformers": "int6",
    "ternary weights": "bitnet",
    "1-bit weights, 2-bit activations": "dorefa_w1a2g6",
    "1-bit products forward, gradients that lose nothing; small batches": "fqt_w1a1g6",
    "the fastest step": "fqt_1bit",
}
"""What a person may want, and the recipe for it."""


def choice(results: dict[str, dict]) -> str:
    """Recipes by wish, with what was measured of each."""
    accuracies = {row["method"]: row["mean"] for row in results["accuracy"]["rows"]}
    measured = {
        "VGG-16": {row["recipe"]: row["speedup"] for row in results["step"]["rows"] if _is(row, "vgg16")},
        "VGG-16, AVX2": {row["recipe"]: row["speedup"] for row in results["step_avx2"]["rows"] if _is(row, "vgg16")},
        "BERT, AVX2": {row["recipe"]: row["speedup"] for row in results["step_avx2_blocks"]["rows"] if _is(row, "bert")},
    }
    cells = []
    for wish, recipe in WISHES.items():
        lost = f"{accuracies[recipe] - accuracies['fp32']:+.1f}" if recipe in accuracies else ""
        speeds = [f"{found[recipe]:.2f}" if recipe in found else "" for found in measured.values()]
        cells.append([wish, f"`{recipe}`", lost, *speeds])
    return table(["you want", "recipe", "accuracy against float32, points", *(f"speed-up, {of}" for of in measured)], cells)


def _is(row: dict, model: str) -> bool:
    return row["model"] == model and row["threads"] == 2


TABLES: dict[str, Callable[[list[dict]], str]] = {
    **{make.__name__: make for make in (accuracy, pareto, step, saved, gradients, layers)},
    "adapt": adapt,
    "step_avx2": step,
    "step_avx2_blocks": step,
    "step_zen3": step,
}
CHOICE = "choice"
"""The table that is made of several."""


def documents() -> list[Path]:
    """Where tables stand."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def rewritten(text: str) -> str:
    """A document's text with each `<!-- name: begin -->` block made again from results/name.json."""
    for name in (*TABLES, CHOICE):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin in text:
            head, rest = text.split(begin)
            _, tail = rest.split(end)
            text = f"{head}{begin}\n{_block(name)}\n{end}{tail}"
    return text


def _block(name: str) -> str:
    """A table and where its figures come from."""
    results = {each: json.loads((RESULTS / f"{each}.json").read_text()) for each in TABLES}
    if name == CHOICE:
        return f"{choice(results)}\n\nFrom the tables of accuracy and of steps, here and in docs/speed.md; 2 threads."
    where = results[name]["where"]
    code = f"torch {where['torch']}, commit {where['commit']}, {where['date']}"
    module, _, capability = name.partition("_")
    limited = f", limited to {capability.split('_')[0].upper()}" if capability.startswith("avx") else ""
    source = f"`python -m benchmarks.{module}`{limited}; {where['machine']}, {code}"
    return f"{TABLES[name](results[name]['rows'])}\n\n{source}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether they are up to date")
    args = parser.parse_args()
    texts = {path: path.read_text() for path in documents()}
    for name in (*TABLES, CHOICE):
        if sum(text.count(f"<!-- {name}: begin -->") for text in texts.values()) != 1:
            sys.exit(f"the table {name} should stand once in README.md or docs/, between <!-- {name}: begin --> and its end")
    for path, text in texts.items():
        new = rewritten(text)
        if args.check and new != text:
            sys.exit(f"{path.name} is not what benchmarks/results/ say: python -m benchmarks.readme")
        if not args.check:
            path.write_text(new)
    sys.exit(0)


if __name__ == "__main__":
    main()
