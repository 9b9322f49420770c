"""Recipe: what each operand of the three products is quantized to. Nothing else decides how a layer computes.

    product       formula        operands   summed over
    output        Y = X W^T      x, w       input channels and the window
    grad_input    dX = G W       g, w       output channels and the window
    grad_weight   dW = G^T X     g, x       samples and positions

An operand is a `Quantizer`, "float", or (x and w in the backward products) "saved": the codes of the forward, which is then
what is kept for backward. A product runs in low bits when both its operands are quantized; otherwise it decodes the one that
is and multiplies in float.

**Which scales may leave a product.** One that is constant along the summed axes is multiplied in the epilogue. One that is
not is *folded* into the gradient before that is quantized (x and w in the backward), or, for a gradient's own scale for each
sample in grad_weight, integers are added within a *block* and rescaled in float between blocks. What is neither is refused.
`place` decides this, for every recipe, when it is built.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from fqt.formats import Format
from fqt.operand import LEFT_RIGHT, Operand, Plan
from fqt.quantizers import Quantizer
from fqt.quantizers.stages import ProductTransform, Stage, Transform, build_stage

Written = Quantizer | Literal["saved", "float"]
"""An operand as a recipe says it."""
PLACES = ("<first>", "<last>", "<downsample>", "<depthwise>", "<conv>")
"""Places that a rule may name. Downsample: a 1x1 window with a stride; depthwise: a channel a group, where nothing is to be
gained; conv: any convolution."""
_SUMMED = {
    "x": {"N": "samples", "P": "positions", "C": "channels"},
    "w": {"O": "output channels"},
    "g": {"N": "samples", "P": "positions", "C": "channels"},
}
MAX_PRODUCT_BITS = 16  # an exact accumulator of wider codes does not fit float64


@dataclass(frozen=True)
class Product:
    """The two operands of a product, in the order of `LEFT_RIGHT`.

    Attributes:
        left, right: a `Quantizer`, "saved" or "float".
        transform: a registered `ProductTransform` that is applied to both, along the axis that the product sums over, before
            they are quantized; as an instance, a word, or {word: {option: value}}.
    """

    left: Written
    right: Written
    transform: ProductTransform | None = None

    def __post_init__(self) -> None:
        if self.transform is not None:
            stage = build_stage("transform", self.transform)
            if not isinstance(stage, ProductTransform):
                raise ValueError(f"transform {stage} is for a single operand: give it to a quantizer")
            object.__setattr__(self, "transform", stage)


@dataclass(frozen=True)
class Rule:
    """Layers whose name matches `match` (fnmatch, or one of `PLACES`) follow `recipe` (None: they stay float)."""

    match: str
    recipe: Recipe | None


@dataclass(frozen=True)
class Recipe:
    """How the layers of a model compute.

    Attributes:
        name: what summaries show.
        output, grad_input, grad_weight: the products of every layer that no rule claims.
        rules: the first rule that matches a layer decides.
        replace: (class name, class name) of torch.nn modules without parameters that conversion exchanges: a sign needs
            an input of both signs, so 1-bit recipes turn ReLU into Identity, the sign being the activation.

    Raises:
        ValueError: an operand that its product cannot have; the sentence names operand, scale axes, product and remedy.
    """

    name: str
    output: Product
    grad_input: Product
    grad_weight: Product
    rules: tuple[Rule, ...] = ()
    replace: tuple[tuple[str, str], ...] = ()
    _operands: dict[tuple[str, str], Operand | None] = field(init=False, repr=False, compare=False)
    _plans: dict[tuple[str, str], Plan] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        for product, (left, right) in LEFT_RIGHT.items():
            if not isinstance(getattr(self, product), Product):
                raise ValueError(
                    f"recipe {self.name!r}: {product} is {getattr(self, product)!r}, not a Product({left}, {right})"
                )
            for letter in (left, right):
                operand = self._written(product, letter)
                if operand == "saved" and (product == "output" or letter == "g"):
                    raise ValueError(
                        f"recipe {self.name!r}: {product}.{letter} cannot be 'saved', no earlier product made its codes: "
                        f"give it a quantizer or 'float'"
                    )
                if not isinstance(operand, Quantizer) and operand not in ("saved", "float"):
                    raise ValueError(
                        f"recipe {self.name!r}: {product}.{letter} is {operand!r}, not a quantizer, 'saved' or 'float'"
                    )
        for rule in self.rules:
            for old, new in () if rule.recipe is None else rule.recipe.replace:
                if (old, new) not in self.replace:
                    raise ValueError(
                        f"recipe {self.name!r}: the rule for {rule.match!r} follows a recipe that replaces {old} by {new}, "
                        f"which only the outer recipe can, for the whole model: give it replace: {{{old}: {new}}}"
                    )
        operands = {
            (product, letter): self._resolve(product, letter) for product, pair in LEFT_RIGHT.items() for letter in pair
        }
        object.__setattr__(self, "_operands", operands)
        self.check("linear")

    def _written(self, product: str, letter: str) -> Written:
        pair: Product = getattr(self, product)
        return pair.left if LEFT_RIGHT[product][0] == letter else pair.right

    def _resolve(self, product: str, letter: str) -> Operand | None:
        written, transform = self._written(product, letter), getattr(self, product).transform
        saved = written == "saved"
        quantizer = self._written("output", letter) if saved else written
        if not isinstance(quantizer, Quantizer):
            return None
        try:
            format = quantizer.format(letter, "output" if saved else product)
            for stage in quantizer.stages:
                if letter not in stage.operands:
                    raise ValueError(f"{stage} is not for {letter}, only for {' and '.join(stage.operands)}")
                stage.check(format)
        except ValueError as error:
            raise ValueError(f"recipe {self.name!r}: {product}.{letter}: {error}") from error
        if transform is not None and saved:
            raise ValueError(
                f"recipe {self.name!r}: {product}.{letter} cannot be 'saved', the codes of the forward were made without "
                f"{transform}: give it a quantizer of its own"
            )
        return Operand(product, letter, quantizer, format, saved, transform)

    def operand(self, product: str, letter: str) -> Operand | None:
        """What is done with an operand; None if it is float."""
        return self._operands[product, letter]

    def operands(self) -> list[Operand]:
        """The operands that are quantized, "saved" ones left out."""
        return [operand for operand in self._operands.values() if operand is not None and not operand.saved]

    @property
    def stages(self) -> tuple[tuple[str, tuple[Stage, ...]], ...]:
        """The registered stages of each operand that has some: what a layer must hold parameters and buffers for."""
        return tuple((operand.name, operand.quantizer.stages) for operand in self.operands() if operand.quantizer.stages)

    def plan(self, product: str, kind: str) -> Plan:
        """How a layer of a kind ("linear" or "conv") computes a product; made by `check`."""
        return self._plans.get((product, kind)) or self._plan(product, kind)

    def _plan(self, product: str, kind: str) -> Plan:
        left, right = (self._operands[product, letter] for letter in LEFT_RIGHT[product])
        low_bit = self.low_bit(product)
        folded = low_bit and self.place(product, LEFT_RIGHT[product][1], kind) == "folded"
        return Plan(product, left, right, low_bit, folded)

    def quantizer(self, product: str, letter: str) -> Quantizer | None:
        """The quantizer behind an operand, "saved" resolved; None if the operand is float."""
        operand = self._operands[product, letter]
        return None if operand is None else operand.quantizer

    def saved(self, product: str, letter: str) -> bool:
        """Whether a backward operand is the codes that the forward made."""
        return self._written(product, letter) == "saved"

    def format(self, product: str, letter: str) -> Format | None:
        """The format of an operand's codes; None if the operand is float."""
        operand = self._operands[product, letter]
        return None if operand is None else operand.format

    def low_bit(self, product: str) -> bool:
        """Whether the product multiplies codes: both operands quantized, at most 16 bits each."""
        formats = [self.format(product, letter) for letter in LEFT_RIGHT[product]]
        return all(f is not None and f.bits <= MAX_PRODUCT_BITS for f in formats)

    def bits(self, product: str) -> int:
        """Bits at which a product runs: those of its wider operand, 32 if either is float."""
        formats = [self.format(product, letter) for letter in LEFT_RIGHT[product]]
        return max(32 if f is None else f.bits for f in formats) if self.low_bit(product) else 32

    def kept(self, product: str) -> float:
        """Fraction of a product's groups that pruning keeps."""
        quantizer = self.quantizer(product, "g") if product != "output" else None
        return 1.0 if quantizer is None else 1.0 / quantizer.keep_one_in

    def describe(self, product: str) -> str:
        """'sign:x * sign:w' and where scales that cannot leave are put, for summaries."""
        words = []
        for letter in LEFT_RIGHT[product]:
            quantizer = self.quantizer(product, letter)
            word = "float" if quantizer is None else str(quantizer)
            place_ = self.place(product, letter, "linear") if self.low_bit(product) else "leaves"
            words.append(word if place_ == "leaves" else f"{word} ({place_})")
        transform = getattr(self, product).transform
        return " x ".join(words) + (f" by {transform}" if transform is not None else "")

    @property
    def random(self) -> bool:
        """Whether a step draws random numbers."""
        return any(operand is not None and operand.random for operand in self._operands.values())

    @property
    def is_float(self) -> bool:
        """Whether nothing at all is quantized."""
        return not any(self.quantizer(p, letter) for p, letters in LEFT_RIGHT.items() for letter in letters) and all(
            rule.recipe is None or rule.recipe.is_float for rule in self.rules
        )

    def place(self, product: str, letter: str, kind: str) -> str:
        """Where an operand's scale goes: "leaves" (epilogue), "folded" (into g before it is quantized) or "by block".

        Args:
            kind: "linear" or "conv"; a convolution's window also sums over neighbouring positions.

        Raises:
            ValueError: it can go nowhere.
        """
        quantizer = self.quantizer(product, letter)
        assert quantizer is not None
        if quantizer.block and self.saved(product, letter):
            raise ValueError(
                f"recipe {self.name!r}: {product}.{letter} cannot be 'saved', its blocks lie along the axis that output sums "
                f"over, and {product} sums over another: give it a quantizer of its own"
            )
        format = self.format(product, letter)
        assert format is not None
        axes = format.axes
        if format.block and not self.saved(product, letter):
            return "by block"  # they lie along the axis that is summed
        if letter == "w":
            summed = "O" if product == "grad_input" else ""
        else:
            summed = "NP" if product == "grad_weight" else "C" if kind == "linear" else "PC"
        # x's scale by channel is summed over in the forward; in grad_weight it might leave, but no kernel takes it there
        by_channel = letter == "x" and "C" in axes
        if not by_channel and not set(axes) & set(summed):
            return "leaves"
        if letter == "g" and product == "grad_weight" and axes in ("N", "NC"):
            return "by block"
        # g has x's positions in a linear layer, but a convolution's window moves them
        movable = letter != "g" and product != "output" and not by_channel and not (kind == "conv" and "P" in axes)
        if movable and not quantizer.offset:
            return "folded"
        each = quantizer.granularity.replace("_", ", ")
        where = " and ".join(_SUMMED[letter][axis] for axis in summed if axis in axes)
        why = f"but {product} of a {kind} layer sums over {where}, so it cannot leave the sum"
        if not where:
            why = "and no kernel multiplies by it there"
        good = {"x": "tensor or sample", "w": "tensor", "g": "tensor or sample"}[letter]
        if letter == "g" and product == "grad_weight":
            good = "tensor, channel, sample or sample_channel"
        if movable:
            good = "tensor, or a symmetric quantizer: an offset cannot be folded into the gradient"
        raise ValueError(
            f"recipe {self.name!r}: the scale of {letter} in {product} is one for each {each}, {why}: use granularity {good}"
        )

    def check(self, kind: str) -> None:
        """Raise ValueError unless every operand can have its quantizer, and every low-bit product's scales have a place in a
        layer of this kind."""
        for product, letters in LEFT_RIGHT.items():
            for letter in letters:
                quantizer = self.quantizer(product, letter)
                if quantizer is not None:
                    for option, meant in (("transform", "w"), ("pass_range", "xw"), ("prune", "g")):
                        given = getattr(quantizer, option)
                        if given and not isinstance(given, Transform) and letter not in meant:
                            raise ValueError(
                                f"recipe {self.name!r}: {option}={getattr(quantizer, option)!r} of {product}.{letter} would "
                                f"have no effect: it is for {' and '.join(meant)}, leave it away"
                            )
                    if self.low_bit(product):
                        self.place(product, letter, kind)
        self._plans.update({(product, kind): self._plan(product, kind) for product in LEFT_RIGHT})

    def multiplied(self, product: str, kind: str) -> tuple[Format, ...]:
        """The formats that a low-bit product's kernel sees: a folded scale is gone from its operand."""
        formats = []
        for letter in LEFT_RIGHT[product]:
            format = self.format(product, letter)
            assert format is not None
            formats.append(replace(format, axes="") if self.place(product, letter, kind) == "folded" else format)
        return tuple(formats)

    def frozen(self) -> Recipe:
        """This recipe for evaluation alone, without rules: its output, and an input's gradient in float, by the same codes."""
        codes = {letter for letter in "xw" if self._operands["output", letter] is not None and not self.output.transform}
        grad_input, grad_weight = (Product("float", "saved" if letter in codes else "float") for letter in "wx")
        return replace(self, grad_input=grad_input, grad_weight=grad_weight, rules=(), replace=())

    def everywhere(self) -> Recipe:
        """This recipe for every layer, the first and the last included: without its rules, but for those of `<conv>`, which say
        for what kind of layer it is not meant."""
        return replace(self, rules=tuple(rule for rule in self.rules if rule.match == "<conv>"))
