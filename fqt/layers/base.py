"""QuantizedLayer: what all converted layers share, and the adapter by which the rest of the library knows a kind of layer.

A kind of layer is one class in one file:

    @register_layer(nn.Linear)
    class QuantLinear(QuantizedLayer, nn.Linear):
        kind = "linear"

        def compute(self, input): ...          its forward, by `fqt.functional.linear` or `conv2d` with `self.weights()`
        def weight_OKI(self): ...              its weight as (output channel, tap, input channel), a differentiable view

and, where the defaults do not fit, `split`, `window`, `canonical`, `multiply_adds` and `like`. Nothing else asks which class a
layer is. These methods use the plain layer's attributes alone: they are asked of layers that are not converted too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fqt import ops
from fqt.autograd import refuse_script
from fqt.functional import Fusion
from fqt.geometry import Geometry
from fqt.layers import changing
from fqt.layers.parametrized import at_rest, beneath, derived_from, former
from fqt.operand import LEFT_RIGHT, States
from fqt.packed import PackedWeight, Weight, canonical, joined
from fqt.qtensor import QTensor
from fqt.recipe import Recipe
from fqt.sharded import gathered, sharded_alike, unsharded

STATES = "quantizers"
"""The submodule of a layer that holds parameters and buffers of its operands' stages."""
PACKED = "packed"
"""The submodule of a frozen layer that holds its packed weights, in the order of `split`."""


