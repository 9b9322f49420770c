"""Does FSDP2 train a converted model as DDP does, whichever comes first, convert or fully_shard?

    python -m benchmarks.fsdp [--worlds 2 3] [--recipes ...] [--steps 10] [--json F] [--quick]

Each recipe trains on the same batches, with the same random numbers, under DDP and under FSDP2 on gloo ranks: converted before
and after sharding, sharded by block and by layer. No number of channels is a multiple of 3, and the last layer has two outputs,
so that on three ranks the parts are uneven and one is empty. On two ranks the sum of two gradients is the same in any order, so
that all must be equal bit for bit; on three, the first gradient to rounding. After that a code may differ by one where a weight
differs by its last bit: the weights then are compared with those of DDP from another seed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fqt
from benchmarks.common import table, write_json

ROUNDING = 1e-5
"""Largest relative difference of a first gradient whose parts were added in another order."""
RECIPES = [
    "fp32", "int8", "int6", "int4", "int8_token", "xnor", "psq_b4", "fqt_1bit", "fqt_1bit_topk", "fqt_w1a1g4", "fqt_w1a1g6",
    "dorefa_w1a2g6", "dorefa_w8a8g8", "bitnet", "bitnet_g4", "adapt", "adapt_calibrated",
]  # fmt: skip


def network(recipe: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A model of blocks for the recipe, always the same, and the shape of one input."""
    torch.manual_seed(0)
    if any(rule.match == "<conv>" for rule in fqt.load_recipe(recipe).rules):
        blocks = [nn.Sequential(nn.Linear(20, 16), nn.ReLU()), nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.ReLU())]
        return nn.Sequential(*blocks, nn.Linear(32, 2)), (20,)
    blocks = [
        nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())
        for inputs, outputs in ((3, 8), (8, 10), (10, 16))
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 2)), (3, 8, 8)


def converted(model: nn.Module, recipe: str) -> nn.Module:
    """The model with every layer converted, as far as the recipe is for its kind."""
    loaded = fqt.load_recipe(recipe)
    return model if loaded.is_float else fqt.convert(model, loaded.everywhere())


def sharded(model: nn.Module, by: str) -> nn.Module:
    """`fully_shard` of each block or of each layer with a matrix, and of the rest."""
    for module in list(model.modules())[1:]:
        is_layer = isinstance(module, nn.Conv2d | nn.Linear)
        if is_layer if by == "layer" else module in list(model.children()) and any(True for _ in module.parameters()):
            fully_shard(module)
    return fully_shard(model)


def trained(model: nn.Module, shape: tuple[int, ...], steps: int, seed: int) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Whole first gradients, whole weights at the end, this rank's losses."""
    rank = dist.get_rank()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    images = torch.Generator().manual_seed(1000 + rank)
    torch.manual_seed(seed + rank)
    first, losses = [], []
    for _ in range(steps):
        x, y = torch.randn(8, *shape, generator=images), torch.randint(0, 2, (8,), generator=images)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        first = first or [whole(p.grad) for p in model.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return first, [whole(p) for p in model.parameters()], losses


def whole(tensor: Tensor) -> Tensor:
    """A tensor without its graph, gathered from the ranks where it is spread over them."""
    gather: Callable[[], Tensor] | None = getattr(tensor.detach(), "full_tensor", None)
    return (gather() if gather else tensor.detach()).clone()


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    """||a - b|| / ||b|| of all tensors together."""
    flat_a, flat_b = (torch.cat([tensor.flatten() for tensor in tensors]).double() for tensors in (a, b))
    return ((flat_a - flat_b).norm() / flat_b.norm()).item()


def compare(recipe: str, when: str, by: str, steps: int) -> dict[str, Any]:
    """One row: FSDP2 against DDP."""
    world = dist.get_world_size()
    model, shape = network(recipe)
    plain_kinds = [type(module).__name__ for module in model.modules()]
    replica = DistributedDataParallel(converted(model, recipe))
    first, weights, losses = trained(replica, shape, steps, seed=10)
    expected = str(fqt.summary(replica.module))
    _, other, _ = trained(DistributedDataParallel(converted(network(recipe)[0], recipe)), shape, steps, seed=20)

    model = network(recipe)[0]
    model = sharded(converted(model, recipe), by) if when == "before" else converted(sharded(model, by), recipe)
    parts = {name: parameter.to_local().shape[0] for name, parameter in model.named_parameters()}  # type: ignore[operator]
    sharded_first, sharded_weights, sharded_losses = trained(model, shape, steps, seed=10)
    summary_same = str(fqt.summary(model)) == expected
    if recipe != "fp32":
        fqt.revert(model)
    kinds = [type(module).__name__.removeprefix("FSDP") for module in model.modules()]
    row = {
        "recipe": recipe, "ranks": world, "convert": when, "sharded_by": by,
        "first_gradient_apart": apart(sharded_first, first), "weights_apart": apart(sharded_weights, weights),
        "seeds_apart": apart(other, weights), "losses_equal": losses == sharded_losses, "summary_same": summary_same,
        "reverted": kinds == plain_kinds, "empty_part": 0 in parts.values(),
    }  # fmt: skip
    limit = 0.0 if world == 2 else max(1.5 * row["seeds_apart"], ROUNDING)
    near = row["first_gradient_apart"] <= (0.0 if world == 2 else ROUNDING) and row["weights_apart"] <= limit
    alike = all(dist_all(flag) for flag in (near, row["summary_same"], row["reverted"]))
    return {**row, "empty_part": not dist_all(not row["empty_part"]), "good": alike}


def dist_all(flag: bool) -> bool:
    """Whether it holds on every rank."""
    told = torch.tensor(float(flag))
    dist.all_reduce(told, op=dist.ReduceOp.MIN)
    return bool(told)


def work(path: Path, recipes: list[str], steps: int, quick: bool) -> None:
    """One rank's part."""
    dist.init_process_group("gloo")
    logging.getLogger("fqt").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    ways = [("before", "block"), ("after", "layer")]
    ways += [] if quick else [("before", "layer"), ("after", "block")]
    rows = [compare(recipe, when, by, steps) for recipe in recipes for when, by in ways]
    if dist.get_rank() == 0:
        path.write_text(json.dumps(rows))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", type=int, default=[2, 3], help="numbers of ranks")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="two steps, two of the four ways")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    steps = 2 if args.quick else args.steps
    if "RANK" in os.environ:
        work(args.json, args.recipes, steps, args.quick)
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for world in args.worlds:
            path = Path(folder) / f"{world}.json"
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
            command = [*launch, "-m", "benchmarks.fsdp", "--json", str(path), "--steps", str(steps), "--recipes", *args.recipes]
            subprocess.run([*command, *(["--quick"] if args.quick else [])], check=True)
            rows += json.loads(path.read_text())
    print(table(list(rows[0]), [[f"{v:.2g}" if isinstance(v, float) else v for v in row.values()] for row in rows]))
    if args.json:
        write_json(args.json, rows)
    if not all(row["good"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
