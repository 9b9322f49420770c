"""What layers read, from the BatchNorms in front of them alone: no data.

A channel behind a BatchNorm is taken to be normal, its bias the mean and its |weight| the standard deviation (Nagel et al.,
"Data-Free Quantization", arXiv 1906.04721, section 4.2.1 and appendix C), as far as `DEVIATIONS` from the mean (their
section 5 sets activation ranges so, n = 6). Activations cut it off; where two branches are added their means and variances
are, cut ones by the moments of a clipped normal distribution (their appendix C).
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from fqt.inspect.flow import traced
from fqt.layers import QuantizedLayer
from fqt.start.ranges import Histogram

DEVIATIONS = 6.0
_POINTS = 1025

_CUTS: dict[object, tuple[float, float]] = {
    "relu": (0.0, math.inf), "relu_": (0.0, math.inf), "relu6": (0.0, 6.0), "gelu": (-0.17, math.inf),
    "silu": (-0.2785, math.inf), "hardswish": (-0.375, math.inf), "mish": (-0.3088, math.inf),
}  # fmt: skip
"""Name of an activation -> between which values it leaves its input; of smooth ones, the range of their output."""
_PASS = {
    "identity", "dropout", "dropout2d", "maxpool1d", "maxpool2d", "avgpool1d", "avgpool2d", "adaptiveavgpool1d",
    "adaptiveavgpool2d", "adaptivemaxpool2d", "flatten", "contiguous", "clone", "detach", "max_pool2d", "avg_pool2d",
    "adaptive_avg_pool2d", "zeropad2d", "fusedmaxpool2d",
}  # fmt: skip
"""Names of modules and functions whose outputs lie among their inputs (or zero)."""
_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}


@dataclass(frozen=True)
class Normal:
    """A normal distribution for each channel, (C,), of which activations have left what lies from low to high."""

    mean: Tensor
    deviation: Tensor
    low: float = -math.inf
    high: float = math.inf

    def cut(self, low: float, high: float) -> Normal:
        return replace(self, low=max(low, min(self.low, high)), high=min(high, max(self.high, low)))

    def values(self) -> Tensor:
        """(points, C): the value at the middle of each of so many equal shares of the distribution."""
        share = (torch.arange(_POINTS, dtype=torch.float64) + 0.5) / _POINTS
        normal = math.sqrt(2) * torch.erfinv(2 * share - 1)
        return (self.mean.double() + self.deviation.double() * normal.unsqueeze(1)).clamp(self.low, self.high)

    def added(self, other: Normal) -> Normal | None:
        """The sum of independent ones; None where their channels are not the same."""
        if self.mean.shape != other.mean.shape:
            return None
        values = self.values(), other.values()
        variance = sum(v.var(0, correction=0) for v in values)
        return Normal(sum(v.mean(0) for v in values), variance.sqrt())  # type: ignore[arg-type, union-attr]

    def ends(self) -> tuple[float, float]:
        """The smallest and the largest value, `DEVIATIONS` from the mean."""
        low, high = ((self.mean + far * self.deviation).clamp(self.low, self.high) for far in (-DEVIATIONS, DEVIATIONS))
        return float(low.min()), float(high.max())


def seen_behind_batchnorms(model: nn.Module) -> dict[str, Histogram]:
    """Name of a converted layer -> what it reads; of those layers that nothing but BatchNorms feeds.

    Raises:
        ValueError: torch.fx cannot trace the model.
    """
    graph = traced(model)
    if graph is None:
        raise ValueError(
            f"torch.fx cannot trace this {type(model).__name__}, so nothing tells which BatchNorm is in front of which layer: "
            f"give a loader"
        )
    modules = dict(model.named_modules())
    known: dict[fx.Node, Normal] = {}
    found: dict[str, list[Normal | None]] = {}
    for node in graph.nodes:
        inputs = [known.get(argument) for argument in node.all_input_nodes]
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, QuantizedLayer):
            found.setdefault(str(node.target), []).extend(inputs)
            continue
        made = _behind(node, module, inputs)
        if made is not None:
            known[node] = made
    return {name: _histogram([each for each in read if each]) for name, read in found.items() if read and all(read)}


def _histogram(read: list[Normal]) -> Histogram:
    """What a layer reads in all its calls together."""
    made = Histogram()
    for each in read:
        made.add(each.values())
    lows, highs = zip(*(each.ends() for each in read), strict=True)
    made.low, made.high = min(lows), max(highs)
    return made


def _behind(node: fx.Node, module: nn.Module | None, inputs: list[Normal | None]) -> Normal | None:
    if isinstance(module, _NormBase) and "instance" not in type(module).__name__.lower():
        weight, bias = (None if p is None else p.detach().float().cpu() for p in (module.weight, module.bias))
        channels = module.num_features
        deviation = torch.ones(channels) if weight is None else weight.abs()
        return Normal(torch.zeros(channels) if bias is None else bias, deviation)
    if not inputs or inputs[0] is None:
        return None
    target: object = node.target
    name = type(module).__name__.lower() if module is not None else getattr(target, "__name__", str(target))
    if len(node.all_input_nodes) == 2:
        adds = node.op != "call_module" and (target in _ADD or name in _ADD)
        return inputs[0].added(inputs[1]) if adds and inputs[1] is not None else None
    if isinstance(module, nn.Hardtanh):
        return inputs[0].cut(module.min_val, module.max_val)
    if name in _CUTS:
        return inputs[0].cut(*_CUTS[name])
    return inputs[0] if name in _PASS else None
