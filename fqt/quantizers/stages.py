"""Stages: the parts of a quantizer that a paper's file can add, in plain torch.

    transform -> calibrate -> (prune) -> encode            and, in the backward, the estimator

A stage is a frozen dataclass, registered under a word; its fields are its options:

    @register_calibration("percentile")
    @dataclass(frozen=True)
    class Percentile(Calibration):
        percent: float = 99.9

        def scales(self, rows_GE, format, state, update): ...

Where a `Quantizer` takes a stage, it takes an instance, its word (default options), or {word: {option: value}}, which is also
how a recipe's YAML writes one. A stage with parameters or buffers returns them as a module from `state`; the converted layer
holds it as `layer.quantizers.<product>_<letter>.<word>`, so it is in the state dict, moved by `.to()`, seen by optimizers.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fqt.autograd import once
from fqt.formats import Format
from fqt.qtensor import QTensor, Scales
from fqt.wording import nearest


@dataclass(frozen=True)
class Stage:
    """What all stages share.

    Attributes:
        word: under which the class is registered.
        operands: letters of the operands that it is for.
    """

    word: ClassVar[str] = ""
    operands: ClassVar[str] = "xwg"

    def check(self, format: Format) -> None:
        """Raise ValueError for a format that the stage cannot serve; asked when a recipe is built."""

    def state(self, letter: str, layer: nn.Module | None) -> nn.Module | None:
        """The parameters and buffers of one operand, None if the stage has none.

        Args:
            letter: "x", "w" or "g".
            layer: the converted layer, for values that its weight decides; None where there is none.
        """
        return None

    def __str__(self) -> str:
        options = ", ".join(f"{field.name}={getattr(self, field.name)}" for field in dataclasses.fields(self))
        return f"{self.word}({options})" if options else self.word


@dataclass(frozen=True)
class Calibration(Stage):
    """How a group's values become its scale (and offset)."""

    def scales(self, rows_GE: Tensor, format: Format, state: nn.Module | None, update: bool) -> Scales:
        """What the groups are encoded with.

        Args:
            rows_GE: (groups, elements of a group) float32, after the transform, a folded scale multiplied in.
            format: of the codes; `format.code_range` and `format.grid` say what is to be reached.
            state: what `state` made.
            update: whether running statistics move with these values: in training, and not when an activation checkpoint
                computes the forward again.

        Returns:
            scale, inverse and, if the format has one, offset, (G,) float32 each; no factor and no index. A group that holds a
            NaN gets scale NaN by itself.
        """
        raise NotImplementedError

    def resume(self, state: nn.Module, q: QTensor) -> None:
        """Have the operand's state go on from the scale (and offset) of these codes, of a frozen weight that is to train again
        or of a range that `fqt.calibrate` found."""


@dataclass(frozen=True)
class Estimator(Stage):
    """How the gradient passes an operand of the forward. Rounding itself has none."""

    operands: ClassVar[str] = "xw"

    def save(self, x: Tensor, q: QTensor, state: nn.Module | None) -> tuple[Tensor, ...]:
        """What the backward needs. Everything here is kept in memory until then; q's own tensors are kept anyway.

        Args:
            x: (N, P, C) or (O, K, I), as it was quantized.
            q: its codes and scales.
        """
        return ()

    def backward(self, g: Tensor, saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The gradient of x, of g's shape and dtype, then that of each parameter of the state, in their order.

        Args:
            g: gradient of the quantized values, of x's shape.
            saved: what `save` returned.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Transform(Stage):
    """What happens to x or w before its range is looked at; differentiated by autograd."""

    operands: ClassVar[str] = "xw"

    def apply(self, x: Tensor, state: nn.Module | None) -> Tensor:
        """x transformed, of the same shape."""
        raise NotImplementedError


@dataclass(frozen=True)
class ProductTransform(Stage):
    """Linear maps of the summed axis, A of the left operand and B of the right, with (A a)^T (B b) = a^T b, before both are
    quantized.

    It belongs to a `Product`, whose operands are then encoded for it alone: none can be "saved".
    """

    random: ClassVar[bool] = False
    """Whether it draws random numbers."""

    def apply(self, a_T: Tensor, side: int, key: Tensor | None, stream: int) -> Tensor:
        """The map along the last axis.

        Args:
            a_T: (..., terms) float32.
            side: 0 for the product's left operand (A), 1 for the right (B).
            key: () int64, the Philox key of the call, shared by both operands; None where `random` is False.
            stream: from which the draws are taken (`fqt.philox`); the next is free too.
        """
        raise NotImplementedError


# --- registering -----------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[type[Stage], dict[str, type[Stage]]]] = {
    "calibration": (Calibration, {}),
    "estimator": (Estimator, {}),
    "transform": (Stage, {}),
}
"""Kind -> its base class, and word -> class of the registered ones."""
RESERVED = {"calibration": ("absmax", "minmax", "absmean", "none"), "estimator": (), "transform": ("tanh",)}
"""Words of what kernels know without a stage."""
_Class = TypeVar("_Class", bound=type[Stage])


