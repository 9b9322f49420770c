"""memory: what a training step holds at its peak, in float and converted: predicted without running it, and measured.

The prediction runs a step on meta tensors, which have shapes but no data, and follows every storage from its creation to its
release. What it cannot see is memory that a kernel takes for itself within one operator; the measurement can.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fqt.convert import revert
from fqt.cpu.library import fresh_memory
from fqt.inspect.profile import copied
from fqt.inspect.summary import backends
from fqt.inspect.table import aligned
from fqt.inspect.trial import Loss, MakeOptimizer, feed, floats_of, undisturbed
from fqt.layers import QuantizedLayer, quantized_layers
from fqt.recipe import Recipe

ROWS: tuple[str, ...] = (
    "master weights", "packed weights", "saved activations", "masks", "scales", "gradients", "optimizer", "workspace",
    "input and buffers",
)  # fmt: skip


@dataclass(frozen=True)
class Bytes:
    """One side, float or converted.

    Attributes:
        rows: name -> bytes alive at the predicted peak, by `ROWS`; they add up to `predicted`.
        measured: the peak of a real step, None if it was not run.
    """

    rows: dict[str, int]
    measured: int | None

    @property
    def predicted(self) -> int:
        return sum(self.rows.values())


@dataclass(frozen=True)
class Memory:
    """`float` is the unconverted model; `str()` is a table.

    note: what the prediction leaves out here; empty where it leaves out nothing that is known.
    """

    float: Bytes
    converted: Bytes
    note: str

    def __str__(self) -> str:
        lines: list[tuple[str, int, int]] = [(name, self.float.rows[name], self.converted.rows[name]) for name in ROWS]
        lines.append(("predicted peak", self.float.predicted, self.converted.predicted))
        if self.float.measured is not None and self.converted.measured is not None:
            lines.append(("measured peak", self.float.measured, self.converted.measured))
        table = [("", "float", "converted", "ratio")]
        table += [(name, _mib(a), _mib(b), f"{b / a:.3f}" if a else "") for name, a, b in lines]
        text = aligned(table, right=(1, 2, 3))
        rule = "-" * max(map(len, text))
        return "\n".join([text[0], rule, *text[1 : len(ROWS) + 1], rule, *text[len(ROWS) + 1 :], *filter(None, [self.note])])


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


def memory(
    model: nn.Module,
    input: object,
    *,
    recipe: str | Path | Recipe | None = None,
    optimizer: MakeOptimizer = torch.optim.Adam,
    loss: Loss | None = None,
    measure: bool = True,
) -> Memory:
    """The memory of a training step (forward, backward, optimizer) on `input`, of a model in float and converted.

        print(fqt.memory(model, images, recipe="fqt_1bit"))

    Rows are what is alive at the peak: where that is the end of the forward, no gradient is there yet. The peak is that of a
    later step, in which the optimizer has its state. Everything happens on copies.

    Args:
        input: as large as in training: a tensor, a tuple of arguments or a mapping of keyword arguments.
        recipe: of a model that is not converted. None: the model is converted.
        optimizer: makes one of the parameters; its own default options, or functools.partial(torch.optim.SGD, momentum=0.9).
        loss: of the model's output; None: the sum of its float tensors.
        measure: also run two real steps of each side, and measure the peak of the second: what torch's allocators gave out,
            the insides of operators included. False: only predict, for a batch that may not fit.

    Raises:
        ValueError: the model is converted and a recipe is given, or neither.
    """
    converted = copied(model, recipe)
    plain = revert(copy.deepcopy(converted))
    sides = []
    for side in (plain, converted):
        for parameter in side.parameters():
            parameter.grad = None
        with undisturbed(side):
            rows = _predict(side, input, optimizer, loss or _sum)
            sides.append(Bytes(rows, peak_bytes(side, input, optimizer, loss or _sum) if measure else None))
    return Memory(sides[0], sides[1], _note(converted))


def _note(model: nn.Module) -> str:
    served = {by.backend for _, layer in quantized_layers(model) for by in backends(layer).values()}
    if "reference" not in served:
        return ""
    return "the reference serves some products: what it takes within an operator, several floats a number, is not predicted"


def _sum(output: object) -> Tensor:
    return torch.stack([tensor.float().sum() for tensor in floats_of(output)]).sum()


# --- prediction ------------------------------------------------------------------------------------------------------


@dataclass
class _Storage:
    bytes: int
    row: str


class _Live(TorchDispatchMode):
    """Follows storages: each is booked in a row when an operator first returns it, and leaves when it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.layer: QuantizedLayer | None = None
        self.peak: list[_Storage] = []
        self._alive: dict[int, _Storage] = {}
        self._bytes = self._peak_bytes = 0

    def book(self, tensor: Tensor, row: str) -> None:
        """Count the tensor's storage, or move it to another row."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            self._alive[key].row = row
            return
        self._alive[key] = _Storage(storage.nbytes(), row)
        weakref.finalize(storage, self._release, key).atexit = False
        self._bytes += storage.nbytes()
        if self._bytes > self._peak_bytes:
            self._peak_bytes, self.peak = self._bytes, list(self._alive.values())

    def forget_peak(self) -> None:
        """Look for the peak from here on."""
        self._peak_bytes, self.peak = self._bytes, list(self._alive.values())

    def _release(self, key: int) -> None:
        self._bytes -= self._alive.pop(key).bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(leaf.is_meta for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)):  # of a loss: its targets
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        out = func(*args, **(kwargs or {}))
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        rows = ["saved activations" if self.phase == "forward" else "workspace"] * len(results)
        if func is torch.ops.fqt.quantize.default and self.phase == "forward":
            rows = [self._row_of_codes(args[0]), "scales", "scales", "scales", "masks"]
        for tensor, row in zip(results, rows, strict=True):
            if tensor.untyped_storage()._cdata not in self._alive:
                self.book(tensor, row)
        return out

    def _row_of_codes(self, x_NPC: Tensor) -> str:
        """Of the operand that a layer quantizes in its forward: told by its shape, (O, K, I) is the weight's."""
        if self.layer is None:
            return "saved activations"
        return "packed weights" if x_NPC.shape == self.layer.weight_OKI().shape else "saved activations"


