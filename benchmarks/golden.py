"""Is every bit of a training step what it was?

    python -m benchmarks.golden [--write] [--recipes ...] [--cases ...] [--file F]

Trains each built-in recipe (without its rules, so that every layer is converted) for two steps on small layers and chains, on
the reference and on the CPU kernels, in training and in evaluation mode, and takes SHA-256 of what came out: outputs, all
gradients, the parameters and buffers afterwards, the state of torch's generator. Beside it stand the codes and scales that
`fqt.quantize` makes of each operand. `--write` records the hashes in benchmarks/results/golden.json, else they are compared
with it; the exit status is 1 if one differs.

Float32 products, sums and tanh of torch itself differ between processors and versions. So the file holds a table for each
*canary*, the hash of the same steps in plain float32: on a machine whose canary is not in the file only the codes are
compared, those made through a tanh excepted. `--write` adds or replaces the table of this machine.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import fqt
from benchmarks.common import where

FILE = Path(__file__).parent / "results" / "golden.json"
BACKENDS = ("reference", "cpu")
OPERANDS = ("output.x", "output.w", "grad_input.g", "grad_input.w", "grad_weight.g", "grad_weight.x")


@dataclass(frozen=True)
class Case:
    """A model and its input. autocast: run under torch.autocast("cpu", bfloat16)."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    autocast: bool = False


class Tied(nn.Module):
    """Two linear layers with one weight, the second one called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(20, 20), nn.Linear(20, 20, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.second(self.first(x)))


def _conv(*sizes: int, **options) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(*sizes, **options)


def _chain(*, pool: bool) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(5, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)]
    layers += [nn.MaxPool2d(2)] if pool else [nn.ReLU()]
    layers += [nn.Conv2d(16, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten()]
    features = 12 * (16 if pool else 64)
    return nn.Sequential(*layers, nn.Linear(features, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 7))


CASES = {
    "linear": Case(lambda: nn.Linear(37, 18), (6, 37)),
    "linear tokens": Case(lambda: nn.Linear(37, 18), (3, 5, 37)),
    "linear no bias": Case(lambda: nn.Linear(24, 10, bias=False), (6, 24)),
    "linear float64": Case(lambda: nn.Linear(24, 10), (6, 24), torch.float64),
    "linear autocast": Case(lambda: nn.Linear(24, 10), (4, 3, 24), autocast=True),
    "tied": Case(Tied, (6, 20)),
    "conv": Case(_conv(13, 10, 3, padding=1), (4, 13, 6, 5)),
    "conv channels_last": Case(_conv(16, 10, 3, padding=1), (4, 16, 6, 6), channels_last=True),
    "conv stride": Case(_conv(8, 12, 3, stride=2, padding=1, bias=False), (4, 8, 7, 6)),
    "conv dilation": Case(_conv(8, 9, 3, dilation=2, padding=2), (3, 8, 6, 7)),
    "conv unpadded": Case(_conv(6, 9, (1, 3), stride=(2, 1)), (3, 6, 6, 7)),
    "conv circular": Case(_conv(6, 9, 3, padding=1, padding_mode="circular"), (3, 6, 5, 5)),
    "conv groups": Case(_conv(8, 12, 3, groups=4, padding=1), (3, 8, 5, 5)),
    "conv depthwise": Case(_conv(8, 8, 3, groups=8, padding=1), (3, 8, 5, 5)),
    "conv 1x1": Case(_conv(24, 16, 1, stride=2), (4, 24, 5, 5)),
    "conv float64": Case(_conv(8, 9, 3), (3, 8, 5, 5), torch.float64),
    "conv autocast": Case(_conv(8, 9, 3), (3, 8, 5, 5), autocast=True),
    "chain": Case(lambda: _chain(pool=False), (8, 5, 8, 8)),
    "chain channels_last": Case(lambda: _chain(pool=False), (8, 5, 8, 8), channels_last=True),
    "chain with pooling": Case(lambda: _chain(pool=True), (8, 5, 8, 8)),
}


def digest(tensors: Iterable[Tensor | None]) -> str:
    """SHA-256 of shapes, dtypes and bytes, 16 hexadecimal digits of it."""
    state = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            state.update(b"none")
            continue
        plain = (tensor.detach() + 0 if tensor.is_floating_point() else tensor.detach()).contiguous()  # -0.0 counts as 0.0
        plain = torch.where(plain.isnan(), torch.nan, plain) if plain.is_floating_point() else plain  # a NaN is a NaN
        state.update(f"{tuple(plain.shape)}{plain.dtype}".encode())
        state.update(plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return state.hexdigest()[:16]


def steps(case: Case, recipe: fqt.Recipe, backend: str, *, training: bool) -> str:
    """The hash of two steps of a case."""
    torch.manual_seed(5)
    model = case.make().to(case.dtype)
    x = torch.randn(case.shape, dtype=case.dtype)
    if case.channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    fqt.convert(model, recipe, backend=backend)
    model.train(training)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[Tensor | None] = []
    for _ in range(2):
        leaf = x.detach().clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            y = model(leaf)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        (y * weights).sum().backward()
        seen += [y, leaf.grad, *(parameter.grad for parameter in model.parameters())]
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
        seen.append(model(x))
    return digest([*seen, *model.state_dict().values(), torch.get_rng_state()])


def codes(recipe: fqt.Recipe, operand: str, backend: str) -> str:
    """The hash of an operand's codes, scales, offsets, kept groups and mask; of a gradient also with a folded scale."""
    letter, quantizer = operand[-1], recipe.quantizer(*operand.split("."))
    assert quantizer is not None
    generator = torch.Generator().manual_seed(7)
    shape = {"x": (5, 12, 37), "w": (18, 9, 37), "g": (5, 12, 18)}[letter]
    value = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, shape[2], generator=generator)
    fold = torch.rand(1, 1, shape[2], generator=generator)
    made: list[Tensor | None] = []
    for folded in (None, fold) if letter == "g" else (None,):
        key = torch.tensor(-77)
        q, mask = fqt.quantize(value, quantizer, letter, key=key, stream=2, fold=folded, backend=backend)
        made += [q.codes, q.scale, q.offset, q.index, mask, q.decode()]
    return digest(made)


