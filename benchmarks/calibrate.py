"""How near to the float network does a converted one begin: measured ranges, stored ones, learned rounding?

    python -m benchmarks.calibrate --weights resnet20.th --cifar10 FOLDER [--model resnet20] [--recipes int8 int4] [--json F]
    python -m benchmarks.calibrate --quick

A trained float network (published weights of He et al.'s CIFAR family) is converted, given
ranges or weights by each method from some training images, and asked for the classes of test images, without any training:

    measured        as `convert` leaves it: every forward measures its ranges
    max, percentile, mse          `fqt.calibrate(method=...)`, weights left as they are
    mse + weights   with ranges of the weights too
    data-free       `fqt.calibrate(model)`: from BatchNorms alone
    adaround, adaquant            `fqt.reconstruct` behind "mse + weights"

Of each: top-1 accuracy, and ||y - y_float|| / ||y_float|| of the logits. A seed decides which training images are seen.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import fqt
from benchmarks.common import table, write_json
from train import checkpoint, data, models
from train.config import parse

BATCH = 64
METHODS = ("measured", "max", "percentile", "mse", "mse + weights", "data-free", "adaround", "adaquant")


def start(model: nn.Module, method: str, batches: list[Tensor], steps: int) -> None:
    """Have a converted model begin by a method."""
    if method in ("max", "percentile", "mse"):
        fqt.calibrate(model, batches, method=method, weights=False)
    elif method == "data-free":
        fqt.calibrate(model, weights=False)
    elif method != "measured":
        fqt.calibrate(model, batches)
        if method in ("adaround", "adaquant"):
            fqt.reconstruct(model, batches, method=method, steps=steps)


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    """What the model says of images in evaluation."""
    return torch.cat([model.eval()(part) for part in x.split(250)])


def trained(x: Tensor, y: Tensor, shape: tuple[int, int, int]) -> nn.Module:
    """LeNet-5 after some steps."""
    model = models.build("lenet5", shape, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(4):
        for part, of in zip(x.split(BATCH), y.split(BATCH), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(part), of).backward()
            optimizer.step()
    return model


def whole(images: data.Memory) -> tuple[Tensor, Tensor]:
    """All images of a set."""
    return next(images.batches([list(range(len(images)))], whole=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20", help="of the training program")
    parser.add_argument("--weights", type=Path, help="its float weights: a checkpoint or a state dict")
    parser.add_argument("--cifar10", help="folder of CIFAR-10: cifar-10-batches-py/, or train/ and test/ with images")
    parser.add_argument("--recipes", nargs="+", default=["int8", "int4"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=16, help=f"of {BATCH} training images")
    parser.add_argument("--steps", type=int, default=500, help="of each layer's reconstruction")
    parser.add_argument("--images", type=int, default=10000, help="test images")
    parser.add_argument("--quick", action="store_true", help="LeNet-5 on digits, one seed, a few steps: no evidence")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    logging.getLogger("fqt").setLevel(logging.ERROR)
    torch.manual_seed(0)
    if args.quick:
        args.seeds, args.batches, args.steps, args.model = [0], 4, 20, "lenet5"
    elif not (args.weights and args.cifar10):
        parser.error("--weights and --cifar10 say what is converted and what it is asked; or --quick")
    name = "digits" if args.quick else "cifar10"
    images = data.load(parse({"model": {"name": args.model}, "data": {"name": name, "path": args.cifar10}}).data)
    (x, y), (x_test, y_test) = whole(images.train), whole(images.test)
    # In random order: a folder's images are sorted by class.
    asked = torch.randperm(len(x_test), generator=torch.Generator().manual_seed(0))[: args.images]
    x_test, y_test = x_test[asked], y_test[asked]
    if args.quick:
        model = trained(x, y, images.shape)
    else:
        model = models.build(args.model, images.shape, images.classes)
        model.load_state_dict(checkpoint.load_weights(args.weights))
    exact = logits(model, x_test)
    rows = []
    for recipe in args.recipes:
        for seed in args.seeds:
            chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: args.batches * BATCH]
            for method in args.methods:
                if seed != args.seeds[0] and method in ("measured", "data-free"):  # These see no training images.
                    continue
                begun = time.perf_counter()
                converted = fqt.convert(copy.deepcopy(model), recipe)
                start(converted, method, list(x[chosen].split(BATCH)), args.steps)
                seconds = time.perf_counter() - begun
                found = logits(converted, x_test)
                rows.append(
                    {
                        "model": args.model, "recipe": recipe, "method": method, "seed": seed, "data": name,
                        "seen": len(chosen), "steps": args.steps, "images": len(x_test),
                        "float_accuracy": 100 * float((exact.argmax(1) == y_test).float().mean()),
                        "accuracy": 100 * float((found.argmax(1) == y_test).float().mean()),
                        "error": float((found - exact).norm() / exact.norm()), "seconds": seconds,
                    }
                )  # fmt: skip
                print(f"{recipe} {method} seed {seed}: {rows[-1]['accuracy']:.2f} %, {seconds:.0f} s", flush=True)
                if args.json:
                    write_json(args.json, rows)
    lines = []
    for recipe, method in dict.fromkeys((row["recipe"], row["method"]) for row in rows):
        mine = [row for row in rows if (row["recipe"], row["method"]) == (recipe, method)]
        accuracy, error = (statistics.mean(row[key] for row in mine) for key in ("accuracy", "error"))
        lines.append([f"`{recipe}`", method, len(mine), f"{accuracy:.2f}", f"{error:.3f}"])
    seen, best = args.batches * BATCH, rows[0]["float_accuracy"]
    print(f"{args.model}, float {best:.2f} %, {seen} training images, {args.steps} steps a layer")
    print(table(["recipe", "start", "seeds", "accuracy, %", "error of the logits"], lines))


if __name__ == "__main__":
    main()