class QuantizedLayer(nn.Module):
    """A layer whose three products follow `recipe`. Parameters, buffers and their names stay what they were.

    Attributes:
        kind: "linear", or "conv" where a window also sums over neighbouring positions.
        plain: the class that is converted.
        options: names of the constructor's arguments that give a layer of the same sizes, as far as they are attributes too.
        images: whether its input may be channels_last.
        borrows: names of layers within it whose weights its plain class multiplies itself, so that they are called only where
            it is converted.
        weight_name: of the parameter that `weight` is.
    """

    kind: ClassVar[str] = "linear"
    plain: ClassVar[type[nn.Module]]
    options: ClassVar[tuple[str, ...]] = ()
    images: ClassVar[bool] = False
    borrows: ClassVar[tuple[str, ...]] = ()
    weight_name: ClassVar[str] = "weight"
    weight: Tensor
    bias: Tensor | None
    fusion: Fusion | None = None
    """What the layer takes its input from and leaves its output to, see `fqt.fusion`."""
    backend: str = ""
    """The backend that must serve this layer, "" for whichever is fastest: fqt.convert(..., backend=...)."""

    watcher: Callable[[Tensor], None] | None = None  # given the gradient of the output, in a layer that is `changing`
    changing = False  # whether its recipe may be another at any step, see `let_recipe_change`
    unshard: Callable | None = None  # FSDPModule's method, in a layer that `fully_shard` was called on by itself
    __prepare_scriptable__ = refuse_script

    def forward(self, input: Tensor) -> Tensor:
        output = changing.compute(self, input) if self.changing else self.compute(input)
        if self.unshard is not None and type(output) is Tensor and output._is_view():
            return output.clone()  # off a view an activation in place would cut FSDP's hook
        return output

    # --- the adapter ---

    @classmethod
    def refuses(cls, plain: nn.Module) -> str:
        """Why a plain layer of this class cannot be converted, "" if it can."""
        return ""

    def compute(self, input: Tensor) -> Tensor:
        """The layer's forward."""
        raise NotImplementedError

    def weight_OKI(self) -> Tensor:
        """The weight as (O, K, I): output channel, tap, input channel of a group. A differentiable view of it."""
        raise NotImplementedError

    def split(self, weight: Tensor) -> Sequence[Tensor]:
        """The layer's weight, or a tensor of its shape, as what `fqt.functional` is given: a view for each of the products
        that `compute` is made of."""
        return [weight]

    def multiplied(self) -> Tensor:
        """The weight as `compute` multiplies by it, where that is another than it is kept; differentiable."""
        return self.weight

    def window(self) -> Geometry | None:
        """The convolution's geometry over an image of unknown size (0 x 0), by which kernels are chosen before a forward; None
        for a linear layer."""
        return None

    def canonical(self, y: Tensor) -> Tensor:
        """The output, or its gradient, as (N, P, O)."""
        return (y if y.dim() > 1 else y.unsqueeze(0)).unsqueeze(1).flatten(1, -2)

    def multiply_adds(self, output: Tensor) -> int:
        """Multiply-adds of one sample's forward, of which `output` came."""
        return math.prod(output.shape[1:-1]) * self.weight.numel()

    def exercise(self, x: Tensor) -> Tensor:
        """The output for x where the layer's forward takes x alone, or something to that effect."""
        return self(x)

    def like(self, kind: type[nn.Module]) -> nn.Module:
        """A new layer of class `kind`, of this layer's sizes."""
        return kind(**{name: getattr(self, name) for name in self.options}, bias=self.bias is not None)

    # --- the weight ---

    @property
    def frozen(self) -> bool:
        """Whether `fqt.freeze` made it: `weight` is then a placeholder that holds NaN, unless the recipe keeps it float."""
        return PACKED in self._modules

    def weights(self) -> Sequence[Weight]:
        """What `compute` multiplies by: `split`, or in a frozen layer the packed weights in the order of it."""
        packed: Sequence[PackedWeight] = self._modules.get(PACKED) or ()  # type: ignore[assignment]
        return packed if packed else self.split(self.multiplied())

    def quantized_weights(self) -> list[QTensor]:
        """The codes that an evaluation multiplies by, one tensor (O, K, I) for each of `weights`; empty if they are float."""
        operand = self.recipe.operand("output", "w")
        if operand is None:
            return []
        with torch.no_grad(), at_rest(self), gathered(self):
            found = []
            for weight in map(canonical, self.weights()):
                if not isinstance(weight, QTensor):
                    w_OKI = operand.transformed(weight, self.states)
                    key = torch.zeros((), dtype=torch.int64, device=w_OKI.device) if operand.random else None
                    weight = operand.encode(
                        w_OKI, key=key, training=False, geometry=self.window(), states=self.states, backend=self.backend
                    ).q
                found.append(weight)
            return found

    def quantized_weight(self) -> QTensor | None:
        """The weight's codes as an evaluation computes with them, logical (O, K, I); None if the recipe keeps it float.

        A layer of several products has a scale for each output channel and tap.
        """
        parts = self.quantized_weights()
        if len(parts) < 2:
            return parts[0] if parts else None
        with torch.no_grad(), at_rest(self), gathered(self):
            # a twin whose weight counts its elements, so that views of it tell which they hold
            kind, weight = quantized_class(self.plain), self.weight
            number = torch.arange(weight.numel(), device=weight.device).view(weight.shape)
            twin = kind.__new__(kind)  # type: ignore[call-arg]
            twin.__dict__.update(self.__dict__, _parameters={}, **{self.weight_name: number})
            return joined(parts, [canonical(part) for part in self.split(number)], twin.weight_OKI())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLayer:
        super()._apply(fn, recurse)
        if self.weight_name in self.__dict__ and self.frozen:
            before: Tensor = self.__dict__[self.weight_name]
            self.put_placeholder(fn(before[(0,) * before.dim()]), before.shape)
        return self

    def put_placeholder(self, like: Tensor, shape: Sequence[int]) -> None:
        """Have something stand as the weight that tells its shape, dtype and device, and holds NaN, of which one is stored."""
        self.__dict__[self.weight_name] = like.detach().new_full((), torch.nan).expand(*shape)

    def train(self, mode: bool = True) -> QuantizedLayer:
        """As nn.Module's. RuntimeError for a frozen layer, which only evaluates."""
        if mode and self.frozen:
            raise RuntimeError(
                f"this {type(self).__name__} is frozen: it has no float weight to train. Train the model that it was frozen "
                f"from, or one of fqt.load(..., trainable=True); .eval() puts the modules in front of it back"
            )
        return super().train(mode)

    # --- the recipe ---

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
        if self.frozen:
            raise ValueError(f"this {type(self).__name__} is frozen: its codes are of recipe {self.recipe.name!r} for good")
        before, self.__dict__["recipe"] = self.__dict__.get("recipe"), recipe
        if before is None or before.stages != recipe.stages:
            with at_rest(self):
                self._make_states(recipe)

    @property
    def states(self) -> States | None:
        """Parameters and buffers of the operands' stages, None if there are none."""
        return self._modules.get(STATES)  # type: ignore[return-value]

    def states_names(self, *, parameters: bool = False) -> list[str]:
        """Names of these within the layer; of the parameters alone, if asked."""
        if (states := self._modules.get(STATES)) is None:
            return []
        named = states.named_parameters() if parameters else states.state_dict().items()
        return [f"{STATES}.{name}" for name, _ in named]

    def _make_states(self, recipe: Recipe) -> None:
        """A module for each operand and stage that has parameters or buffers; those that a former recipe had too stay."""
        before, made = self._modules.pop(STATES, None), nn.ModuleDict()
        for operand in recipe.operands():
            of_operand = nn.ModuleDict()
            for stage in operand.quantizer.stages:
                state = before[operand.name][stage.word] if _has(before, operand.name, stage.word) else None  # type: ignore[index]
                if state is None:
                    with gathered(self):
                        state = stage.state(operand.letter, self)
                if state is not None:
                    of_operand[stage.word] = state.to(self.weight.device)
            if len(of_operand):
                made[operand.name] = of_operand
        if len(made):
            self.add_module(STATES, made)

    def extra_repr(self) -> str:
        recipe = self.__dict__.get("recipe")
        backend = f", backend={self.backend}" if self.backend else ""
        return f"{super().extra_repr()}, recipe={recipe.name if recipe else None}{', frozen' * self.frozen}{backend}"

    def requests(self) -> dict[str, ops.Request]:
        """What the layer asks of kernels: each product that runs in low bits, and "quantize output.x" and so on, or
        "encode output.x" where kernels do not find the scales."""
        with at_rest(self):
            device, asked = self.weight.device.type, {}
        for product, letters in LEFT_RIGHT.items():
            for letter in letters:
                operand = self.recipe.operand(product, letter)
                if operand is not None and not operand.saved and not (self.frozen and letter == "w"):
                    operator = "encode" if operand.quantizer.encodes_alone else "quantize"
                    asked[f"{operator} {product}.{letter}"] = ops.Request(device, (operand.format,), backend=self.backend)
            if self.recipe.low_bit(product):
                formats = self.recipe.multiplied(product, self.kind)
                asked[product] = ops.Request(device, formats, self.window(), self.backend)
        return asked

    def check_backend(self, name: str) -> None:
        """Raise ValueError, with the layer's name, where a kernel that it asks for is refused."""
        for what, request in self.requests().items():
            try:
                ops.select(what.split()[0], request)
            except ValueError as error:
                raise ValueError(f"layer {name!r}, {what}: {error}") from error

    def lost_zeros(self) -> int:
        """How many of the weights that a mask of torch.nn.utils.prune holds at zero are something else as codes."""
        if not any(name.endswith("weight_mask") for name in self._buffers) or self.weight.is_meta:
            return 0
        with gathered(self):
            pairs = zip(map(canonical, self.weights()), self.quantized_weights(), strict=False)
            return sum(int(((weight == 0) & (q.decode() != 0)).sum()) for weight, q in pairs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A class that was made for a plain class found by its path is made again, where it is unpickled."""
        reduced = super().__reduce_ex__(protocol)
        return (_revive, (type(self).plain,), *reduced[2:]) if type(self) in _made.values() else reduced


def _has(states: nn.Module | None, operand: str, word: str) -> bool:
    return isinstance(states, nn.ModuleDict) and operand in states and word in states[operand]  # type: ignore[operator]


# --- registering -----------------------------------------------------------------------------------------------------

ADAPTERS: dict[type[nn.Module] | str, type[QuantizedLayer]] = {}
"""Plain class, or its path -> what it is converted to."""
_made: dict[type[nn.Module], type[QuantizedLayer]] = {}


Adapter = TypeVar("Adapter", bound=type[QuantizedLayer])


def register_layer(plain: type[nn.Module] | str) -> Callable[[Adapter], Adapter]:
    """Register the decorated class as what `fqt.convert` makes of layers of a class.

    Args:
        plain: the class, from which the decorated one is derived too; or its path ("package.module.Class"), so that its
            package need not be imported: the decorated class is then derived from `QuantizedLayer` alone.

    Raises:
        ValueError: the class is registered already.
        TypeError: the decorated class is not derived from what it has to be.
    """

    def add(adapter: Adapter) -> Adapter:
        if plain in ADAPTERS:
            raise ValueError(f"layers of {plain} are converted to {ADAPTERS[plain].__name__} already")
        bases = (QuantizedLayer,) if isinstance(plain, str) else (QuantizedLayer, plain)
        if not (isinstance(adapter, type) and all(issubclass(adapter, base) for base in bases)):
            raise TypeError(f"{adapter!r} is not derived from {' and '.join(base.__name__ for base in bases)}")
        if not isinstance(plain, str):
            adapter.plain = plain
        ADAPTERS[plain] = adapter
        return adapter

    return add


def adapter_of(module: nn.Module) -> type[QuantizedLayer] | None:
    """The class by which a plain or converted layer is known; None for any other module, a subclass of a plain layer too."""
    if isinstance(module, QuantizedLayer):
        return type(module)
    adapter = _registered(module)
    return None if adapter is None or adapter.refuses(module) else adapter


def refusal(module: nn.Module) -> str:
    """Why a module of a class that is converted is not, "" if it is, or if its class is not."""
    adapter = _registered(module)
    return "" if adapter is None else adapter.refuses(module)


def _registered(module: nn.Module) -> type[QuantizedLayer] | None:
    kind = beneath(module)
    return ADAPTERS.get(kind) or (quantized_class(kind) if f"{kind.__module__}.{kind.__qualname__}" in ADAPTERS else None)


def is_subclass(module: nn.Module) -> bool:
    """Whether a module is of a class derived from one that is converted, which may compute something else."""
    return _registered(module) is None and any(isinstance(module, plain) for plain in ADAPTERS if not isinstance(plain, str))


def converted_class(layer: nn.Module) -> type[nn.Module]:
    """The class that a plain layer gets; of a parametrized one, a class of its own."""
    return derived_from(layer, quantized_class(beneath(layer)))


def plain_class(layer: QuantizedLayer) -> type[nn.Module] | None:
    """The class that a converted layer had, sharded if it is now; None where it has become something else since."""
    found = layer.plain if unsharded(type(layer)) is quantized_class(layer.plain) else former(layer)
    return None if found is None else sharded_alike(type(layer), found)


def quantized_class(plain: type[nn.Module]) -> type[QuantizedLayer]:
    """The class of converted layers of a plain class. KeyError if there is none."""
    if plain in ADAPTERS:
        return ADAPTERS[plain]
    if plain not in _made:
        adapter = ADAPTERS[f"{plain.__module__}.{plain.__qualname__}"]
        body = {"plain": plain, "__module__": adapter.__module__, "__doc__": adapter.__doc__}
        _made[plain] = type(f"Quant{plain.__name__}", (adapter, plain), body)
    return _made[plain]


def plain_classes() -> list[str]:
    """Names of the classes that are converted, for messages."""
    by_kind = sorted(ADAPTERS.items(), key=lambda item: item[1].kind != "linear")
    return [plain if isinstance(plain, str) else f"nn.{plain.__name__}" for plain, _ in by_kind]


def _revive(plain: type[nn.Module]) -> QuantizedLayer:
    made = quantized_class(plain)
    return made.__new__(made)  # type: ignore[call-arg]


def refuse_frozen(model: nn.Module, what: str) -> None:
    """Raise ValueError for a frozen model. what: that which takes one that trains."""
    name = next((name for name, layer in quantized_layers(model) if layer.frozen), None)
    if name is not None:
        raise ValueError(
            f"this {type(model).__name__} is frozen (layer {name!r}): {what} takes a model with float weights, that which it "
            f"was frozen from, or one of fqt.load(..., trainable=True)"
        )


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """(name, layer) of each converted layer, each module once."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            yield name, module
