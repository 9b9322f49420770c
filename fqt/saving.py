"""save and load: a frozen model as one safetensors file, and back into its architecture. See `fqt.container` for the file."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fqt import container, factories, ops
from fqt.container import Contents, FileError, Reader, StoredLayer, StoredWeight
from fqt.convert import FUSED, fuse_model, quantize_layer, take_no_short_cuts
from fqt.exchange import exchange, exchanged_class, fresh_activation
from fqt.freeze import TRAINED_BY, bake, exchange_weight, freeze, not_copied
from fqt.layers import PACKED, QuantizedLayer, adapter_of, quantized_layers
from fqt.layers.lending import is_lender, lend
from fqt.layers.parametrized import beneath
from fqt.packed import PackedWeight, logical_shape
from fqt.precision.formats import from_plain, to_plain
from fqt.qtensor import QTensor, codes_dtype
from fqt.recipe import Recipe
from fqt.thaw import thaw

__all__ = ["load", "save"]


# --- save -------------------------------------------------------------------------------------------------------------


def save(
    model: nn.Module,
    path: str | Path,
    *,
    factory: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Write a frozen model, or a converted one, which is frozen on the way, as one safetensors file.

    The file holds packed codes, the rest of the state dict, and what they mean; no code, no pickle. It is written in one step:
    a writing that fails leaves the file that was there.

    Args:
        factory: what builds the architecture: "torchvision:resnet18", "timm:vit_tiny_patch16_224",
            "transformers:LlamaForCausalLM". Then `load` can build it, if asked.
        arguments: the factory's, plain values; of transformers the configuration's (`model.config.to_diff_dict()`).

    Raises:
        ValueError: nothing in the model is converted, its state holds something that is no tensor, or there is no such factory.
        OSError: the file could not be written.
    """
    model = getattr(model, "_orig_mod", model)  # beneath torch.compile
    recorded: dict[str, Any] = {}
    if factory is not None or arguments is not None:
        recorded = {"name": factory, "arguments": dict(arguments or {})}
        factories.check_factory(recorded)
    layers = dict(quantized_layers(model))
    frozen = model if layers and all(layer.frozen for layer in layers.values()) else freeze(model)
    stored, tied = _once(frozen.state_dict())
    recipes: dict[Recipe, int] = {}
    described = {}
    for name, layer in quantized_layers(frozen):
        number = recipes.setdefault(replace(layer.__dict__[TRAINED_BY], rules=(), replace=()), len(recipes))
        weights = tuple(StoredWeight(weight.format.name, weight.shape) for weight in layer._modules[PACKED])  # type: ignore
        described[name] = StoredLayer(_path(layer.plain), number, str(layer.weight.dtype).removeprefix("torch."), weights)
    contents = Contents(
        model=type(frozen).__name__,
        layers=described,
        recipes=tuple(map(to_plain, recipes)),
        exchanged={name: kind.__name__ for name, module in frozen.named_modules() if (kind := exchanged_class(module))},
        fused=any(isinstance(module, tuple(FUSED.values())) for module in frozen.modules()),
        lent=tuple(name for name, module in frozen.named_modules() if is_lender(module)),
        tied=tied,
        checksums={},
        factory=recorded,
    )
    container.write(Path(path), stored, contents)


def _once(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a state dict, each memory once, and name -> name of the one that is the same."""
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise ValueError(f"{name!r} of the model's state is a {kind}, no tensor: a file holds tensors alone")
        memory = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if tensor.numel() else name
        if memory in first:
            tied[name] = first[memory]
        else:
            first[memory] = name
            stored[name] = tensor
    return stored, tied


def _path(kind: type[nn.Module]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


# --- load -------------------------------------------------------------------------------------------------------------


def load(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    factory: bool = False,
    trainable: bool = False,
    backend: str | None = None,
) -> nn.Module:
    """A model from a file of `save`: frozen, with the same outputs as the one that was saved, bit for bit.

    What the file says is checked against the architecture before memory is taken for a tensor.

    Args:
        model: the architecture, not converted, with any weights; it may be on torch's device "meta". It is left as it is: the
            result is another model, on the same device (the CPU for "meta").
        factory: build the architecture by the factory that the file records; only torchvision, timm and transformers can be
            named, and no weights are downloaded.
        trainable: a converted model instead, in training, whose float weights are the values of their codes, so that
            training goes on by the recipe. The log says what is lost.
        backend: as in `convert`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is none of `save`, or does not fit the architecture: what, by name; neither or both of
            `model` and `factory` are given; a named backend cannot serve a layer; or `trainable` is not possible.
    """
    path, backend = Path(path), ops.named_backend(backend)
    if (model is None) != factory:
        raise ValueError(
            "load takes the architecture, fqt.load(path, model), or factory=True to build the one that is recorded"
        )
    with container.reading(path) as reader:
        recorded = reader.contents.factory
        if model is None and not recorded:
            raise ValueError(f"{path} records no factory: give an instance of {reader.contents.model}, fqt.load(path, model)")
        given = factories.build(recorded) if model is None else model
        if any(quantized_layers(given)):
            raise ValueError(f"this {type(given).__name__} is converted: give the architecture as it was before fqt.convert")
        made = _skeleton(given)
        try:
            _shape(made, reader.contents, backend)
            _check_fit(made, reader)
        except ValueError as error:
            if isinstance(error, FileError):
                raise
            raise ValueError(f"{path} does not fit this {type(given).__name__}: {error}") from error
        _fill(made, reader)
    device = next((parameter.device for parameter in given.parameters() if not parameter.is_meta), torch.device("cpu"))
    made.to(device)
    if backend:
        for name, layer in quantized_layers(made):
            layer.backend = backend
            layer.check_backend(name)
    return thaw(made, given) if trainable else made


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy on the device "meta", but for what a state dict leaves out."""
    memo = not_copied(model)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, memo).eval()


