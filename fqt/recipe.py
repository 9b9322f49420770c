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

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import yaml

from fqt.formats import Format
from fqt.quantizers import Quantizer, build
from fqt.wording import nearest

Operand = Quantizer | Literal["saved", "float"]
LEFT_RIGHT = {"output": ("x", "w"), "grad_input": ("g", "w"), "grad_weight": ("g", "x")}
PLACES = ("<first>", "<last>", "<downsample>", "<depthwise>")  # downsample: 1x1 with a stride; depthwise: nothing to gain
_SUMMED = {
    "x": {"N": "samples", "P": "positions", "C": "channels"},
    "w": {"O": "output channels"},
    "g": {"N": "samples", "P": "positions", "C": "channels"},
}
MAX_PRODUCT_BITS = 16  # an exact accumulator of wider codes does not fit float64

_FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Product:
    """The two operands of a product, in the order of `LEFT_RIGHT`."""

    left: Operand
    right: Operand


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
    _resolved: dict[tuple[str, str], tuple[Quantizer | None, Format | None]] = field(init=False, repr=False, compare=False)

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
        resolved = {
            (product, letter): self._resolve(product, letter) for product, pair in LEFT_RIGHT.items() for letter in pair
        }
        object.__setattr__(self, "_resolved", resolved)
        self.check("linear")

    def _written(self, product: str, letter: str) -> Operand:
        pair: Product = getattr(self, product)
        return pair.left if LEFT_RIGHT[product][0] == letter else pair.right

    def _resolve(self, product: str, letter: str) -> tuple[Quantizer | None, Format | None]:
        operand = self._written(product, letter)
        operand = self._written("output", letter) if operand == "saved" else operand
        try:
            return (operand, operand.format(letter)) if isinstance(operand, Quantizer) else (None, None)
        except ValueError as error:
            raise ValueError(f"recipe {self.name!r}: {product}.{letter}: {error}") from error

    def quantizer(self, product: str, letter: str) -> Quantizer | None:
        """The quantizer behind an operand, "saved" resolved; None if the operand is float."""
        return self._resolved[product, letter][0]

    def saved(self, product: str, letter: str) -> bool:
        """Whether a backward operand is the codes that the forward made."""
        return self._written(product, letter) == "saved"

    def format(self, product: str, letter: str) -> Format | None:
        """The format of an operand's codes; None if the operand is float."""
        return self._resolved[product, letter][1]

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
        return " x ".join(words)

    @property
    def random(self) -> bool:
        """Whether a step draws random numbers."""
        return any(quantizer is not None and quantizer.random for quantizer, _ in self._resolved.values())

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
        axes = quantizer.format(letter).axes
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
                        if getattr(quantizer, option) and letter not in meant:
                            raise ValueError(
                                f"recipe {self.name!r}: {option}={getattr(quantizer, option)!r} of {product}.{letter} would "
                                f"have no effect: it is for {' and '.join(meant)}, leave it away"
                            )
                    if self.low_bit(product):
                        self.place(product, letter, kind)

    def multiplied(self, product: str, kind: str) -> tuple[Format, ...]:
        """The formats that a low-bit product's kernel sees: a folded scale is gone from its operand."""
        formats = []
        for letter in LEFT_RIGHT[product]:
            format = self.format(product, letter)
            assert format is not None
            formats.append(replace(format, axes="") if self.place(product, letter, kind) == "folded" else format)
        return tuple(formats)

    def everywhere(self) -> Recipe:
        """This recipe without its rules: for every layer, the first and the last included."""
        return replace(self, rules=())


# --- YAML ------------------------------------------------------------------------------------------------------------

_KEYS = ("description", "output", "grad_input", "grad_weight", "rules", "replace")


def recipes() -> list[str]:
    """Names of the built-in recipes. A family such as dorefa_w{w}a{a}g{g} is listed by its usual members."""
    names = []
    for path in sorted(_FOLDER.glob("*.yaml")):
        if "{" in path.stem:
            # a member's line is plain YAML, only the products hold placeholders
            instances = re.search(r"^instances: (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert instances, path
            names += [path.stem.format(**member) for member in yaml.safe_load(instances[1])]
        else:
            names.append(path.stem)
    return sorted(names)


def load_recipe(source: str | Path | Recipe) -> Recipe:
    """A recipe by built-in name, from a YAML file, or as it is.

    Raises:
        ValueError: unknown name, no such file, malformed YAML, unknown key, quantizer or option: which, and the nearest.
    """
    if isinstance(source, Recipe):
        return source
    if not isinstance(source, str | Path):
        raise TypeError(f"a recipe is a name, a path or a fqt.Recipe, not {type(source).__name__}")
    if isinstance(source, Path) or source.endswith((".yaml", ".yml")) or "/" in source:
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"recipe file {str(source)!r} does not exist; built-in recipes: {', '.join(recipes())}")
        return _read(path)
    return _built_in(source)


