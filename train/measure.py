"""What a run measures beside its loss: speed and memory against the unconverted model, and what each layer does.

Nothing here disturbs the training: it works on copies, and gives the random generators back as it found them.
"""

import copy
import resource
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn

import fqt
from fqt.inspect.summary import copy_macs
from train import checkpoint
from train.step import Parts, Step
from train.tasks import Task

WARM_UP = 2
"""Steps of each model before the timed ones."""


@dataclass(frozen=True)
class Comparison:
    """This model against the same model unconverted, on the same batches in the same run.

    ms: median time of a whole optimizer step. bytes: what one forward keeps for the backward, parameters not counted.
    """

    ms: float
    ms_fp32: float
    saved_bytes: int
    saved_bytes_fp32: int

    @property
    def speedup(self) -> float:
        """How many times faster than the unconverted model: measured, not modelled."""
        return self.ms_fp32 / self.ms


def compare(
    converted: nn.Module, unconverted: nn.Module, make_step: Callable[[nn.Module], Step], batches: Iterable[Parts]
) -> Comparison:
    """Trains copies of both models on the same batches, in turn, and takes the medians after WARM_UP steps.

    Their learning rate is zero: it costs the same time, and a batch that would diverge without the schedule's warm-up
    cannot.
    """
    with undisturbed():
        steps = [make_step(copy.deepcopy(model).train()) for model in (converted, unconverted)]
        for step in steps:
            for group in step.optimizer.param_groups:
                group["lr"] = 0.0
        saved, times = [0, 0], ([], [])
        for index, parts in enumerate(batches):
            for which, step in enumerate(steps):
                if index == 0:
                    saved[which] = saved_bytes(step, *parts[0])
                outcome = step(parts)
                if index >= WARM_UP:
                    times[which].append(outcome.ms["step"])
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return Comparison(statistics.median(times[0]), statistics.median(times[1]), saved[0], saved[1])


def baseline_ms(unconverted: nn.Module, make_step: Callable[[nn.Module], Step], parts: Parts, count: int) -> float:
    """Median time of a step of the unconverted model on a batch, of so many after one of warm-up; as in `compare`."""
    with undisturbed():
        step = make_step(copy.deepcopy(unconverted).train())
        for group in step.optimizer.param_groups:
            group["lr"] = 0.0
        return statistics.median([step(parts).ms["step"] for _ in range(count + 1)][1:])


def saved_bytes(step: Step, x: Tensor, y: Tensor) -> int:
    """Bytes that a forward keeps for the backward."""
    with fqt.count_saved_bytes() as saved:
        score = step.task.forward(step.model, x, y, autocast=step.config.autocast)
    del score
    return saved.bytes


def describe(model: nn.Module, probe: nn.Module, task: Task, x: Tensor) -> tuple[fqt.Summary, float]:
    """The model's summary and its modelled speed-up, after a forward of a copy of it, `probe`, that tells the sizes."""
    probe.train()
    with undisturbed(), torch.no_grad():
        task.logits(probe, x)
    copy_macs(probe, model)  # which a compiled forward would not count
    return fqt.summary(probe), fqt.modelled_speedup(probe, task.inputs(x))


def layer_bits(model: nn.Module) -> dict[str, float]:
    """Bits of each product, by layer, under the names of their curves."""
    rows = fqt.summary(model).rows
    return {f"bits/{row.name}/{product}": float(bits) for row in rows for product, bits in row.bits.items()}


def zero_fractions(model: nn.Module) -> dict[str, float]:
    """The share of exact zeros among the quantized weights, by layer."""
    scalars: dict[str, float] = {}
    for name, layer in fqt.quantized_layers(model):
        weight = layer.quantized_weight()
        if weight is not None:
            scalars[f"zero_fraction/{name}"] = (weight.decode() == 0).float().mean().item()
    return scalars


def used_bytes(device: torch.device) -> int:
    """The memory in use now: on a GPU the tensors', else the process's, data and libraries included."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def peak_bytes(device: torch.device) -> int:
    """The most memory used so far: on a GPU by torch since the comparison, else by the process with its comparison."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def undisturbed() -> Iterator[None]:
    """Whatever the block draws, the random generators are afterwards as they were."""
    state = checkpoint.generators()
    try:
        yield
    finally:
        checkpoint.restore_generators(state)