def _predict(model: nn.Module, input: object, make_optimizer: MakeOptimizer, loss: Loss) -> dict[str, int]:
    """Row -> bytes alive at the peak of the second step."""
    model, input = _sketch(model), tree_map_only(Tensor, _meta, input)
    with _Live() as live:
        for _, layer in quantized_layers(model):
            _watch(layer, live)
        for tensor in (*(t for t in tree_leaves(input) if isinstance(t, Tensor)), *model.buffers()):
            live.book(tensor, "input and buffers")
        for parameter in model.parameters():
            live.book(parameter, "master weights")
        optimizer = make_optimizer(p for p in model.parameters() if p.requires_grad)
        for _ in range(2):
            live.forget_peak()
            live.phase = "forward"
            value = loss(feed(model, input))
            live.phase = "backward"
            value.backward()
            del value
            for parameter in model.parameters():
                if parameter.grad is not None:
                    live.book(parameter.grad, "gradients")
            live.phase = "optimizer"
            optimizer.step()
            for tensor in tree_leaves(list(optimizer.state.values())):
                if isinstance(tensor, Tensor):
                    live.book(tensor, "optimizer")
            optimizer.zero_grad(set_to_none=True)
        rows = dict.fromkeys(ROWS, 0)
        for storage in live.peak:
            rows[storage.row] += storage.bytes
    return rows


def _meta(tensor: Tensor) -> Tensor:
    """Shape, strides and dtype without memory."""
    return torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)


def _sketch(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers have no memory; shared ones stay shared."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(_meta(parameter.detach()), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = _meta(buffer)
    return copy.deepcopy(model, memo)


def _watch(layer: QuantizedLayer, live: _Live) -> None:
    """Tell `live` which layer computes."""
    layer.register_forward_pre_hook(lambda module, args: setattr(live, "layer", module))
    layer.register_forward_hook(lambda module, args, output: setattr(live, "layer", None))


# --- measurement -----------------------------------------------------------------------------------------------------


def peak_bytes(model: nn.Module, input: object, make_optimizer: MakeOptimizer, loss: Loss = _sum) -> int:
    """Peak bytes of tensors in the second step of a model, which is trained: give a copy.

    What is alive before the step (weights, buffers, input, the optimizer's state) plus the most that torch's allocators had
    given out since: on the CPU by the profiler's record of each allocation, on a GPU by the caching allocator's own count.
    """
    optimizer = make_optimizer(p for p in model.parameters() if p.requires_grad)

    def step() -> None:
        loss(feed(model, input)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(model, input, optimizer)}
    device = next(model.parameters()).device
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return sum(kept.values()) + torch.cuda.max_memory_allocated(device) - before
    profile = torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with fresh_memory(), profile as profiler:  # memory that is used again is not in torch's record
        step()
    now = most = 0
    recorded: Any = profiler.profiler
    for event in sorted(recorded.kineto_results.events(), key=lambda event: event.start_ns()):
        now += event.nbytes() if event.name() == "[memory]" else 0
        most = max(most, now)
    return sum(kept.values()) + most


def _tensors(model: nn.Module, input: object, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    leaves = [*model.parameters(), *model.buffers(), *tree_leaves(input), *tree_leaves(list(optimizer.state.values()))]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