@functools.cache
def _built_in(name: str) -> Recipe:
    for path in sorted(_FOLDER.glob("*.yaml")):
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>0|[1-9][0-9]*)", re.escape(path.stem))
        match = re.fullmatch(pattern, name)
        if match:
            text = path.read_text(encoding="utf-8")
            for placeholder, number in match.groupdict().items():
                text = text.replace("{" + placeholder + "}", number)
            return _parse(name, text, (*_KEYS, "instances"))
    raise ValueError(f"unknown recipe {name!r}{nearest(name, recipes())}; built-in recipes: {', '.join(recipes())}")


_reading: list[Path] = []  # the files whose rules are being followed


def _read(path: Path) -> Recipe:
    if path.resolve() in _reading:
        raise ValueError(f"recipe file {str(path)!r}: its rules lead back to itself: name another recipe there")
    _reading.append(path.resolve())
    try:
        return _parse(path.stem, path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe file {str(path)!r} is not UTF-8 text: {error}") from error
    finally:
        _reading.pop()


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error: the first would have no effect."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _parse(name: str, text: str, keys: tuple[str, ...] = _KEYS) -> Recipe:
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {name!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, Mapping):
        raise ValueError(f"recipe {name!r} is a YAML {type(data).__name__}, not a mapping with keys {', '.join(_KEYS)}")
    _only(name, data, keys)
    products = {}
    for product in LEFT_RIGHT:
        if product not in data:
            raise ValueError(f"recipe {name!r} lacks the product {product!r}: give it operands, or write {product}: float")
        products[product] = _product(name, product, data[product], data.get("output"))
    return Recipe(name, **products, rules=_rules(name, data.get("rules")), replace=_replace(name, data.get("replace")))


def _only(where: str, data: Mapping, known: tuple[str, ...]) -> None:
    for key in data:
        if key not in known:
            raise ValueError(f"recipe {where!r} has no key {key!r}{nearest(key, known)}; keys: {', '.join(known)}")


def _product(name: str, product: str, value: object, output: object) -> Product:
    letters = LEFT_RIGHT[product]
    if value == "float":
        # a gradient in float, multiplied with whatever the forward used
        used = output if isinstance(output, Mapping) and product != "output" else {}
        return Product("float", "saved" if used.get(letters[1], "float") != "float" else "float")
    if not isinstance(value, Mapping):
        raise ValueError(f"recipe {name!r}: {product} is {value!r}, not 'float' or a mapping of {' and '.join(letters)}")
    _only(f"{name}.{product}", value, letters)
    operands = []
    for letter in letters:
        if letter not in value:
            raise ValueError(f"recipe {name!r}: {product} lacks its operand {letter!r} (a quantizer, 'saved' or 'float')")
        operands.append(_operand(name, product, letter, value[letter]))
    return Product(*operands)


def _operand(name: str, product: str, letter: str, value: object) -> Operand:
    if value in ("saved", "float"):
        return value  # type: ignore[return-value]
    if not isinstance(value, Mapping) or "quantizer" not in value:
        raise ValueError(
            f"recipe {name!r}: {product}.{letter} is {value!r}, not 'saved', 'float' or {{quantizer: name, ...options}}"
        )
    options = {str(key): option for key, option in value.items() if key != "quantizer"}
    try:
        return build(str(value["quantizer"]), letter, **options) or "float"
    except ValueError as error:
        raise ValueError(f"recipe {name!r}: {product}.{letter}: {error}") from error


def _rules(name: str, value: object) -> tuple[Rule, ...]:
    rules = []
    for entry in _list(name, "rules", value):
        if not isinstance(entry, Mapping) or set(entry) != {"match", "recipe"}:
            raise ValueError(f"recipe {name!r}: a rule is {{match: pattern, recipe: name or float}}, not {entry!r}")
        match = str(entry["match"])
        if match.startswith("<") and match not in PLACES:
            raise ValueError(f"recipe {name!r}: unknown place {match!r}{nearest(match, PLACES)}; known: {', '.join(PLACES)}")
        rules.append(Rule(match, None if entry["recipe"] == "float" else load_recipe(str(entry["recipe"]))))
    return tuple(rules)


def _replace(name: str, value: object) -> tuple[tuple[str, str], ...]:
    if value is None:
        return ()
    if not isinstance(value, Mapping):
        raise ValueError(f"recipe {name!r}: replace is {value!r}, not a mapping such as {{ReLU: Identity}}")
    return tuple((str(old), str(new)) for old, new in value.items())


def _list(name: str, key: str, value: object) -> list:
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(f"recipe {name!r}: {key} is {value!r}, not a list")
    return value
