"""How many bytes is a frozen model, as a file and in memory, against the float32 one?

    python -m benchmarks.sizes [--models vgg16 resnet18 mlp llama] [--recipes ...] [--json F] [--quick]

A model is converted, saved with `fqt.save`, and its float32 twin as safetensors; the file is loaded again, and must give the
frozen model's outputs bit for bit before it is counted. Bytes in memory are those of the distinct storages of parameters and
buffers. Layers are those that are converted: codes and scales against float32 weights; the worst of them must be at most 1/28
where the weights are signs and 1/14 where they are ternary, or the exit status is 1.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

import fqt
from benchmarks import step_models
from benchmarks.common import table, write_json
from train import models

RECIPES = ("fqt_1bit", "bitnet", "int4", "int8")
MODELS = ("vgg16", "resnet18", "mlp", "llama")
LIMITS = {"sign": 28.0, "ternary": 14.0}
"""Grid of the weights -> how many times smaller than float32 each layer has to be."""


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A model and an input of two samples."""
    if name in step_models.MODELS:
        return step_models.MODELS[name][0](2)
    return models.build(name, (3, 32, 32), 10), torch.randn(2, 3, 32, 32)


def in_memory(model: nn.Module) -> int:
    """Bytes of the distinct storages of parameters and buffers."""
    held = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in held if tensor.numel()}.values())


def measure(name: str, recipe: str, plain: nn.Module, x: Tensor, folder: Path) -> dict[str, object]:
    """A row. RuntimeError where the file does not give the same outputs."""
    frozen = fqt.freeze(fqt.convert(copy.deepcopy(plain), recipe))
    fqt.save(frozen, folder / "m.safetensors")
    loaded = fqt.load(folder / "m.safetensors", plain)
    with torch.no_grad():
        if not torch.equal(loaded(x), frozen(x)):
            raise RuntimeError(f"{name} by {recipe}: the file does not give the frozen model's outputs")
    layers = []
    for layer_name, layer in fqt.quantized_layers(frozen):
        parts = layer.quantized_weights()
        packed = sum(q.nbytes for q in parts)
        layers.append((4 * layer.weight.numel() / packed, parts[0].format.grid, packed, 4 * layer.weight.numel(), layer_name))
    worst = min(layers)
    return {
        "model": name,
        "recipe": recipe,
        "layers": len(layers),
        "grid": worst[1],
        "worst_layer": worst[4],
        "worst_ratio": worst[0],
        "limit": LIMITS.get(worst[1]),
        "layers_bytes": sum(packed for _, _, packed, _, _ in layers),
        "fp32_layers_bytes": sum(full for _, _, _, full, _ in layers),
        "file_bytes": (folder / "m.safetensors").stat().st_size,
        "fp32_file_bytes": len(to_bytes({key: value.contiguous() for key, value in plain.state_dict().items()})),
        "memory_bytes": in_memory(loaded),
        "fp32_memory_bytes": in_memory(plain),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="of the training program, or blocks of benchmarks.step")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--quick", action="store_true", help="resnet20 alone, unless models are named")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    logging.getLogger("fqt").setLevel(logging.ERROR)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models or (["resnet20"] if args.quick else MODELS):
            plain, x = build(name)
            plain.eval()
            for recipe in args.recipes:
                has_convolutions = any(isinstance(module, nn.Conv2d) for module in plain.modules())
                if has_convolutions and any(rule.match == "<conv>" for rule in fqt.load_recipe(recipe).rules):
                    continue
                rows.append(measure(name, recipe, plain, x, Path(folder)))
    mib = 2**20
    print(
        table(
            ["model", "recipe", "layers, MiB", "of fp32", "worst layer", "file, MiB", "of fp32", "memory, MiB", "of fp32"],
            [
                [row["model"], f"`{row['recipe']}`", f"{row['layers_bytes'] / mib:.2f}",
                 f"1/{row['fp32_layers_bytes'] / row['layers_bytes']:.1f}", f"1/{row['worst_ratio']:.1f} {row['worst_layer']}",
                 f"{row['file_bytes'] / mib:.2f}", f"1/{row['fp32_file_bytes'] / row['file_bytes']:.1f}",
                 f"{row['memory_bytes'] / mib:.2f}", f"1/{row['fp32_memory_bytes'] / row['memory_bytes']:.1f}"]
                for row in rows
            ],
        )
    )  # fmt: skip
    if args.json:
        write_json(args.json, rows)
    missed = [row for row in rows if row["limit"] is not None and row["worst_ratio"] < row["limit"]]
    for row in missed:
        print(f"{row['model']} by {row['recipe']}: {row['worst_layer']} is 1/{row['worst_ratio']:.1f}, not 1/{row['limit']:g}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
