"""QuantizedLayer: what all converted layers share. Parameters, buffers and their names stay what they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from fqt import ops
from fqt.geometry import Geometry
from fqt.qtensor import QTensor
from fqt.quantizers.base import quantize, transformed
from fqt.recipe import LEFT_RIGHT, Recipe


class QuantizedLayer(nn.Module):
    """What both layers share."""

    kind: str
    weight: nn.Parameter
    fuse = False  # whether the output may be left to what follows, see `fqt.fusion`
    backend: str = ""
    """The backend that must serve this layer, "" for whichever is fastest: fqt.convert(..., backend=...)."""

    watcher: Callable[[Tensor], None] | None = None  # given the gradient of the output, in a layer that is `changing`
    changing = False  # whether its recipe may be another at any step, see `let_recipe_change`

    def forward(self, input: Tensor) -> Tensor:
        return _uncompiled(self, input) if self.changing and _uncompiled is not None else self.compute(input)

    def compute(self, input: Tensor) -> Tensor:
        """The layer's forward."""
        raise NotImplementedError

    def window(self) -> Geometry | None:
        """The layer's geometry as far as the module knows it."""
        raise NotImplementedError

    @property
    def recipe(self) -> Recipe:
        """How the layer computes. A precision controller assigns a new one; it never changes one.

        Raises:
            RuntimeError: on reading, if the layer has none yet.
            TypeError: on assigning something else than a `Recipe`.
            ValueError: on assigning one that a layer of this kind cannot follow.
        """
        if "recipe" not in self.__dict__:
            raise RuntimeError(f"this {type(self).__name__} has no recipe yet: assign its `recipe`, or make it by fqt.convert")
        return self.__dict__["recipe"]

    @recipe.setter
    def recipe(self, recipe: Recipe) -> None:
        if not isinstance(recipe, Recipe):
            raise TypeError(f"a layer's recipe is a fqt.Recipe, not {recipe!r}: see fqt.load_recipe")
        recipe.check(self.kind)
        self.__dict__["recipe"] = recipe

    def extra_repr(self) -> str:
        recipe = self.__dict__.get("recipe")
        backend = f", backend={self.backend}" if self.backend else ""
        return f"{super().extra_repr()}, recipe={recipe.name if recipe else None}{backend}"

    def requests(self) -> dict[str, ops.Request]:
        """What the layer asks of kernels: each product that runs in low bits, and "quantize output.x" and so on."""
        device, asked = self.weight.device.type, {}
        for product, letters in LEFT_RIGHT.items():
            for letter in letters:
                format = self.recipe.format(product, letter)
                if format is not None and not self.recipe.saved(product, letter):
                    asked[f"quantize {product}.{letter}"] = ops.Request(device, (format,), backend=self.backend)
            if self.recipe.low_bit(product):
                formats = self.recipe.multiplied(product, self.kind)
                asked[product] = ops.Request(device, formats, self.window(), self.backend)
        return asked

    def quantized_weight(self) -> QTensor | None:
        """The weight's codes as an evaluation computes with them, logical (O, K, I); None if the recipe keeps it float."""
        quantizer = self.recipe.quantizer("output", "w")
        if quantizer is None:
            return None
        with torch.no_grad():
            w_OKI = self.weight.flatten(2).transpose(1, 2) if self.weight.dim() == 4 else self.weight.unsqueeze(1)
            return quantize(transformed(w_OKI, quantizer), replace(quantizer, stochastic=False), "w", backend=self.backend)[0]


def _compute(layer: QuantizedLayer, input: Tensor) -> Tensor:
    output = layer.compute(input)
    if layer.watcher is None or not output.requires_grad:
        return output
    output = output.clone()  # no view, off which an activation in place would cut the hook
    output.register_hook(layer.watcher)
    return output


_uncompiled: Callable[[QuantizedLayer, Tensor], Tensor] | None = None


def let_recipe_change(layer: QuantizedLayer) -> None:
    """Keep torch.compile out of a layer whose recipe a precision policy exchanges while the model trains.

    A recipe is a constant of a compiled graph: with L layers of a few formats each, every decision would compile the whole
    model once more. So the graph breaks at such a layer, whose work is done by operators that compiling leaves alone anyway,
    and a new recipe compiles nothing. fullgraph=True is refused, with this reason.
    """
    global _uncompiled
    if _uncompiled is None:  # not at import: it imports the compiler
        reason = "a precision policy may give this layer another recipe at any step; compile without fullgraph=True"
        _uncompiled = torch.compiler.disable(_compute, reason=reason)  # type: ignore[assignment]
    layer.__dict__["changing"] = True


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """(name, layer) of each converted layer, each module once."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            yield name, module
