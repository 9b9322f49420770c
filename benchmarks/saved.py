"""How many bytes does a forward keep for its backward?

    python -m benchmarks.saved [--model vgg16] [--batch 128] [--recipes ...] [--json F] [--quick]

Counts the distinct storages that autograd saves in one training forward on random CIFAR-sized images, parameters and the
images themselves not counted: once for the whole model, once for its converted layers alone (the unconverted layers in their
place for the float rows).
"""

from __future__ import annotations

import argparse
import copy
import logging
from pathlib import Path

import torch
from torch import nn

import fqt
from benchmarks.common import table, write_json
from train import models

RECIPES = ("fqt_1bit", "fqt_w1a1g4", "dorefa_w1a2g6", "int8")


def saved_bytes(model: nn.Module, layers: list[str], x: torch.Tensor) -> tuple[int, int]:
    """Bytes saved by the whole forward, and by the named layers, each counted on the input that reaches it."""
    inputs: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: inputs.__setitem__(name, args[0].detach())
        )
        for name in layers
    ]
    with fqt.count_saved_bytes(x) as whole:
        loss = model(x).sum()
    for handle in handles:
        handle.remove()
    del loss
    alone = 0
    for name in layers:
        # a layer saves what reaches it, so its input belongs to the count: it must be no leaf of ours
        with fqt.count_saved_bytes() as part:
            y = model.get_submodule(name)(inputs.pop(name).requires_grad_())
        del y
        alone += part.bytes
    return whole.bytes, alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vgg16", help="a model of the training program")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--quick", action="store_true", help="a batch of 4")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    logging.getLogger("fqt").setLevel(logging.ERROR)
    batch = 4 if args.quick else args.batch
    x = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    plain = models.build(args.model, (3, 32, 32), 10).to(memory_format=torch.channels_last)
    rows = []
    for recipe in args.recipes:
        converted = fqt.convert(copy.deepcopy(plain), recipe)
        layers = [name for name, _ in fqt.quantized_layers(converted)]
        whole_float, alone_float = saved_bytes(plain, layers, x)
        whole, alone = saved_bytes(converted, layers, x)
        rows.append(
            {"model": args.model, "batch": batch, "recipe": recipe, "fp32_bytes": whole_float, "bytes": whole,
             "fp32_layers_bytes": alone_float, "layers_bytes": alone, "layers": len(layers)}
        )  # fmt: skip
    print(
        table(
            ["recipe", "whole model, MiB", "fp32, MiB", "ratio", "converted layers, MiB", "fp32, MiB", "ratio"],
            [
                [row["recipe"], f"{row['bytes'] / 2**20:.1f}", f"{row['fp32_bytes'] / 2**20:.1f}",
                 f"{row['bytes'] / row['fp32_bytes']:.3f}", f"{row['layers_bytes'] / 2**20:.2f}",
                 f"{row['fp32_layers_bytes'] / 2**20:.1f}", f"1/{row['fp32_layers_bytes'] / row['layers_bytes']:.1f}"]
                for row in rows
            ],
        )
    )  # fmt: skip
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
