"""How fast is a whole training step, and what does it hold, against the same model unconverted?

    python -m benchmarks.step --model vgg16@128 resnet18@64 --recipe fqt_1bit int8 [--batch B] [--threads T] [--optimizer sgd]
                              [--json F] [--quick]

A step is forward, cross-entropy, backward and optimizer, on random images of CIFAR's size (mlp: of Fashion-MNIST's), or for
bert, gpt2, llama, vit and mixer (`benchmarks.step_models`: a few blocks, whose first and last layer are converted too) on
random tokens or images of 224 x 224. The float32 side is the best of eager and torch.compile, each in NCHW and
channels_last; the converted side the better of eager channels_last and NCHW: the table names both. All variants of a model
take their steps in turns after a warm-up, so what else the machine does hits all alike; medians of seven rounds, with the
fastest and the slowest. Weights stay put (a learning rate of 0 costs the same).

First each recipe must give the same loss and the same gradients, bit for bit, with the kernels that serve it and with the
reference; if they differ, exit status 1 and no figure. On a processor with AVX-512 both sides use it: to see the machines
without, set ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 in the environment, and
TORCHINDUCTOR_CACHE_DIR to a new folder (torch.compile would take kernels made with AVX-512, and fail).

--quick: a batch of 4, three rounds, no torch.compile: no evidence.
"""

from __future__ import annotations

import argparse
import copy
import logging
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity

import fqt
from benchmarks import step_models
from benchmarks.common import table, where, write_json
from fqt.inspect.memory import peak_bytes
from fqt.testing import assert_same_values
from train import models
from train.config import Optimizer, Training
from train.optim import build_optimizer
from train.step import Parts, Step
from train.tasks import TASKS

CIFAR = (3, 32, 32)
FASHION_MNIST = (1, 28, 28)
CLASSES = 10
WARM_UP = 2
FORMATS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}


@dataclass
class Variant:
    """A way to take the step. `times`: by phase, one number a round, in ms."""

    recipe: str
    name: str
    step: Step
    parts: Parts
    times: dict[str, list[float]]

    def run(self) -> None:
        """One step, its times recorded."""
        for phase, ms in self.step(self.parts).ms.items():
            self.times.setdefault(phase, []).append(ms)

    @property
    def ms(self) -> float:
        return statistics.median(self.times["step"])


def compare(
    name: str,
    recipes: Sequence[str],
    *,
    batch: int,
    shape: models.Shape | None = None,
    optimizer: str = "adam",
    rounds: int = 7,
    compiled: bool = True,
) -> list[dict[str, object]]:
    """A row for each recipe. SystemExit if a kernel differs from the reference."""
    if name in step_models.MODELS:
        plain, images = step_models.MODELS[name][0](batch)
        followed = {recipe: _ends_too(fqt.load_recipe(recipe)) for recipe in recipes}
    else:
        shape = shape or (FASHION_MNIST if name == "mlp" else CIFAR)
        plain, images = models.build(name, shape, CLASSES), torch.randn(batch, *shape)
        followed = {recipe: fqt.load_recipe(recipe) for recipe in recipes}
    labels = torch.randint(CLASSES, (batch,))
    converted = {recipe: fqt.convert(copy.deepcopy(plain), followed[recipe]) for recipe in recipes}
    for recipe in recipes:
        differs = difference(plain, followed[recipe], images[: max(2, min(4, batch))], labels[: max(2, min(4, batch))])
        if differs:
            sys.exit(f"{name}, {recipe}: the kernels differ from the reference, so no figures: {differs}")
    convolves = name not in step_models.MODELS and any(isinstance(module, nn.Conv2d) for module in plain.modules())
    formats = FORMATS if convolves else {"NCHW": FORMATS["NCHW"]}
    eager = [("fp32", plain, False), *((recipe, model, False) for recipe, model in converted.items())]
    wanted = [*eager, *([("fp32", plain, True)] if compiled else [])]
    torch._dynamo.reset()
    variants = [
        variant(recipe, model, memory, images, labels, optimizer, compile=compile)
        for recipe, model, compile in wanted
        for memory in formats
    ]
    for _ in range(WARM_UP):
        for each in variants:
            each.step(each.parts)
    for _ in range(rounds):
        for each in variants:
            each.run()
    fp32 = [each for each in variants if each.recipe == "fp32"]
    sides = {recipe: min((v for v in variants if v.recipe == recipe), key=lambda v: v.ms) for recipe in recipes}
    best = min(fp32, key=lambda v: v.ms)
    memory = {side: held(model, images, labels, optimizer, next(iter(formats))) for side, model, _ in eager}
    return [
        {
            "model": name, "recipe": recipe, "batch": batch, "threads": torch.get_num_threads(), "optimizer": optimizer,
            "fp32_ms": best.ms, "fqt_ms": side.ms, "speedup": best.ms / side.ms,
            "fp32_saved_bytes": memory["fp32"][0], "fqt_saved_bytes": memory[recipe][0],
            "fp32_peak_bytes": memory["fp32"][1], "fqt_peak_bytes": memory[recipe][1],
            "breakdown_ms": breakdown(side),
            "fp32_variant": best.name, "fqt_variant": side.name,
            "fp32_spread_ms": spread(best), "fqt_spread_ms": spread(side), "rounds": rounds,
            "variants_ms": {f"{v.recipe} {v.name}": v.ms for v in variants if v.recipe in ("fp32", recipe)},
            "backends": sorted({row.backend for row in fqt.summary(converted[recipe]).rows} - {"torch"}), "where": where(),
        }
        for recipe, side in sides.items()
    ]  # fmt: skip


def _ends_too(recipe: fqt.Recipe) -> fqt.Recipe:
    """The recipe without its rules for the first and last layer: of a few blocks these are a large share."""
    return replace(recipe, rules=tuple(rule for rule in recipe.rules if rule.match not in ("<first>", "<last>")))


def variant(
    recipe: str, model: nn.Module, memory: str, images: Tensor, labels: Tensor, optimizer: str, *, compile: bool
) -> Variant:
    """A step of a copy of the model, in a memory format."""
    model = copy.deepcopy(model).to(memory_format=FORMATS[memory])  # type: ignore[call-overload]
    config = Training(compile=compile, channels_last=memory == "channels_last")
    step = Step(model, model, _optimizer(optimizer, model), config, TASKS["classify"])
    parts = [(_in_format(images, memory), labels)]
    return Variant(recipe, f"{'compiled' if compile else 'eager'} {memory}", step, parts, {})


def _in_format(images: Tensor, memory: str) -> Tensor:
    return images.contiguous(memory_format=FORMATS[memory]) if images.dim() == 4 else images


def _optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    made = build_optimizer(Optimizer(name=name), model)  # type: ignore[arg-type]
    for group in made.param_groups:
        group["lr"] = 0.0
    return made


def spread(of: Variant) -> list[float]:
    """Fastest and slowest round."""
    return [min(of.times["step"]), max(of.times["step"])]


def difference(plain: nn.Module, recipe: str | fqt.Recipe, images: Tensor, labels: Tensor) -> str:
    """The first tensor in which a step on the kernels and one on the reference are not the same, or ""."""
    results = []
    for backend in (None, "reference"):
        model = fqt.convert(copy.deepcopy(plain), recipe, backend=backend)
        torch.manual_seed(0)
        loss = cross_entropy(model(images), labels)
        loss.backward()
        results.append({"loss": loss, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}})
    for name, tensor in results[0].items():
        try:
            assert_same_values(tensor, results[1][name])
        except AssertionError as error:
            return f"{name}: {error}"
    return ""


def held(model: nn.Module, images: Tensor, labels: Tensor, optimizer: str, memory: str) -> tuple[int, int]:
    """Bytes that an eager forward saves for the backward, and the peak of a whole step."""
    model = copy.deepcopy(model).to(memory_format=FORMATS[memory])  # type: ignore[call-overload]
    images = _in_format(images, memory)
    with fqt.count_saved_bytes(images) as saved:
        loss = cross_entropy(model(images), labels)
    del loss
    peak = peak_bytes(model, images, lambda _: _optimizer(optimizer, model), lambda logits: cross_entropy(logits, labels))  # type: ignore[arg-type]
    return saved.bytes, peak


def breakdown(of: Variant) -> dict[str, object]:
    """Medians of the phases, and the self time of each operator that takes 1 % of a profiled step or more, in ms."""
    phases = {phase: statistics.median(times) for phase, times in of.times.items() if phase != "step"}
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        of.step(of.parts)
    own = {event.key: event.self_cpu_time_total / 1e3 for event in profiler.key_averages()}
    whole = sum(own.values())
    largest = sorted((item for item in own.items() if item[1] >= 0.01 * whole), key=lambda item: -item[1])
    return {**phases, "operators": dict(largest)}


def show(rows: list[dict]) -> str:
    """The table, and where the converted side's time goes."""
    text = table(
        ["model", "recipe", "batch", "threads", "fp32 ms (min-max)", "fastest fp32", "fqt ms (min-max)", "fastest fqt",
         "speedup", "saved MiB, fp32 / fqt", "peak MiB, fp32 / fqt"],
        [
            [row["model"], row["recipe"], row["batch"], row["threads"], _ms(row, "fp32"), row["fp32_variant"], _ms(row, "fqt"),
             row["fqt_variant"], f"{row['speedup']:.2f}", _mib(row, "saved"), _mib(row, "peak")]
            for row in rows
        ],
    )  # fmt: skip
    for row in rows:
        parts = {phase: ms for phase, ms in row["breakdown_ms"].items() if phase != "operators"}
        parts |= dict(list(row["breakdown_ms"]["operators"].items())[:8])
        text += f"\n\n{row['model']}, {row['recipe']}: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in parts.items())
    return text


def _ms(row: dict, side: str) -> str:
    low, high = row[f"{side}_spread_ms"]
    return f"{row[f'{side}_ms']:.1f} ({low:.1f}-{high:.1f})"


def _mib(row: dict, what: str) -> str:
    return " / ".join(f"{row[f'{side}_{what}_bytes'] / 2**20:.1f}" for side in ("fp32", "fqt"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", nargs="+", default=["vgg16"], help="models of the training program; vgg16@64: at a batch of its own"
    )
    parser.add_argument("--recipe", nargs="+", default=["fqt_1bit"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--optimizer", choices=["adam", "sgd"], default="adam", help="torch's, fused")
    parser.add_argument("--quick", action="store_true", help="a batch of 4, three rounds, no torch.compile")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    logging.getLogger("fqt").setLevel(logging.ERROR)
    compiled = not args.quick and any(map(shutil.which, ("c++", "g++", "clang++")))
    if not compiled:
        print("torch.compile is not measured: " + ("--quick" if args.quick else "no C++ compiler (apt-get install g++)"))
    rows = []
    for model in args.model:
        name, _, own = model.partition("@")
        usual = step_models.MODELS[name][1] if name in step_models.MODELS else args.batch
        batch, rounds = (4, 3) if args.quick else (int(own or usual), 7)
        rows += compare(name, args.recipe, batch=batch, optimizer=args.optimizer, rounds=rounds, compiled=compiled)
    print("the kernels equal the reference: loss and every gradient, bit for bit\n")
    print(show(rows))
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
