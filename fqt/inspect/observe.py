"""Looking at a model while it trains: bytes kept for the backward, and what quantizing does to each layer's gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from fqt.layers import QuantizedLayer, quantized_layers
from fqt.layers.changing import watched
from fqt.quantizers.base import quantize


@dataclass
class SavedBytes:
    """What autograd keeps for the backward.

    Attributes:
        bytes: of distinct storages, counted whole; parameters and the tensors given as `exclude` are not counted.
        by_dtype: the same, by dtype name.
    """

    bytes: int = 0
    by_dtype: dict[str, int] = field(default_factory=dict)


@contextmanager
def count_saved_bytes(*exclude: Tensor) -> Iterator[SavedBytes]:
    """Count the bytes that forwards within the block save for backward.

    with fqt.count_saved_bytes() as saved:
        loss = model(x).sum()
    print(saved.bytes)
    """
    saved = SavedBytes()
    seen = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    kept: list[Tensor] = []  # alive until the end, so that no storage's address is counted for another

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen and not isinstance(tensor, nn.Parameter) and storage.nbytes():
            base = tensor._base
            if not isinstance(base, nn.Parameter):
                seen.add(storage.data_ptr())
                kept.append(tensor)
                saved.bytes += storage.nbytes()
                name = str(tensor.dtype).removeprefix("torch.")
                saved.by_dtype[name] = saved.by_dtype.get(name, 0) + storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


@contextmanager
def observe_gradients(model: nn.Module) -> Iterator[dict[str, dict[str, float]]]:
    """Measure each layer's gradient quantization error, E||Q(g) - g||^2 / ||g||^2, in the backwards within the block.

        with fqt.observe_gradients(model) as seen:
            model(x).sum().backward()
        seen["features.3"]["grad_input"]

    Forward and backward both belong in the block. Draws come from a key of their own: torch's generator and the training
    are not touched. A product whose gradient stays float has no entry; nor has a layer whose gradient is zero. Of an
    attention, the error is that of its three projections' gradients together.
    """
    seen: dict[str, dict[str, float]] = {}
    sums: dict[tuple[str, str], Tensor] = {}

    def measure(name: str, layer: QuantizedLayer, g: Tensor, together: bool) -> None:
        g_NPO = layer.canonical(g).float()
        key = torch.zeros((), dtype=torch.int64, device=g.device)
        power = g_NPO.double().square().sum()
        for product in ("grad_input", "grad_weight"):
            operand = layer.recipe.operand(product, "g")
            if operand is not None and power > 0:
                q, _ = quantize(g_NPO, operand.quantizer, "g", key=key, state=operand.state(layer.states), product=product)
                both = torch.stack([(q.decode() - g_NPO).double().square().sum(), power])
                if together:
                    both = sums[name, product] = sums.get((name, product), 0) + both
                seen.setdefault(name, {})[product] = float(both[0] / both[1])

    with ExitStack() as until_the_end:
        for name, layer in quantized_layers(model):
            look = partial(measure, name, layer)
            if hasattr(type(layer), "observer"):  # A layer of several products shows the gradient of each of them itself.
                layer.__dict__["observer"] = partial(look, together=True)
                until_the_end.callback(layer.__dict__.pop, "observer")
            else:
                until_the_end.callback(layer.register_forward_hook(_Watch(partial(look, together=False))).remove)
        yield seen


class _Watch:
    """A hook after a layer's forward that has the gradient of its output looked at."""

    def __init__(self, look: Callable[[Tensor], None]) -> None:
        self.look = look

    def __call__(self, _module: nn.Module, _inputs: object, output: object) -> Tensor | None:
        return watched(output, self.look) if isinstance(output, Tensor) and output.requires_grad else None
