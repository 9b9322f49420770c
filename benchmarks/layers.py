"""When is a layer slower in low bits? Each layer shape of four networks, float32 against low bits, quantizing included.

    python -m benchmarks.layers [--model resnet18 ...] [--recipe fqt_1bit] [--batch 128 64 16] [--threads T] [--json F]
                                [--quick]

Each distinct shape once, by `fqt.profile` in channels_last: output, gradient of the weight and, but for the first layer,
gradient of the input; float32 in the faster of NCHW and channels_last. All layers are measured, those too that the recipe's
rules would leave in float. ratio: float time over low-bit time. --quick: the main job's model at a batch of 4.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import fqt
from benchmarks.common import table, write_json
from benchmarks.step import CIFAR, CLASSES
from train import models

MODELS = ("resnet18", "vgg16", "torchvision:mobilenet_v3_small", "vgg_small")
MAIN_JOB = {"vgg_small": (1, 28, 28)}


def describe(layer: nn.Module, size: Sequence[int]) -> str:
    """A layer's shape, without its batch: "3x3, 64 -> 128, /2, on 32x32"."""
    if isinstance(layer, nn.Linear):
        return f"linear, {layer.in_features} -> {layer.out_features}"
    assert isinstance(layer, nn.Conv2d)
    stride = f", /{layer.stride[0]}" if max(layer.stride) > 1 else ""
    groups = ", depthwise" if layer.groups == layer.in_channels > 1 else f", {layer.groups} groups" if layer.groups > 1 else ""
    kernel = "x".join(map(str, layer.kernel_size))
    return f"{kernel}, {layer.in_channels} -> {layer.out_channels}{stride}{groups}, on {'x'.join(map(str, size[2:]))}"


def measure(name: str, recipe: str, batch: int, seconds: float) -> list[dict[str, object]]:
    """A row for each distinct shape of a model."""
    shape = MAIN_JOB.get(name, CIFAR)
    model = models.build(name, shape, CLASSES).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(batch, *shape).contiguous(memory_format=torch.channels_last)
    result = fqt.profile(model, images, recipe=fqt.load_recipe(recipe).everywhere(), seconds=seconds)
    rows: dict[str, dict[str, object]] = {}
    for layer, ratio in result.speedups().items():
        timings = [row for row in result.rows if row.layer == layer]
        what = describe(model.get_submodule(layer), timings[0].input)
        both = [sum(getattr(row, side) for row in timings) for side in ("float_ms", "low_ms")]
        by_product = {row.product: [row.float_ms, row.low_ms] for row in timings}
        common = {"model": name, "recipe": recipe, "batch": batch, "threads": torch.get_num_threads(), "shape": what}
        rows.setdefault(what, {**common, "fp32_ms": both[0], "fqt_ms": both[1], "ratio": ratio, "products_ms": by_product})
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(MODELS), help="models of the training program")
    parser.add_argument("--recipe", default="fqt_1bit")
    parser.add_argument("--batch", nargs="+", type=int, default=[128, 64, 16])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="the main job's model at a batch of 4")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    logging.getLogger("fqt").setLevel(logging.ERROR)
    names, batches, seconds = (["vgg_small"], [4], 0.0) if args.quick else (args.model, args.batch, 0.5)
    rows = [row for name in names for batch in batches for row in measure(name, args.recipe, batch, seconds)]
    print(
        table(
            ["model", "shape", "batch", "fp32 ms", "low bits ms", "ratio"],
            [
                [
                    row["model"],
                    row["shape"],
                    row["batch"],
                    f"{row['fp32_ms']:.2f}",
                    f"{row['fqt_ms']:.2f}",
                    f"{row['ratio']:.2f}",
                ]
                for row in rows
            ],
        )
    )
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