def _shape(model: nn.Module, contents: Contents, backend: str) -> None:
    """Give a model on "meta" the structure that a file describes. ValueError where it cannot have it."""
    recipes = [_recipe(number, plain) for number, plain in enumerate(contents.recipes)]
    for name, stored in contents.layers.items():
        layer = _submodule(model, name)
        kind = _path(beneath(layer))
        if kind != stored.kind or adapter_of(layer) is None:
            raise ValueError(f"its layer {name!r} is a {stored.kind}, this one a {kind}")
        recipe = recipes[stored.recipe]
        quantize_layer(name, layer, recipe, "")
        assert isinstance(layer, QuantizedLayer)
        bake(name, layer)
        operand = recipe.operand("output", "w")
        shapes = [] if operand is None else [tuple(part.shape) for part in layer.weights()]  # type: ignore[union-attr]
        wanted = [StoredWeight(operand.format.name, shape) for shape in shapes] if operand is not None else []
        if wanted != list(stored.weights):
            raise ValueError(f"its layer {name!r} has weights {_said(stored.weights)}, this one needs {_said(wanted)}")
        exchange_weight(layer, nn.ModuleList(_empty(weight, operand) for weight in stored.weights).eval())
        if stored.weights:
            layer.put_placeholder(torch.empty((), dtype=getattr(torch, stored.dtype)), layer.weight.shape)
    for name, kind in contents.exchanged.items():
        exchange(_submodule(model, name), fresh_activation(kind))
    for name in contents.lent:
        lend(_submodule(model, name))
    take_no_short_cuts(model)
    if contents.fused:
        fuse_model(model, backend)


def _recipe(number: int, plain: Mapping[str, Any]) -> Recipe:
    try:
        return from_plain(dict(plain))
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise FileError(f"recipes[{number}] is no recipe ({type(error).__name__}: {str(error)[:300]})") from error


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"it has a module {name!r}, this one has not") from error


def _said(weights: Any) -> str:
    return ", ".join(f"{weight.format} of {weight.shape}" for weight in weights) or "in float"


def _empty(weight: StoredWeight, operand: Any) -> PackedWeight:
    """A packed weight without memory."""
    format, shape = operand.format, logical_shape(weight.shape)
    scale = torch.empty(format.groups(shape), device="meta")
    codes = torch.empty(format.packed_shape(shape), dtype=codes_dtype(format), device="meta")
    return PackedWeight(QTensor(codes, scale, scale.clone() if format.offset else None, None, format, shape), weight.shape)


def _check_fit(model: nn.Module, reader: Reader) -> None:
    """That a file has the tensors that a model on "meta" wants, of their shapes, floats where it has floats."""
    wanted, tied = model.state_dict(), reader.contents.tied
    held = reader.tensors.keys() | tied.keys()
    for name in sorted(wanted.keys() ^ held):
        raise ValueError(f"tensor {name!r} is in {'this one' if name in wanted else 'the file'} alone")
    for name, tensor in wanted.items():
        stored = reader.tensors[tied.get(name, name)]
        is_float = stored.dtype.startswith(("F", "BF"))
        if stored.shape != tuple(tensor.shape) or is_float != tensor.is_floating_point():
            this = f"{tensor.dtype} of {tuple(tensor.shape)}"
            raise ValueError(f"its tensor {name!r} is {stored.dtype} of {stored.shape}, this one's {this}")


def _fill(model: nn.Module, reader: Reader) -> None:
    """Give a model on "meta" the tensors of a file."""
    tied = reader.contents.tied
    held = {name: reader.tensor(name) for name in reader.tensors}
    model.load_state_dict({**held, **{alias: held[name] for alias, name in tied.items()}}, assign=True)
    for alias, name in tied.items():
        (owner, attribute), (other, of_other) = (_owner(model, each) for each in (alias, name))
        if attribute in owner._parameters and of_other in other._parameters:
            owner._parameters[attribute] = other._parameters[of_other]
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise ValueError(f"buffer {name!r} is in no state dict: give an architecture that is not on the device 'meta'")


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute
