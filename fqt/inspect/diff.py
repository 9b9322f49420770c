"""diff: how far each layer's three products in low bits are from the same products in float."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fqt.convert import revert
from fqt.inspect.table import aligned
from fqt.inspect.trial import feed, floats_of, undisturbed
from fqt.layers import QuantizedLayer, quantized_layers, refuse_frozen

PRODUCTS = ("output", "grad_input", "grad_weight")


@dataclass(frozen=True)
class Error:
    """A product in low bits, q, against float, f.

    signal, noise: the squares of f and of q - f, added up. product, size: <q, f>, and the squares of q.
    """

    signal: float = 0.0
    noise: float = 0.0
    product: float = 0.0
    size: float = 0.0

    @classmethod
    def of(cls, low: Tensor, high: Tensor) -> Error:
        """Of one result of any shape."""
        q, f = low.double(), high.double()
        sums = (f.square().sum(), (q - f).square().sum(), (q * f).sum(), q.square().sum())
        return cls(*torch.stack(sums).tolist())

    def __add__(self, other: Error) -> Error:
        return Error(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def decibel(self) -> float:
        """Signal to noise, 10 log10(|f|^2 / |q - f|^2): infinite where nothing differs."""
        return math.inf if self.noise == 0 else 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    @property
    def cosine(self) -> float:
        """The cosine of the angle between q and f; NaN where one of them is zero."""
        length = math.sqrt(self.signal) * math.sqrt(self.size)
        return self.product / length if length else math.nan


@dataclass(frozen=True)
class Row:
    """A converted layer. errors: by product; grad_input is absent where nothing wants it, the gradients where none arrived."""

    layer: str
    kind: str
    recipe: str
    calls: int
    errors: dict[str, Error]


@dataclass(frozen=True)
class Diff:
    """What `diff` found, in the order of the model's layers."""

    rows: list[Row]

    def worst(self, product: str) -> str:
        """The layer with the smallest cosine in a product."""
        return min((row for row in self.rows if product in row.errors), key=lambda row: row.errors[product].cosine).layer

    def __str__(self) -> str:
        head = ["layer", "kind", "recipe", *(f"{product}: dB, cosine" for product in PRODUCTS)]
        table = [head]
        for row in self.rows:
            errors = (row.errors.get(product) for product in PRODUCTS)
            table.append([row.layer, row.kind, row.recipe, *(f"{e.decibel:6.1f}  {e.cosine:.4f}" if e else "" for e in errors)])
        lines = aligned(table)
        legend = "each layer alone, low bits against float, on the inputs and gradients that reach it"
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], legend])


def diff(model: nn.Module, input: object, *, loss: Callable[..., Tensor] | None = None) -> Diff:
    """Compare each converted layer's output, grad_input and grad_weight with those of the same layer in float.

    The inputs and gradients are those that reach the layer in one forward and backward of the low-bit model, so a row shows
    what this layer adds, not what it inherits. Stochastic rounding is drawn anew. Where an estimator changes a gradient on
    purpose (a clipped one passes none beyond its range), that is part of the difference. The model, its buffers, its gradients
    and torch's generators stay as they are.

        print(fqt.diff(model, images, loss=lambda logits: cross_entropy(logits, labels)))

    Args:
        model: a converted model.
        input: a tensor, a tuple of arguments or a mapping of keyword arguments.
        loss: of the model's output; None: its attribute `loss` where it has one, else the sum of squares of its float tensors.

    Raises:
        ValueError: nothing in the model is converted.
    """
    if not any(quantized_layers(model)):
        raise ValueError(f"nothing in this {type(model).__name__} is converted: call fqt.convert first")
    refuse_frozen(model, "fqt.diff")
    probe = copy.deepcopy(model)
    calls: dict[str, list[tuple[Tensor, list[Tensor]]]] = {name: [] for name, _ in quantized_layers(probe)}

    def watch(name: str, layer: QuantizedLayer) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Tensor:
            x, arrived = args[0] if args else named["input"], list[Tensor]()
            calls[name].append((x.detach().clone().requires_grad_(x.requires_grad), arrived))
            if not output.requires_grad:
                return output
            output = output.clone()  # no view, off which an activation in place would cut the hook
            output.register_hook(arrived.append)
            return output

        return layer.register_forward_hook(hook, with_kwargs=True)

    with undisturbed(model):
        handles = [watch(name, layer) for name, layer in quantized_layers(probe)]
        (loss or _loss)(feed(probe, input)).backward()
        for handle in handles:
            handle.remove()
        return Diff([_row(name, layer, calls[name]) for name, layer in quantized_layers(probe) if calls[name]])


def _loss(output: object) -> Tensor:
    if isinstance(loss := getattr(output, "loss", None), Tensor):
        return loss
    return torch.stack([leaf.square().sum() for leaf in floats_of(output)]).sum()


def _row(name: str, layer: QuantizedLayer, calls: list[tuple[Tensor, list[Tensor]]]) -> Row:
    plain = revert(copy.deepcopy(layer))
    errors: dict[str, Error] = {}
    for x, arrived in calls:
        g = arrived[0] if arrived else None
        low, high = _products(layer, x, g), _products(plain, x, g)
        for product in high:
            errors[product] = errors.get(product, Error()) + Error.of(low[product], high[product])
    return Row(name, type(layer).__name__, layer.recipe.name, len(calls), errors)


def _products(layer: nn.Module, x: Tensor, g: Tensor | None) -> dict[str, Tensor]:
    y = layer(x)
    found = {"output": y.detach()}
    if g is not None:
        wanted = {"grad_input": x, "grad_weight": layer.weight}
        leaves = {product: leaf for product, leaf in wanted.items() if isinstance(leaf, Tensor) and leaf.requires_grad}
        found |= zip(leaves, torch.autograd.grad(y, list(leaves.values()), g), strict=True)
    return found
