"""What a run says: the names of its curves, its lines and its final table."""

import math
import shlex
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from train.checkpoint import NAME
from train.config import Config
from train.log import SKIPPED
from train.measure import Comparison
from train.ranks import Ranks
from train.step import Outcome
from train.tasks import Task

MIB = 2**20
PARTS = ("train", "valid", "test")
"""Of the data."""
UNREADABLE = "unreadable.txt"
"""File name, in a run's folder, of the images that were left out, with what is wrong with each."""


def sums(outcome: Outcome) -> dict[str, float]:
    """A step's values in the form that can be added up over steps and ranks; of a skipped one, its time alone.

    plain: of the steps in which nothing beside the training was measured.
    """
    made = 0 if outcome.skipped else outcome.items
    return {
        "steps": 1,
        "skipped": int(bool(outcome.skipped)),
        "items": made,
        "loss": outcome.loss * made if made else 0.0,
        "correct": outcome.correct if made else 0,
        "gradient_norm": outcome.gradient_norm if made else 0.0,
        "plain_steps": int(not outcome.gradient_error),
        "plain_time": 0.0 if outcome.gradient_error else outcome.ms["step"],
        **{f"{phase}_ms": ms for phase, ms in outcome.ms.items()},
    }


def epoch_means(sums: Mapping[str, float], seconds: float, task: Task) -> dict[str, float]:
    """An epoch's row; no number (NaN) where every step was skipped."""
    loss = sums["loss"] / (sums["items"] or math.nan)
    return {
        "loss": loss,
        f"train_{task.metric}": task.quality(loss, sums["correct"], sums["items"]),
        f"{task.items}_per_second": sums["items"] / seconds,
    }


def row_keys(task: Task) -> set[str]:
    """What the history says of an epoch."""
    parts = {f"{part}_{task.metric}" for part in PARTS}
    return {"epoch", "loss", "seconds", f"{task.items}_per_second", *parts}


def step_scalars(sums: Mapping[str, float], learning_rate: float, used_bytes: int, task: Task) -> dict[str, float]:
    """The step curves: means since the last point, over all ranks; memory is this process's, now."""
    made = sums["steps"] - sums["skipped"]
    means = {"loss/train": sums["loss"] / sums["items"], "gradient_norm": sums["gradient_norm"] / made} if made else {}
    return {
        **means,
        "learning_rate": learning_rate,
        f"{task.items}_per_second": 1e3 * sums["items"] / sums["step_ms"],
        "skipped_steps": sums["skipped"],
        "memory/used_mib": used_bytes / MIB,
        **{f"time/{name}": sums[name] / sums["steps"] for name in sums if name.endswith("_ms")},
    }


def speed_scalars(sums: Mapping[str, float], ms_fp32: float, time_saved: float, measuring: float) -> dict[str, float]:
    """The steps since the last point against the unconverted model's step, as it was timed last; and what the run gains by it.

    time_saved: seconds that all steps so far took less. measuring: seconds that timing the unconverted model took.
    """
    scalars = {"speedup/time_saved_s": time_saved, "speedup/measuring_s": measuring, "speedup/step_ms_fp32": ms_fp32}
    if sums["plain_steps"]:
        ms = sums["plain_time"] / sums["plain_steps"]
        scalars |= {"speedup/measured": ms_fp32 / ms, "speedup/step_ms": ms}
    return scalars


def gradient_scalars(outcome: Outcome) -> dict[str, float]:
    """Relative quantization error of each layer's gradient, E||Q(g) - g||^2 / ||g||^2."""
    return {
        f"gradient_error/{product}/{layer}": error
        for layer, products in outcome.gradient_error.items()
        for product, error in products.items()
    }


def comparison_scalars(comparison: Comparison | None, modelled: float) -> dict[str, float]:
    """Speed and memory against the unconverted model."""
    scalars = {"speedup/modelled": modelled}
    if comparison:
        scalars |= {
            "speedup/measured": comparison.speedup,
            "speedup/step_ms": comparison.ms,
            "speedup/step_ms_fp32": comparison.ms_fp32,
            "memory/saved_for_backward_mib": comparison.saved_bytes / MIB,
            "memory/saved_for_backward_mib_fp32": comparison.saved_bytes_fp32 / MIB,
        }
    return scalars


def epoch_scalars(row: Mapping[str, Any], peak_bytes: int, task: Task) -> dict[str, float]:
    """The epoch curves."""
    qualities = {f"{task.metric}/{part}": value for part, value in _qualities(row, task).items()}
    return {"loss/epoch": row["loss"], **qualities, "memory/peak_mib": peak_bytes / MIB}


def final_metrics(row: Mapping[str, Any], task: Task) -> dict[str, float]:
    """What TensorBoard's table of runs shows."""
    qualities = {f"{part}_{task.metric}": value for part, value in _qualities(row, task).items() if part != "train"}
    return {**qualities, "loss": row["loss"]}


def _qualities(row: Mapping[str, Any], task: Task) -> dict[str, float]:
    """The metric on each part of the data that there is."""
    found = {part: row[f"{part}_{task.metric}"] for part in PARTS}
    return {part: value for part, value in found.items() if value is not None}


