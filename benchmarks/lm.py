"""Does a language model train in low bits? Loss on held-out text of a character GPT, at the best of a few learning rates.

    python -m benchmarks.lm TEXT [--recipes fp32 int8 ...] [--blocks 3] [--width 128] [--steps 400] [--json F]
    python -m benchmarks.lm TEXT --quick       a few steps of a tiny model; a smoke test, not evidence

The model is the training program's `gpt_small` of `blocks` blocks, `width` wide, over the characters of the text file; every
linear layer of the blocks is converted, whatever the recipe's rules say, the embeddings and the head are float. AdamW, a tenth
of the steps warm-up, then a cosine to zero. Of the text the first 80 % is trained on, the next 10 % chooses each recipe's rate
with a seed of its own, the last 10 % is looked at with the other seeds at that rate. All recipes see the same batches.

Loss is cross-entropy in nats a character. Speed: the median step against float32's, both in this run, in turns. Each finished
run is a line of --log at once, and a run whose line is there is not repeated.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fqt
from benchmarks.common import table, write_json
from benchmarks.runs import Row, run_all
from train.decoders import Decoder

RECIPES = ("fp32", "int8", "int8_token", "int6", "int4", "bitnet", "fqt_w1a1g6")
RATES = (5e-4, 1.5e-3, 4e-3)
SEED_OF_RATES = 100
LENGTH = 128
HEAD = 32


@dataclass(frozen=True)
class Job:
    """One training run. `part`: "valid" or "test", the text whose loss it reports."""

    text: str
    recipe: str
    rate: float
    seed: int
    blocks: int
    width: int
    batch: int
    steps: int
    part: str


def load(path: str) -> tuple[dict[str, Tensor], int]:
    """The text's three parts as numbers of characters, and how many characters there are."""
    text = Path(path).read_text()
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    coded = torch.tensor([number[character] for character in text])
    first, second = int(0.8 * len(coded)), int(0.9 * len(coded))
    return {"train": coded[:first], "valid": coded[first:second], "test": coded[second:]}, len(number)


def batch_of(text: Tensor, batch: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Random stretches, or without a generator the same ones every time; each character's next one is its label."""
    most = len(text) - LENGTH
    if generator is None:
        starts = torch.linspace(0, most - 1, batch).long()
    else:
        starts = torch.randint(most, (batch,), generator=generator)
    stretches = torch.stack([text[start : start + LENGTH + 1] for start in starts])
    return stretches[:, :-1], stretches[:, 1:]


def made(job: Job, characters: int) -> tuple[Decoder, torch.optim.Optimizer]:
    """The model, converted, and its optimizer."""
    torch.manual_seed(job.seed)
    model = Decoder(characters, characters, LENGTH, blocks=job.blocks, width=job.width, heads=job.width // HEAD, llama=False)
    if job.recipe != "fp32":
        fqt.convert(model.blocks, fqt.load_recipe(job.recipe).everywhere())
    return model, torch.optim.AdamW(model.parameters(), lr=job.rate, weight_decay=0.1, betas=(0.9, 0.95), fused=True)


def loss_of(model: nn.Module, text: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of the next character."""
    return cross_entropy(model(text[0]).flatten(0, 1), text[1].flatten())


def train(job: Job) -> Row:
    """Run a job on one thread."""
    torch.set_num_threads(1)
    logging.getLogger("fqt").setLevel(logging.ERROR)
    parts, characters = load(job.text)
    model, optimizer = made(job, characters)
    warm_up = max(1, job.steps // 10)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm_up, total_iters=warm_up)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, job.steps - warm_up))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [warm_up])
    generator = torch.Generator().manual_seed(job.seed)
    start = time.perf_counter()
    for _ in range(job.steps):
        loss_of(model, batch_of(parts["train"], job.batch, generator)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        loss = float(loss_of(model, batch_of(parts[job.part], 256)))
    return {**asdict(job), "loss": loss, "seconds": seconds}


def step_ratios(job: Job, recipes: Sequence[str], rounds: int) -> dict[str, float]:
    """Float32's median step over each recipe's, taken in turns."""
    parts, characters = load(job.text)
    sides = {name: made(replace(job, recipe=name), characters) for name in dict.fromkeys(["fp32", *recipes])}
    text = batch_of(parts["train"], job.batch)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, (model, optimizer) in sides.items():
            start = time.perf_counter()
            loss_of(model, text).backward()
            optimizer.step()
            optimizer.zero_grad()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(spent[1:]) for name, spent in times.items()}
    return {name: medians["fp32"] / medians[name] for name in recipes}


def measure(job: Job, recipes: Sequence[str], seeds: Sequence[int], *, log: Path, workers: int, rounds: int) -> list[Row]:
    """A row for each recipe: its rate, the losses of the seeds at that rate, and the ratio of steps."""
    searches = [replace(job, recipe=name, rate=rate, seed=SEED_OF_RATES, part="valid") for name in recipes for rate in RATES]
    found = run_all(searches, train, log, workers, said)
    best = {name: min((row for row in found if row["recipe"] == name), key=lambda row: row["loss"])["rate"] for name in recipes}
    finals = [replace(job, recipe=name, rate=best[name], seed=seed, part="test") for seed in seeds for name in recipes]
    results = run_all(finals, train, log, workers, said)
    ratios = step_ratios(job, recipes, rounds)
    rows = []
    for name in recipes:
        losses = [row["loss"] for row in results if row["recipe"] == name]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        rows.append(
            {"recipe": name, "rate": best[name], "loss": statistics.mean(losses), "stdev": spread, "losses": losses,
             "speedup": ratios[name], **{key: getattr(job, key) for key in ("blocks", "width", "batch", "steps")}}
        )  # fmt: skip
    return rows


def said(row: Row) -> str:
    """What is printed of a finished run."""
    run = f"{row['recipe']} lr {row['rate']:g} seed {row['seed']}"
    return f"{run}: {row['loss']:.4f} on {row['part']} in {row['seconds']:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="any text file, of a million characters or so")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--width", type=int, default=128, help=f"a multiple of {HEAD}")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--quick", action="store_true", help="three steps, one seed, a tiny model: no evidence")
    parser.add_argument("--log", type=Path, help="lines of finished runs (default: runs/lm.jsonl, or lm-quick)")
    parser.add_argument("--json", type=Path, help="write the table's rows here")
    args = parser.parse_args()
    if args.width % HEAD:
        parser.error(f"--width is {args.width}, not a multiple of {HEAD}, the width of an attention head")
    blocks, width, batch, steps = (1, HEAD, 4, 3) if args.quick else (args.blocks, args.width, args.batch, args.steps)
    job = Job(str(args.text), "fp32", 0.0, 0, blocks, width, batch, steps, "test")
    log = args.log or Path("runs") / f"lm{'-quick' if args.quick else ''}.jsonl"
    seeds = (0,) if args.quick else (0, 1, 2)
    rows = measure(job, args.recipes, seeds, log=log, workers=args.workers, rounds=2 if args.quick else 15)
    exact = next((row["loss"] for row in rows if row["recipe"] == "fp32"), None)
    print(
        table(
            ["recipe", "learning rate", "test loss, nats", "stdev", "against fp32", "step, times fp32's speed"],
            [
                [row["recipe"], f"{row['rate']:g}", f"{row['loss']:.4f}", f"{row['stdev']:.4f}",
                 "" if exact is None else f"{row['loss'] - exact:+.4f}", f"{row['speedup']:.2f}"]
                for row in rows
            ],
        )
    )  # fmt: skip
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