def register_calibration(word: str) -> Callable[[_Class], _Class]:
    """Register a subclass of `fqt.Calibration` under a word.

    Raises:
        ValueError: the word is taken, or is no identifier.
        TypeError: what is registered is no dataclass derived from `fqt.Calibration`.
    """
    return _register("calibration", word)


def register_estimator(word: str) -> Callable[[_Class], _Class]:
    """Register a subclass of `fqt.Estimator` under a word. Raises as `register_calibration`."""
    return _register("estimator", word)


def register_transform(word: str) -> Callable[[_Class], _Class]:
    """Register a subclass of `fqt.Transform` or `fqt.ProductTransform` under a word. Raises as `register_calibration`."""
    return _register("transform", word)


def _register(kind: str, word: str) -> Callable[[_Class], _Class]:
    base, words = KINDS[kind]

    def add(made: _Class) -> _Class:
        if not (inspect.isclass(made) and issubclass(made, base) and dataclasses.is_dataclass(made)):
            wanted = "fqt.Transform or fqt.ProductTransform" if kind == "transform" else f"fqt.{base.__name__}"
            raise TypeError(f"a {kind} is a frozen dataclass derived from {wanted}, not {made!r}")
        if word in words or word in RESERVED[kind]:
            raise ValueError(f"a {kind} named {word!r} exists already: choose another name")
        if not word.isidentifier():
            raise ValueError(f"a {kind}'s name becomes part of parameters' names: {word!r} is no identifier")
        # a class may be registered as two kinds, under one word: its state is then shared
        if made.__dict__.get("word", word) != word:
            raise ValueError(f"{made.__name__} is registered as {made.word!r} already: use that name")
        other = next((words[word] for _, words in KINDS.values() if word in words), made)
        if other is not made:
            raise ValueError(f"{word!r} names {other.__name__} already, whose state a layer keeps under it: choose another")
        made.word = word
        words[word] = made
        return made

    return add


def build_stage(kind: str, value: object) -> Any:
    """A stage from what a `Quantizer` or a recipe's YAML says: an instance, a word, or {word: {option: value}}.

    Raises:
        ValueError: unknown word or option, or a value that the stage refuses; the sentence names the nearest known word.
    """
    base, words = KINDS[kind]
    if isinstance(value, base):
        return value
    options: object = {}
    if isinstance(value, Mapping) and len(value) == 1:
        ((value, options),) = value.items()
    if not isinstance(value, str):
        raise ValueError(f"the {kind} is a name or {{name: {{option: value}}}}, not {value!r}")
    if value not in words:
        known = (*RESERVED[kind], *sorted(words))
        raise ValueError(f"unknown {kind} {value!r}{nearest(value, known)}; known: {', '.join(known)}")
    if not isinstance(options, Mapping):
        raise ValueError(f"{kind} {value!r}: its options are a mapping, not {options!r}")
    fields = [field.name for field in dataclasses.fields(words[value])]
    for option in options:
        if option not in fields:
            takes = f"it takes {', '.join(fields)}" if fields else "it takes none"
            raise ValueError(f"{kind} {value!r} has no option {option!r}{nearest(str(option), fields)}; {takes}")
    try:
        return words[value](**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{kind} {value!r} with {dict(options) or 'no options'}: {error}") from error


def plain_stage(stage: Stage) -> dict[str, dict[str, object]]:
    """A stage as plain values, {word: options}: what `build_stage` reads."""
    return {stage.word: {field.name: getattr(stage, field.name) for field in dataclasses.fields(stage)}}


# --- the estimator in autograd ---------------------------------------------------------------------------------------


class Estimated(torch.autograd.Function):
    """The identity, whose backward is an estimator's."""

    @staticmethod
    def forward(x: Tensor, estimator: Estimator, saved: int, *tensors: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, ctx.estimator, ctx.saved, *tensors = inputs
        ctx.save_for_backward(*tensors[: ctx.saved])

    @staticmethod
    def backward(ctx, g: Tensor):
        with torch.no_grad():
            grad, *grads = ctx.estimator.backward(g, ctx.saved_tensors)
        return (*once([grad]), None, None, *[None] * ctx.saved, *once(grads))


def estimated(x: Tensor, estimator: Estimator, q: QTensor, state: nn.Module | None) -> Tensor:
    """x, with a gradient that the estimator decides; as it is where none is asked for."""
    if not torch.is_grad_enabled():
        return x
    with torch.no_grad():
        saved = estimator.save(x.detach(), q, state)
    parameters = [] if state is None else list(state.parameters())
    return Estimated.apply(x, estimator, len(saved), *saved, *parameters)  # type: ignore[return-value]
