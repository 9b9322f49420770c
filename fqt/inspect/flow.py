"""What flows where in a model: what each layer reads, where the network begins and ends, and how many multiply-adds are whose.

One forward tells it: every parameter of a copy wants a gradient, so autograd's graph of that forward is the flow of data,
whatever the model's code looks like. Without an input, torch.fx tells it of models that can be traced.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from fqt.inspect.flops import low_bit, register_flops
from fqt.inspect.summary import matrix_weights
from fqt.inspect.trial import feed, floats_of, undisturbed
from fqt.layers import quantized_layers, refuse_frozen
from fqt.ops import PRODUCTS
from fqt.sharded import is_sharded_class

_ACTIVATIONS = nn.ReLU.__module__
# what a model's own code may raise where it is given torch.fx's proxies in place of tensors
_UNTRACEABLE = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError)


@dataclass
class Reads:
    """What a layer reads, all its calls together.

    Attributes:
        sources: the modules with matrices whose output reaches it with no other of these between.
        modules: the modules without a matrix that it passes on the way, as far as the nearest activation.
        operations: names of the functions on that way, autograd's ("ReluBackward0") or the model's ("relu").
        negative: whether one of the values is; None if no values were seen.
    """

    sources: set[str] = field(default_factory=set)
    modules: set[str] = field(default_factory=set)
    operations: set[str] = field(default_factory=set)
    negative: bool | None = None


@dataclass(frozen=True)
class Ends:
    """The names of the modules with matrices where a network begins and ends."""

    first: frozenset[str]
    last: frozenset[str]


@dataclass(frozen=True)
class Flow:
    """What one forward does.

    Attributes:
        reads: of each module with a matrix that was called.
        madds: multiply-adds of each of these, forward, all samples together; empty if nothing was computed.
        total: multiply-adds of all matrix products, those of no module's included.
    """

    reads: dict[str, Reads]
    madds: dict[str, int]
    total: int

    def readers(self, module: str) -> list[str]:
        """The modules with matrices that read a module's output."""
        return [name for name, reads in self.reads.items() if module in reads.modules]

    def ends(self) -> Ends:
        """First: what reads the output of no module with a matrix. Last: what no other one reads."""
        read = set().union(*(reads.sources for reads in self.reads.values()))
        first = frozenset(name for name, reads in self.reads.items() if not reads.sources)
        return Ends(first, frozenset(self.reads.keys() - read))


