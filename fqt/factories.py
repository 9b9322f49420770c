"""Architectures by name, for files that record what builds theirs: torchvision, timm and transformers, with random weights.

    {"name": "torchvision:resnet18", "arguments": {"num_classes": 10}}
    {"name": "timm:vit_tiny_patch16_224", "arguments": {}}
    {"name": "transformers:LlamaForCausalLM", "arguments": {"hidden_size": 256, ...}}      the configuration's

A name is looked up among the models of its package; nothing is downloaded, and no argument may name a file to read.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fqt.wording import nearest

_READS = ("checkpoint", "pretrained", "weights", "cache", "path", "file")
"""Parts of the names of arguments by which these packages read files."""


def check_factory(factory: Mapping[str, Any]) -> None:
    """Raise ValueError unless it is a name of a known package with arguments that JSON holds and that read no file."""
    if set(factory) != {"name", "arguments"}:
        raise ValueError(f"a factory is a name and its arguments, not {str(sorted(factory))[:200]}")
    name, arguments = factory["name"], factory["arguments"]
    package, colon, model = name.partition(":") if isinstance(name, str) else ("", "", "")
    if package not in _BUILD or not colon or not model.replace(".", "_").isidentifier():
        known = ", ".join(f"{package}:MODEL" for package in _BUILD)
        raise ValueError(f"the factory {str(name)[:200]!r} is none of {known}")
    if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
        raise ValueError(f"the arguments of factory {name!r} are {str(arguments)[:200]}, not a mapping of names")
    for key in arguments if package != "transformers" else ():
        if any(part in key for part in _READS):
            raise ValueError(f"argument {key!r} of factory {name!r} would read a file: leave it away")
    try:
        json.dumps(dict(arguments), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the arguments of factory {name!r} are not plain values that JSON holds: {error}") from error


def build(factory: Mapping[str, Any]) -> nn.Module:
    """The architecture, with random weights.

    Raises:
        ValueError: the factory is not one, its package is not installed, has no such model, or does not take the arguments.
    """
    check_factory(factory)
    package, _, model = factory["name"].partition(":")
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"factory {factory['name']!r} needs {package}: pip install {package}")
    try:
        return _BUILD[package](model, dict(factory["arguments"]))
    except TypeError as error:
        raise ValueError(f"factory {factory['name']!r} does not take its arguments: {error}") from error


def _known(model: str, names: list[str], package: str) -> None:
    if model not in names:
        raise ValueError(f"{package} has no model {model!r}{nearest(model, names)}")


def _torchvision(model: str, arguments: dict[str, Any]) -> nn.Module:
    models = importlib.import_module("torchvision.models")
    _known(model, models.list_models(), "torchvision")
    return models.get_model(model, weights=None, **arguments)


def _timm(model: str, arguments: dict[str, Any]) -> nn.Module:
    timm = importlib.import_module("timm")
    _known(model.partition(".")[0], timm.list_models(), "timm")
    return timm.create_model(model, pretrained=False, **arguments)


def _transformers(model: str, arguments: dict[str, Any]) -> nn.Module:
    transformers = importlib.import_module("transformers")
    found = getattr(transformers, model, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) and found.config_class):
        raise ValueError(f"transformers has no model class {model!r}")
    return found(found.config_class.from_dict(arguments))


_BUILD: dict[str, Callable[[str, dict[str, Any]], nn.Module]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "transformers": _transformers,
}