def exact(name: str) -> bool:
    """Whether an entry depends on nothing that torch computes differently elsewhere: codes that come through no tanh."""
    recipe, what, *_ = name.split(" / ")
    quantizer = fqt.load_recipe(recipe).quantizer(*what.split(".")) if what in OPERANDS else None
    return quantizer is not None and not quantizer.transform


@functools.cache
def canary() -> str:
    """The hash of the cases' steps in float32, and of a tanh: what torch itself computes on this machine."""
    plain = fqt.load_recipe("fp32")
    state = [steps(case, plain, "reference", training=training) for case in CASES.values() for training in (True, False)]
    return hashlib.sha256("".join([*state, digest([torch.linspace(-3, 3, 1001).tanh()])]).encode()).hexdigest()[:16]


def names(recipes: Iterable[str], cases: Iterable[str]) -> Iterator[tuple[str, Callable[[str], str]]]:
    """(name of an entry, function of a backend that computes it)."""
    for name in recipes:
        recipe = fqt.load_recipe(name).everywhere()
        for operand in OPERANDS:
            if recipe.quantizer(*operand.split(".")) is not None:
                yield f"{name} / {operand}", lambda backend, recipe=recipe, operand=operand: codes(recipe, operand, backend)
        linear_only = any(rule.match == "<conv>" and rule.recipe is None for rule in recipe.rules)
        for case in () if recipe.is_float else cases:
            if linear_only and not any(isinstance(module, nn.Linear) for module in CASES[case].make().modules()):
                continue
            for mode in ("train", "eval"):
                yield (
                    f"{name} / {case} / {mode}",
                    lambda backend, recipe=recipe, case=case, mode=mode: steps(
                        CASES[case], recipe, backend, training=mode == "train"
                    ),
                )


def compare(recipes: Iterable[str], cases: Iterable[str], tables: dict) -> tuple[int, list[str]]:
    """Number of hashes compared, and the names of the entries that differ or that the file lacks, with their backends."""
    here = tables.get(canary())
    hashes = (here or next(iter(tables.values())))["hashes"]
    count, differing = 0, []
    for name, compute in names(recipes, cases):
        if here is None and not exact(name):
            continue
        for backend in BACKENDS:
            count += 1
            if hashes.get(name) != compute(backend):
                differing.append(f"{name} / {backend}")
    return count, differing


def record(recipes: Iterable[str], cases: Iterable[str]) -> dict[str, str]:
    """Name -> hash of every entry. AssertionError where the backends differ."""
    hashes = {}
    for name, compute in names(recipes, cases):
        made = {compute(backend) for backend in BACKENDS}
        assert len(made) == 1, f"{name}: {' and '.join(BACKENDS)} differ"
        hashes[name] = made.pop()
    return hashes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="record this machine's table instead of comparing")
    parser.add_argument("--recipes", nargs="+", default=fqt.recipes())
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--file", type=Path, default=FILE)
    args = parser.parse_args()
    logging.getLogger("fqt").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    tables = json.loads(args.file.read_text()) if args.file.exists() else {}
    if args.write:
        tables[canary()] = {"where": where(), "hashes": record(args.recipes, args.cases)}
        args.file.write_text(json.dumps(tables, indent=0) + "\n")
        return 0
    known = canary() in tables
    count, differing = compare(args.recipes, args.cases, tables)
    print(*differing, sep="\n")
    print(f"{count} hashes compared, {len(differing)} differ{'' if known else '; this machine has no table: codes only'}")
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
