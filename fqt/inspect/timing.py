"""How long each product of a layer takes in float32 and in low bits: on this machine, on the shapes that reach the layer.

Both sides go through the layer's own forward and backward, so the low-bit side pays for its quantizing, its layouts and
autograd as it does in a training step. A product is timed alone by asking for that gradient alone.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fqt.inspect.summary import backends
from fqt.inspect.table import aligned
from fqt.inspect.trial import feed, synchronize, undisturbed
from fqt.layers import QuantizedLayer, adapter_of, quantized_class, quantized_layers
from fqt.ops import PRODUCTS

_ROUNDS = 5


@dataclass(frozen=True)
class Timing:
    """A product of a layer, all calls of one forward together.

    Attributes:
        input: shape of the layer's input, of its first call.
        calls: how often a forward calls the layer.
        float_ms: milliseconds in float32, of a convolution in the faster of NCHW and channels_last.
        low_ms: milliseconds as converted, quantizing included, in the memory format that reaches the layer.
        backend: what serves the product, "torch" where the recipe leaves it in float.
    """

    layer: str
    kind: str
    input: tuple[int, ...]
    calls: int
    product: str
    float_ms: float
    low_ms: float
    backend: str


@dataclass(frozen=True)
class Profile:
    """`rows` is data, one a layer and product that a training step computes; `str()` is a table, one line a layer."""

    rows: list[Timing]

    def speedups(self) -> dict[str, float]:
        """Layer -> float time over low-bit time, its products together."""
        layers = dict.fromkeys(row.layer for row in self.rows)
        return {name: self._sum(name, "float_ms") / self._sum(name, "low_ms") for name in layers}

    def _sum(self, layer: str | None, side: str) -> float:
        return sum(getattr(row, side) for row in self.rows if layer in (None, row.layer))

    def __str__(self) -> str:
        head = ["layer", "kind", "input", *(f"{product} ms" for product in PRODUCTS), "total ms", "speedup", "backend"]
        table = [head]
        for name, speedup in self.speedups().items():
            by_product = {row.product: row for row in self.rows if row.layer == name}
            row = next(iter(by_product.values()))
            cells = [_pair(by_product[p].float_ms, by_product[p].low_ms) if p in by_product else "" for p in PRODUCTS]
            served = "+".join(dict.fromkeys(timing.backend for timing in by_product.values()))
            shape = "x".join(map(str, row.input)) + (f", {row.calls} calls" if row.calls > 1 else "")
            total = _pair(self._sum(name, "float_ms"), self._sum(name, "low_ms"))
            table.append([name, row.kind, shape, *cells, total, f"{speedup:.2f}x", served])
        both = self._sum(None, "float_ms"), self._sum(None, "low_ms")
        table.append(["total", "", "", "", "", "", _pair(*both), f"{both[0] / both[1]:.2f}x", ""])
        lines = aligned(table)
        rule = "-" * max(map(len, lines))
        legend = "milliseconds: float32 / low bits, quantizing included"
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], legend])


def _pair(float_ms: float, low_ms: float) -> str:
    return f"{float_ms:.2f} / {low_ms:.2f}"


@dataclass(frozen=True)
class Call:
    """What reaches a layer."""

    shape: tuple[int, ...]
    channels_last: bool
    needs_gradient: bool


def measure(model: nn.Module, input: object, *, seconds: float) -> Profile:
    """Time the converted layers of a model that may be changed: a copy. Each layer is given `seconds`, or five rounds."""
    with undisturbed(model):
        calls = record_calls(model, input)
        rows = []
        for name, layer in quantized_layers(model):
            if calls[name]:
                rows += time_layer(name, layer, calls[name], seconds)
    return Profile(rows)


def record_calls(model: nn.Module, input: object) -> dict[str, Counter[Call]]:
    """Layer name -> the calls that one forward makes of it."""
    calls: dict[str, Counter[Call]] = {name: Counter() for name, _ in quantized_layers(model)}

    def watch(name: str, layer: QuantizedLayer):
        def hook(_module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            x = args[0] if args else next(iter(named.values()))
            channels_last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
            calls[name][Call(tuple(x.shape), channels_last, x.requires_grad)] += 1

        return layer.register_forward_pre_hook(hook, with_kwargs=True)

    handles = [watch(name, layer) for name, layer in quantized_layers(model)]
    feed(model, input)
    for handle in handles:
        handle.remove()
    return calls


def time_layer(name: str, layer: QuantizedLayer, calls: Counter[Call], seconds: float) -> list[Timing]:
    """A timing of each product that the calls pay for, on layers of the same sizes. Within `undisturbed`: it draws."""
    served, sums = {product: by.backend for product, by in backends(layer).items()}, {}
    for call, count in calls.items():
        sides = [_products(layer, call, low=True, channels_last=call.channels_last)]
        formats = (False, True) if layer.images and len(call.shape) == 4 else (False,)
        sides += [_products(layer, call, low=False, channels_last=channels_last) for channels_last in formats]
        functions = [function for side in sides for function in side.values()]
        medians = in_turns(functions, layer.weight.device, seconds / len(calls))
        low, *floats = (medians[i : i + len(sides[0])] for i in range(0, len(medians), len(sides[0])))
        for product, float_ms, low_ms in zip(sides[0], min(floats, key=sum), low, strict=True):
            before = sums.get(product, (0.0, 0.0))
            sums[product] = (before[0] + count * float_ms, before[1] + count * low_ms)
    first, kind = next(iter(calls)), type(layer).__name__
    return [
        Timing(name, kind, first.shape, calls.total(), product, float_ms, low_ms, served.get(product, "torch"))
        for product, (float_ms, low_ms) in sums.items()
    ]


def _products(layer: QuantizedLayer, call: Call, *, low: bool, channels_last: bool) -> dict[str, Callable[[], object]]:
    """Product -> a function that computes it, on random numbers, for the products that the call pays for."""
    memory = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(call.shape, device=layer.weight.device).contiguous(memory_format=memory)
    made = _twin(layer, low).to(memory_format=memory).train(layer.training)
    made.requires_grad_(layer.weight.requires_grad)
    of_step = x.detach().requires_grad_(call.needs_gradient)
    functions: dict[str, Callable[[], object]] = {"output": lambda: _output(made, of_step)}
    g = torch.randn_like(_output(made, x).detach())
    if call.needs_gradient:
        frozen, leaf = _twin(layer, low).to(memory_format=memory).requires_grad_(False), x.detach().requires_grad_()
        y_of_x = _output(frozen, leaf)
        functions["grad_input"] = lambda: torch.autograd.grad(y_of_x, leaf, g, retain_graph=True)
    if layer.weight.requires_grad:
        y_of_w = _output(made, x)
        functions["grad_weight"] = lambda: torch.autograd.grad(y_of_w, list(made.parameters()), g, retain_graph=True)
    return functions


def _output(layer: nn.Module, x: Tensor) -> Tensor:
    adapter = adapter_of(layer)
    assert adapter is not None
    return adapter.exercise(layer, x)  # type: ignore[arg-type]


def _twin(layer: QuantizedLayer, low: bool) -> nn.Module:
    """A float32 layer of the same sizes, converted or plain, free of the layer's hooks and parametrizations."""
    kind = quantized_class(layer.plain) if low else layer.plain
    made = layer.like(kind).to(layer.weight.device, torch.float32)
    if isinstance(made, QuantizedLayer):
        made.recipe, made.backend = layer.recipe, layer.backend
    return made


def in_turns(
    functions: Sequence[Callable[[], object]], device: torch.device, seconds: float, rounds: int = _ROUNDS
) -> list[float]:
    """The median of each function's time in ms, called in turns after a warm-up: what else the machine does hits all alike.

    Args:
        seconds, rounds: the turns go on until both have been spent.
    """
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    start = time.perf_counter()
    while len(times[0]) < rounds or time.perf_counter() - start < seconds:
        for function, spent in zip(functions, times, strict=True):
            synchronize(device)
            begin = time.perf_counter()
            function()
            synchronize(device)
            spent.append(1e3 * (time.perf_counter() - begin))
    return [statistics.median(spent) for spent in times]
