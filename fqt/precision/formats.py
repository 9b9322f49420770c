"""<WL, FL>: a layer's fixed-point format, and a recipe at other bits than the one it was made with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from fqt.quantizers import Quantizer
from fqt.quantizers.fixed_point import fixed_point
from fqt.quantizers.stages import Stage, plain_stage
from fqt.recipe import LEFT_RIGHT, Product, Recipe, Written

MAX_WORD_LENGTH = 32


@dataclass(frozen=True)
class Precision:
    """AdaPT's <WL, FL>: two's complement of `word_length` bits, `fraction_length` of them behind the point (section 3.1)."""

    word_length: int
    fraction_length: int

    def __str__(self) -> str:
        return f"<{self.word_length},{self.fraction_length}>"


def is_fixed(recipe: Recipe, letter: str) -> bool:
    """Whether the forward encodes operand "x" or "w" in fixed point."""
    quantizer = recipe.quantizer("output", letter)
    return quantizer is not None and quantizer.grid == "fixed"


@functools.cache
def at_precision(recipe: Recipe, precision: Precision) -> Recipe:
    """The recipe with its fixed-point operands at <WL, FL>, and x at WL bits where its scale is calibrated instead.

    A calibrated x has at most 16 bits; above, it is left in float. Gradients are not touched.

    Raises:
        ValueError: the recipe's weights are not in fixed point.
    """
    if not is_fixed(recipe, "w"):
        raise ValueError(
            f"recipe {recipe.name!r} has weights of {recipe.quantizer('output', 'w') or 'float'}, which have no <WL, FL>: use "
            f"the quantizer fixed_point for output.w, as the recipes adapt and adapt_calibrated do"
        )

    def change(letter: str, quantizer: Quantizer) -> Written:
        if quantizer.grid == "fixed":
            return fixed_point(precision.word_length, precision.fraction_length, quantizer.stochastic)
        if letter == "x" and quantizer.grid == "int":
            return replace(quantizer, bits=max(2, precision.word_length)) if precision.word_length <= 16 else "float"
        return quantizer

    return _changed(recipe, change, str(precision))


@functools.cache
def at_word_length(recipe: Recipe, bits: int) -> Recipe:
    """The recipe with every integer operand of the forward at `bits`: fixed point keeps its range, others are calibrated."""

    def change(letter: str, quantizer: Quantizer) -> Written:
        if letter == "g" or quantizer.grid not in ("fixed", "int", "uint"):
            return quantizer
        if quantizer.grid == "fixed":
            low = quantizer.limits[0]  # -2^(WL - 1 - FL): the integer bits stay
            return replace(quantizer, bits=bits, limits=(low, max(2.0 ** (bits - 1) - 1, 0.5) * -low / 2.0 ** (bits - 1)))
        return replace(quantizer, bits=bits)

    return _changed(recipe, change, f"{bits}-bit")


@functools.cache
def at_gradient_bits(recipe: Recipe, bits: int) -> Recipe:
    """The recipe with its gradients at `bits`; pruning that keeps one group in b keeps one in `bits`, as AGP does.

    Raises:
        ValueError: a gradient whose grid has not that many bits.
    """

    def change(letter: str, quantizer: Quantizer) -> Written:
        if letter != "g":
            return quantizer
        coupled = quantizer.prune and quantizer.keep_one_in == quantizer.bits
        return replace(quantizer, bits=bits, keep_one_in=bits if coupled else quantizer.keep_one_in)

    return _changed(recipe, change, f"g{bits}")


def _changed(recipe: Recipe, change: Callable[[str, Quantizer], Written], suffix: str) -> Recipe:
    products = {}
    for product, letters in LEFT_RIGHT.items():
        pair: Product = getattr(recipe, product)
        operands: list[Written] = [pair.left, pair.right]
        for i, operand in enumerate(operands):
            if isinstance(operand, Quantizer):
                operands[i] = change(letters[i], operand)
        products[product] = Product(*operands, transform=pair.transform)
    return replace(recipe, name=f"{recipe.name.split(' ')[0]} {suffix}", **products)


def to_plain(recipe: Recipe) -> dict:
    """A layer's recipe as plain values, for a checkpoint; its rules and exchanged activations concern conversion alone."""

    def plain(operand: Written) -> object:
        if not isinstance(operand, Quantizer):
            return operand
        values = {field.name: getattr(operand, field.name) for field in fields(operand)}
        return {name: plain_stage(value) if isinstance(value, Stage) else value for name, value in values.items()}

    products = {product: getattr(recipe, product) for product in LEFT_RIGHT}
    transforms = {name: plain_stage(pair.transform) for name, pair in products.items() if pair.transform is not None}
    operands = {name: [plain(pair.left), plain(pair.right)] for name, pair in products.items()}
    return {"name": recipe.name, **operands, **({"transforms": transforms} if transforms else {})}


def from_plain(plain: dict) -> Recipe:
    """The inverse of `to_plain`."""

    def operand(value: Any) -> Written:
        if not isinstance(value, dict):
            return value
        ranges = {key: value[key] and tuple(value[key]) for key in ("limits", "pass_range")}
        return Quantizer(**{**value, **ranges})

    transforms = plain.get("transforms", {})
    output, grad_input, grad_weight = (
        Product(*map(operand, plain[product]), transform=transforms.get(product)) for product in LEFT_RIGHT
    )
    return Recipe(plain["name"], output, grad_input, grad_weight)