def flow_of(model: nn.Module, example: object) -> Flow:
    """The flow of one forward of `example` (a tensor, a tuple of arguments, a mapping of keyword arguments), on a copy."""
    from torch.utils.flop_counter import FlopCounterMode  # not at import: it loads Triton

    register_flops()
    trial = copy.deepcopy(model)
    for parameter in trial.parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_()
    modules = dict(trial.named_modules())
    holders = {name: module for name, module in modules.items() if matrix_weights(module)}
    reads: dict[str, Reads] = {}
    made: dict[Any, list[str]] = {}  # autograd's node -> the modules whose output it is
    of_weight = {id(weight): name for name, module in holders.items() for weight in matrix_weights(module)}

    def names(node: Any) -> list[str]:
        weight = getattr(node, "variable", None)
        return made.get(node, []) if weight is None else [of_weight[id(weight)]] if id(weight) in of_weight else []

    def before(name: str) -> Callable:
        def hook(module: nn.Module, args: object, named: object) -> None:
            tensors = floats_of((args, named))
            found = reads.setdefault(name, Reads())
            for tensor in tensors:
                if not tensor.is_meta:
                    found.negative = bool(found.negative) or bool((tensor < 0).any())
            _walk([t.grad_fn for t in tensors], lambda node: [n for n, _ in node.next_functions], names, _title, modules, found)

        return hook

    def after(name: str) -> Callable:
        def hook(module: nn.Module, args: object, output: object) -> None:
            for tensor in floats_of(output):
                if tensor.grad_fn is not None:
                    made.setdefault(tensor.grad_fn, []).append(name)

        return hook

    for name, module in modules.items():
        if name in holders:
            module.register_forward_pre_hook(before(name), with_kwargs=True)
        module.register_forward_hook(after(name))
    with undisturbed(model), FlopCounterMode(display=False) as counter:
        feed(trial, tree_map_only(Tensor, torch.clone, example))
    flops, root = counter.get_flop_counts(), type(trial).__name__
    madds = {name: sum(flops.get(f"{root}.{name}" if name else root, {}).values()) // 2 for name in reads}
    return Flow(reads, madds, counter.get_total_flops() // 2)


def float_multiply_adds(model: nn.Module, example: object) -> int:
    """Multiply-adds that torch computes in float in one forward, on a copy: of a converted model all but its low-bit ones."""
    counts = _flops(model, example)["Global"]
    return (sum(counts.values()) - low_bit(counts)) // 2


def modelled_speedup(model: nn.Module, example: object) -> float:
    """What multiply-adds x bits promise of a step: the cost of float32 over that at each product's bits and kept fraction.

    Every matrix product of one forward counts, all samples and calls together: those of no layer (attention's scores) and of
    layers that stay float at 32 bits. The gradients' two products count what the forward's does. Not measured.

    Args:
        model: converted, or not (1.0).
        example: an input of the model: a tensor, a tuple of arguments or a mapping of keyword arguments.
    """
    refuse_frozen(model, "modelled_speedup")
    flops, layers = _flops(model, example), dict(quantized_layers(model))
    root, total = type(model).__name__, sum(flops["Global"].values())
    if not total:
        return 1.0
    cost = 32.0 * len(PRODUCTS) * total
    for name, layer in layers.items():
        of_layer = flops.get(f"{root}.{name}" if name else root, {})
        within = [f"{root}.{name}.{child}" if name else f"{root}.{child}" for child in layer.borrows]
        if layer.recipe.low_bit("output"):
            count = low_bit(of_layer) - sum(low_bit(flops.get(child, {})) for child in within)
        else:  # its product is among torch's own
            count = sum(of_layer.values()) - sum(sum(flops.get(child, {}).values()) for child in within)
        low = [product for product in PRODUCTS if layer.recipe.bits(product) < 32]
        cost -= count * sum(32 - layer.recipe.bits(product) * layer.recipe.kept(product) for product in low)
    return 32.0 * len(PRODUCTS) * total / cost


def _flops(model: nn.Module, example: object) -> dict[str, dict[Any, int]]:
    """Module -> operator -> count of one forward, on a copy; "Global" is the whole model."""
    from torch.utils.flop_counter import FlopCounterMode  # not at import: it loads Triton

    register_flops()
    with undisturbed(model), FlopCounterMode(display=False) as counter:
        feed(copy.deepcopy(model), tree_map_only(Tensor, torch.clone, example))
    return {name: dict(counts) for name, counts in counter.get_flop_counts().items()} or {"Global": {}}


def traced(model: nn.Module) -> fx.Graph | None:
    """The graph that torch.fx finds, modules with matrices and those of torch.nn its leaves; None of a model that it cannot
    trace."""
    holders = {name for name, module in model.named_modules() if matrix_weights(module)}

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return module_qualified_name in holders or super().is_leaf_module(m, module_qualified_name)

        def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
            # past the hooks of fully_shard, which would begin a real forward
            return super().call_module(m, m.forward if is_sharded_class(type(m)) else forward, args, kwargs)

    try:
        with warnings.catch_warnings(action="ignore"):
            return Tracer().trace(model)
    except _UNTRACEABLE:
        return None


def traced_flow(model: nn.Module) -> Flow | None:
    """The flow that torch.fx finds, without values and multiply-adds; None of a model that it cannot trace."""
    modules = dict(model.named_modules())
    holders = {name: module for name, module in modules.items() if matrix_weights(module)}
    graph = traced(model)
    if graph is None:
        return None

    def names(node: fx.Node) -> list[str]:
        if node.op == "get_attr":
            return [name for name in holders if str(node.target).startswith(f"{name}.")]
        return [str(node.target)] if node.op == "call_module" else []

    def title(node: fx.Node) -> str:
        return getattr(node.target, "__name__", str(node.target)) if node.op.startswith("call_") else ""

    reads: dict[str, Reads] = {}
    for node in graph.nodes:
        if node.op == "call_module" and node.target in holders:
            found = reads.setdefault(node.target, Reads())
            _walk(node.all_input_nodes, lambda node: node.all_input_nodes, names, title, modules, found)
    return Flow(reads, {}, 0)


def _walk(
    start: Iterable[Any],
    inputs: Callable[[Any], Iterable[Any]],
    names: Callable[[Any], list[str]],
    title: Callable[[Any], str],
    modules: dict[str, nn.Module],
    found: Reads,
) -> None:
    """Go back from some nodes of a graph as far as the modules with matrices, and note what is passed."""
    waiting, seen = [(node, False) for node in start], set()
    while waiting:
        node, behind = waiting.pop()
        if node is None or (node, behind) in seen:
            continue
        seen.add((node, behind))
        here = names(node)
        sources = [name for name in here if name in modules and matrix_weights(modules[name])]
        found.sources.update(sources)
        if not behind:
            found.modules.update(name for name in here if name not in sources)
        if sources:
            continue
        if not behind:
            found.operations.add(title(node))
        behind = behind or any(type(modules[name]).__module__ == _ACTIVATIONS for name in here)
        waiting += [(input, behind) for input in inputs(node)]


def _title(node: Any) -> str:
    return node.name()


def uncalled(model: nn.Module, flow: Flow | None) -> list[str]:
    """The converted layers that a forward did not call."""
    layers = {} if flow is None else dict(quantized_layers(model))
    borrowed = {f"{name}.{child}" for name, layer in layers.items() for child in layer.borrows}
    return [name for name in layers if flow is not None and name not in flow.reads and name not in borrowed]
