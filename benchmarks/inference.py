"""How fast is a frozen model, against the same model unconverted in torch, in onnxruntime and in llama.cpp?

    python -m benchmarks.inference [--model vgg16 resnet18 mlp bert llama_token llama_prompt] [--recipe ...] [--batch 1 64]
                                   [--threads 1 2] [--json F] [--quick]

Models are those of `benchmarks.step`, in evaluation and with random weights: vgg16, resnet18 and mlp by `fqt_1bit` and `int8`;
two blocks of BERT-base and four of a Llama (768 wide, 2048 inside, 256 tokens in the vocabulary), every layer of them
converted; "signs" is bitnet with weights of signs. llama_token reads one token from an empty cache, which is what a step of
generating is but for its attention, so that bytes of weights decide; llama_prompt reads 256. Their batch is 1.

Against a frozen model, eager, and where it has no convolutions compiled, stand torch float32, eager and compiled, images in
NCHW and channels_last; onnxruntime in float32 and int8 (static QDQ, and dynamic where all is linear); and llama.cpp from a
GGUF file of the same codes. Compiled models, float or not, no longer ask before each run whether they are still what was
compiled (`torch.compiler.set_stance(skip_guard_eval_unsafe=True)`). A runtime that is not installed is skipped, by name. All
take turns after a warm-up, each turn as many runs as take 20 ms, so what else the machine does hits all alike: medians of seven
turns, with the fastest and the slowest. First the frozen model must give the converted model's outputs in evaluation, bit for
bit, else the exit status is 1 and there is no figure.

--quick: three turns, one thread, no torch.compile, batch 1: no evidence.
"""

from __future__ import annotations

import argparse
import copy
import logging
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fqt
from benchmarks import runtimes, step_models
from benchmarks.common import table, where, write_json
from benchmarks.runtimes import Missing, Runner
from benchmarks.step import CIFAR, CLASSES, FASHION_MNIST, FORMATS
from train import models

TURN = 0.02
"""Seconds that a turn takes at least."""
FLOAT = ("float32", "onnxruntime")
"""What the first word of a float contender is."""


class Logits(nn.Module):
    """A language model of transformers, tokens (N, T) to logits (N, T, vocabulary)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, tokens_NT: Tensor) -> Tensor:
        return self.body(input_ids=tokens_NT, use_cache=False).logits


def llama(tokens: int) -> Callable[[int], tuple[nn.Module, Tensor]]:
    """Four blocks at 768 wide, and their input."""

    def make(batch: int) -> tuple[nn.Module, Tensor]:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=256, hidden_size=768, intermediate_size=2048, num_attention_heads=12, num_hidden_layers=4,
            max_position_embeddings=512,
        )  # fmt: skip
        return Logits(LlamaForCausalLM(config)), torch.randint(256, (batch, tokens))

    return make


def images(name: str) -> Callable[[int], tuple[nn.Module, Tensor]]:
    """A model of the training program, and its input."""
    shape = FASHION_MNIST if name == "mlp" else CIFAR
    return lambda batch: (models.build(name, shape, CLASSES), torch.randn(batch, *shape))


CASES: dict[str, tuple[Callable[[int], tuple[nn.Module, Tensor]], tuple[str, ...], tuple[int, ...]]] = {
    "vgg16": (images("vgg16"), ("fqt_1bit", "int8"), (1, 64)),
    "resnet18": (images("resnet18"), ("fqt_1bit", "int8"), (1, 64)),
    "mlp": (images("mlp"), ("fqt_1bit", "int8"), (1, 64)),
    "bert": (step_models.bert, ("int8", "bitnet"), (1, 64)),
    "llama_token": (llama(1), ("bitnet", "signs"), (1,)),
    "llama_prompt": (llama(256), ("bitnet", "signs"), (1,)),
}
"""Name -> the function of a batch that makes model and input, recipes, batches."""


@dataclass
class Contender:
    """A way to run the input. `times`: one number a turn, in ms a run."""

    name: str
    run: Runner
    runs: int = 1
    times: list[float] = field(default_factory=list)

    def warm_up(self) -> None:
        """Run until a turn's number of runs is known: twice at least."""
        self.run()
        start = time.perf_counter()
        self.run()
        self.runs = max(1, round(TURN / (time.perf_counter() - start)))

    def turn(self) -> None:
        start = time.perf_counter()
        for _ in range(self.runs):
            self.run()
        self.times.append(1e3 * (time.perf_counter() - start) / self.runs)

    @property
    def ms(self) -> float:
        return statistics.median(self.times)


def convert(name: str, recipe: str, plain: nn.Module) -> nn.Module:
    """A converted copy: image models as the recipe says, language models in every layer but a head of the vocabulary's size."""
    by = fqt.load_recipe(recipe) if name in models.BUILDERS else step_models.recipe_of(recipe)
    return fqt.convert(copy.deepcopy(plain), by, skip="body.lm_head" if isinstance(plain, Logits) else None).eval()


def contenders(
    plain: nn.Module, x: Tensor, frozen: dict[str, nn.Module], *, threads: int, compiled: bool
) -> tuple[list[Contender], dict[str, str]]:
    """All ways to run x, and name -> reason of those that are missing."""
    convolves = any(isinstance(module, nn.Conv2d) for module in plain.modules())
    linear = not any(isinstance(module, nn.Conv2d | nn.BatchNorm1d) for module in plain.modules())
    found, missing = [], {}
    torch._dynamo.reset()
    for side, model in {"float32": plain, **frozen}.items():
        for memory in FORMATS if convolves else ("NCHW",):
            layout = f" {memory}" if convolves else ""
            input, there = (
                (x.contiguous(memory_format=FORMATS[memory]), copy.deepcopy(model).to(memory_format=FORMATS[memory]))  # type: ignore[call-overload]
                if convolves
                else (x, model)
            )
            found.append(Contender(f"{side} eager{layout}", lambda there=there, input=input: there(input)))
            if compiled and (side == "float32" or linear):
                fast = torch.compile(there, fullgraph=True)
                found.append(Contender(f"{side} compiled{layout}", lambda fast=fast, input=input: fast(input)))
    ways = ("static",) if convolves else ("dynamic", "static")
    try:
        made = runtimes.onnxruntime(plain, x, int8=ways, threads=threads)
        found += [Contender(name, run) for name, run in made.items()]
    except Missing as error:
        missing["onnxruntime"] = str(error)
    for recipe, model in frozen.items():
        if isinstance(model, Logits):
            try:
                found.append(Contender(f"llama.cpp {recipe}", runtimes.llama_cpp(model.body, x, threads)))
            except Missing as error:
                missing["llama.cpp"] = str(error)
    return found, missing


def compare(
    name: str, recipes: Sequence[str], *, batch: int, threads: int, turns: int = 7, compiled: bool = True
) -> list[dict[str, object]]:
    """A row for each recipe. SystemExit if a frozen model differs from the converted one."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    plain, x = CASES[name][0](batch)
    plain.eval()
    frozen = {}
    for recipe in recipes:
        model = convert(name, recipe, plain)
        with torch.no_grad():
            expected = model(x)
            frozen[recipe] = fqt.freeze(model)
            if not torch.equal(frozen[recipe](x), expected):
                sys.exit(f"{name}, {recipe}: the frozen model differs from the converted one in evaluation, so no figures")
    with torch.inference_mode():
        every, missing = contenders(plain, x, frozen, threads=threads, compiled=compiled)
        for each in every:
            each.warm_up()
        with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
            for _ in range(turns):
                for each in every:
                    each.turn()
    best = {side: min((c for c in every if c.name.startswith(side)), key=lambda c: c.ms) for side in ("float32", *recipes)}
    others = min((c for c in every if c.name.startswith(FLOAT)), key=lambda c: c.ms)
    rows = []
    for recipe in recipes:
        cpp = [each.ms for each in every if each.name == f"llama.cpp {recipe}"]
        rows.append(
            {
                "model": name, "recipe": recipe, "batch": batch, "threads": threads,
                "fp32_ms": best["float32"].ms, "fp32_variant": best["float32"].name,
                "best_ms": others.ms, "best_variant": others.name,
                "llama_cpp_ms": cpp[0] if cpp else None,
                "fqt_ms": best[recipe].ms, "fqt_variant": best[recipe].name,
                "speedup": best["float32"].ms / best[recipe].ms, "speedup_over_best": others.ms / best[recipe].ms,
                "turns": turns,
                "variants_ms": {
                    each.name: [each.ms, min(each.times), max(each.times)]
                    for each in every
                    if each.name.startswith(FLOAT) or recipe in each.name.split()
                },
                "missing": missing, "where": where(),
            }
        )  # fmt: skip
    return rows


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The table."""
    return table(
        ["model", "recipe", "batch", "threads", "torch float32, ms", "best float or int8, ms", "llama.cpp, ms",
         "fqt, ms (min-max)", "over torch", "over the best"],
        [
            [row["model"], f"`{row['recipe']}`", row["batch"], row["threads"], _by(row, "fp32"), _by(row, "best"),
             "" if row["llama_cpp_ms"] is None else f"{row['llama_cpp_ms']:.2f}", _spread(row),
             f"{row['speedup']:.2f}", f"{row['speedup_over_best']:.2f}"]
            for row in rows
        ],
    )  # fmt: skip


def _by(row: dict[str, Any], side: str) -> str:
    return f"{row[f'{side}_ms']:.2f} {row[f'{side}_variant'].removeprefix('float32 ')}"


def _spread(row: dict[str, Any]) -> str:
    median, low, high = row["variants_ms"][row["fqt_variant"]]
    return f"{median:.2f} ({low:.2f}-{high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--recipe", nargs="+", help="in place of each model's own")
    parser.add_argument("--batch", nargs="+", type=int, help="in place of 1 and 64, where a model has both")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="three turns, one thread, no torch.compile, batch 1")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    logging.getLogger("fqt").setLevel(logging.ERROR)
    compiled = not args.quick and any(map(shutil.which, ("c++", "g++", "clang++")))
    if not compiled:
        print("torch.compile is not measured: " + ("--quick" if args.quick else "no C++ compiler (apt-get install g++)"))
    before, rows = torch.get_num_threads(), []
    for name in args.model:
        _, recipes, batches = CASES[name]
        several = args.batch if args.batch and len(batches) > 1 else batches
        for batch in (1,) if args.quick else several:
            for threads in (1,) if args.quick else args.threads:
                turns = 3 if args.quick else 7
                rows += compare(name, args.recipe or recipes, batch=batch, threads=threads, turns=turns, compiled=compiled)
                print(show(rows[-len(args.recipe or recipes) :]), flush=True)
    torch.set_num_threads(before)
    print("\n" + show(rows))
    for what, why in {key: value for row in rows for key, value in row["missing"].items()}.items():
        print(f"{what} is not measured: {why}")
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
