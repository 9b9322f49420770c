"""Recipes as YAML: the built-in ones and a user's files."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import yaml

from fqt.quantizers import build
from fqt.recipe import LEFT_RIGHT, PLACES, Product, Recipe, Rule, Written
from fqt.wording import nearest

_FOLDER = Path(__file__).parent / "recipes"
_KEYS = ("description", "extends", "output", "grad_input", "grad_weight", "rules", "replace")


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
    if not _is_path(source):
        return _built_in(str(source))
    with _file(source) as (name, text):
        return _recipe(name, _mapping(name, text, _KEYS))


@functools.cache
def _built_in(name: str) -> Recipe:
    return _recipe(name, _mapping(name, _built_in_text(name), (*_KEYS, "instances")))


def _built_in_text(name: str) -> str:
    """The YAML of a built-in recipe, the numbers of its name in their places."""
    for path in sorted(_FOLDER.glob("*.yaml")):
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>0|[1-9][0-9]*)", re.escape(path.stem))
        match = re.fullmatch(pattern, name)
        if match:
            text = path.read_text(encoding="utf-8")
            for placeholder, number in match.groupdict().items():
                text = text.replace("{" + placeholder + "}", number)
            return text
    raise ValueError(f"unknown recipe {name!r}{nearest(name, recipes())}; built-in recipes: {', '.join(recipes())}")


def _is_path(source: str | Path) -> bool:
    return isinstance(source, Path) or source.endswith((".yaml", ".yml")) or "/" in source


_reading: list[Path] = []  # the files that are being followed


@contextmanager
def _file(source: str | Path) -> Iterator[tuple[str, str]]:
    """(name, text) of a recipe's file; within the block a file that leads back to it is an error."""
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"recipe file {str(source)!r} does not exist; built-in recipes: {', '.join(recipes())}")
    if path.resolve() in _reading:
        raise ValueError(f"recipe file {str(path)!r}: its rules or `extends` lead back to itself: name another recipe there")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe file {str(path)!r} is not UTF-8 text: {error}") from error
    _reading.append(path.resolve())
    try:
        yield path.stem, text
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


def _mapping(name: str, text: str, keys: tuple[str, ...]) -> Mapping:
    """The YAML's mapping; what it leaves unsaid is that of the recipe that it `extends`: whole products, rules, replace."""
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {name!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, Mapping):
        raise ValueError(f"recipe {name!r} is a YAML {type(data).__name__}, not a mapping with keys {', '.join(_KEYS)}")
    _only(name, data, keys)
    extended = data.get("extends")
    if extended is None:
        return data
    if not isinstance(extended, str):
        raise ValueError(f"recipe {name!r}: extends is {extended!r}, not the name of a recipe or the path of its file")
    if _is_path(extended):
        with _file(extended) as (other, text):
            base = _mapping(other, text, _KEYS)
    else:
        base = _mapping(extended, _built_in_text(extended), (*_KEYS, "instances"))
    return {**base, **data}


def _recipe(name: str, data: Mapping) -> Recipe:
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
    _only(f"{name}.{product}", value, (*letters, "transform"))
    operands = []
    for letter in letters:
        if letter not in value:
            raise ValueError(f"recipe {name!r}: {product} lacks its operand {letter!r} (a quantizer, 'saved' or 'float')")
        operands.append(_operand(name, product, letter, value[letter]))
    try:
        return Product(*operands, transform=value.get("transform"))
    except ValueError as error:
        raise ValueError(f"recipe {name!r}: {product}: {error}") from error


def _operand(name: str, product: str, letter: str, value: object) -> Written:
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