def opening(config: Config, ranks: Ranks, folder: Path | None, epochs_done: int, position: int) -> str:
    """The first line: what is trained on what, and where its curves are."""
    processes = "" if ranks.world == 1 else f", {ranks.world} processes"
    line = f"{config.model.name} on {config.data.name}, recipe {config.recipe}, {ranks.device}{processes}"
    if epochs_done or position:
        line += f", resumed after epoch {epochs_done}" + (f" and {position} steps" if position else "")
    return f"{line}\n{_log_line(config, folder)}".rstrip()


def epoch_line(row: Mapping[str, Any], epochs: int, task: Task) -> str:
    """One line an epoch."""
    shown = "  ".join(f"{part} {task.shown(value)}" for part, value in _qualities(row, task).items())
    return (
        f"epoch {row['epoch']}/{epochs}  loss {row['loss']:.4f}  {shown}  "
        f"{row[f'{task.items}_per_second']:.0f} {task.items}/s  {row['seconds']:.1f} s"
    )


def closing(
    config: Config,
    task: Task,
    history: Sequence[Mapping[str, Any]],
    comparison: Comparison | None,
    modelled: float,
    time_saved: float,
    measuring: float,
    folder: Path | None,
) -> str:
    """The final table; its last line is the metric on the test set."""
    last = history[-1]
    table = Table(title=f"{config.name}: {config.recipe}", title_justify="left", show_header=False)
    table.add_row("model, data", f"{config.model.name}, {config.data.name}")
    table.add_row("epochs, time", f"{len(history)}, {sum(row['seconds'] for row in history):.1f} s")
    table.add_row("training loss", f"{last['loss']:.4f}")
    if comparison:
        table.add_row(
            "speed-up, measured",
            f"{comparison.speedup:.2f}x ({comparison.ms:.1f} ms a step, unconverted {comparison.ms_fp32:.1f} ms)",
        )
    table.add_row("speed-up, modelled", f"{modelled:.2f}x (multiply-adds times bits)")
    if comparison:
        table.add_row(
            "time saved", f"{time_saved:.1f} s in the training's steps; timing the unconverted model took {measuring:.1f} s"
        )
        table.add_row(
            "kept for backward",
            f"{comparison.saved_bytes / MIB:.1f} MiB (unconverted {comparison.saved_bytes_fp32 / MIB:.1f} MiB)",
        )
    for part, value in _qualities(last, task).items():
        if part != "test":
            table.add_row(f"{part} {task.metric}", task.shown(value))
    text = StringIO()
    Console(file=text, width=100).print(table)
    return f"\n{text.getvalue()}{_log_line(config, folder)}test {task.metric} {task.shown(last[f'test_{task.metric}'])}"


def skipped(reason: str, step: int, total: int) -> str:
    """Said of the first skipped step, and of the 2nd, 4th, 8th ...: a run that skips many does not fill the screen."""
    return f"step {step} left the weights as they were: {reason} ({total} skipped so far; {SKIPPED} lists them)"


def in_a_row(reason: str, streak: int) -> str:
    """What was wrong with a step, and with those before it."""
    return f"{reason} and in the {streak - 1} before" if streak > 1 else reason


def diverged(reason: str, step: int, folder: Path | None, saved_step: int | None) -> str:
    """Why the training stopped, and what to try."""
    return (
        f"Training stopped in step {step}: {reason.rstrip('.')}. {_kept(folder, saved_step)}"
        "Try a lower optimizer.lr, a longer schedule.warmup or training.clip_norm=1, or a recipe with more bits."
    )


def broken_off(reason: str, folder: Path | None, saved_step: int | None) -> str:
    """What ended the run from outside, and where it can go on."""
    return f"{reason.rstrip('.')}. {_kept(folder, saved_step)}".strip()


def _kept(folder: Path | None, saved_step: int | None) -> str:
    """Where the newest checkpoint is."""
    return f"{folder / NAME} holds the state after step {saved_step}. " if folder and saved_step is not None else ""


def stopped(signal_name: str, step: int, steps: int, folder: Path | None) -> str:
    """How a run that was asked to end goes on."""
    done = f"stopped by {signal_name} after step {step} of {steps}"
    if folder is None:
        return f"{done}; checkpoints are off (checkpoint.enabled), so nothing was kept."
    return f"{done}; the same command with --resume {shlex.quote(str(folder))} goes on from there."


def unreadable(paths: Mapping[str, str], folder: Path | None) -> str:
    """Said at the end of an epoch, where images were left out."""
    listed = f"; {folder / UNREADABLE} lists them" if folder else f": {', '.join(list(paths)[:5])}"
    return f"{len(paths)} images could not be read and were left out{listed}"


def _log_line(config: Config, folder: Path | None) -> str:
    if folder is None or not config.tracking.enabled:
        return ""
    return f"TensorBoard log in {folder}; open it with: tensorboard --logdir {shlex.quote(config.output)}\n"
