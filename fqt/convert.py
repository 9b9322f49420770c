"""convert and revert: from a model to one that trains in low bits, and back.

A layer is converted by changing its class (nn.Linear to QuantLinear), so the module, its parameters, hooks, ties, device, dtype
and training mode are the same objects and values as before, and a reference to it held elsewhere stays good.
"""

from __future__ import annotations

import copy
import inspect
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fqt import ops
from fqt.choose import Choice, Override, choose, ends_by_kind, load_overrides, patterns
from fqt.exchange import candidates, exchange, exchange_back, exchanges, wanted
from fqt.fusion.deferred import Between, accumulates
from fqt.fusion.modules import FusedBatchNorm1d, FusedBatchNorm2d, FusedMaxPool2d
from fqt.inspect.flops import register_flops
from fqt.inspect.flow import flow_of, traced_flow, uncalled
from fqt.inspect.summary import NOTE, count_macs, forget_macs
from fqt.inspect.timing import measure
from fqt.layers import STATES, QuantizedLayer, adapter_of, converted_class, plain_class, quantized_layers, refuse_frozen
from fqt.layers.lending import lend, lend_no_more
from fqt.layers.patched import rebind, stranger
from fqt.recipe import Recipe
from fqt.recipe_yaml import load_recipe
from fqt.report import log_conversion, log_parameters, speeds, why_nothing
from fqt.sharded import check_convertible, is_dtensor

FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: FusedBatchNorm1d,
    nn.BatchNorm2d: FusedBatchNorm2d,
    nn.MaxPool2d: FusedMaxPool2d,
}
_UNFUSED = {fused: plain for plain, fused in FUSED.items()}
_LEAF = "__module__"
"""torch.fx asks an instance for the module of its class, and traces into all that is not of torch.nn. What conversion changes
was a leaf, or has a forward that cannot be traced, so it answers "torch.nn"."""
AUTO = "auto"
"""`min_speedup` that measures when it can, and is no error where nothing gains."""
_SHORT_CUTS = "_fqt_short_cuts"
_OFF = {"use_nested_tensor": False, "activation_relu_or_gelu": 0}
"""Attribute of a transformer encoder or its layer, by which torch takes its fast path -> the value with which it does not."""
_log = logging.getLogger("fqt")


def convert(
    model: nn.Module,
    recipe: str | Path | Recipe,
    *,
    skip: Sequence[str] | str | None = None,
    only: Sequence[str] | str | None = None,
    overrides: Mapping[Override, str | Path | Recipe] | None = None,
    fuse: bool = True,
    backend: str | None = None,
    min_speedup: float | str | None = None,
    example: object = None,
) -> nn.Module:
    """Make every layer of a kind that fqt knows train by a recipe, in place: linear layers, convolutions of one to three axes,
    transposed ones of one and two, nn.MultiheadAttention, some subclasses in timm, torchvision and transformers that are known
    by name (one file a kind in fqt/layers/), and what `register_layer` added.

    Other subclasses of these are left alone (they may compute something else), and so are the adapters that LoRA puts beside a
    frozen layer; `summary` lists every module that holds a matrix, with the reason where it stays float.

    A converted layer has another class, QuantLinear in place of nn.Linear, derived from the plain one. So `isinstance` says
    what it said, and code that compares exact classes (`type(m) is nn.Linear`: weight initialization, freezing, FLOP counters,
    weight decay by kind, pruning and quantization tools) passes converted layers over without a word. Run such code before
    `convert` where it changes the model, and use `isinstance` in what runs afterwards. Optimizers, checkpoints, `compile`, DDP,
    hooks and parametrizations go behind `convert`, as `forward`s that are set on an instance must. Torch's FlopCounterMode
    counts the low-bit products too, if it is imported before `convert`.

    Args:
        model: any module; may itself be a layer.
        recipe: a built-in name (`fqt.recipes()`), the path of a YAML file, or a `Recipe`. "fp32" changes nothing.
        skip: fnmatch patterns of module names ("features.0", "*.downsample.*") that stay in float, beside the recipe's own
            rules.
        only: patterns of the module names that are converted; the others stay float.
        overrides: {pattern: recipe, or "float"}; a pattern may be one of the places of rules ("<depthwise>") or a predicate,
            called with a layer's name and module. The first that holds decides, before the recipe's rules, for layers
            that `skip` and `only` leave. The one way to convert an adapter.
        fuse: in a 1-bit recipe, have BatchNorm and max-pooling work together with the layers around them: the next layer
            takes the signs that it needs, and no float activation is written or kept between (see `fqt.fusion`). Eager
            float32 on a CPU; elsewhere it changes nothing. Same formulas; sums of the statistics are rounded otherwise than
            torch rounds them.
        backend: the one backend that must serve every low-bit product of the layers and the quantizing of their operands
            ("reference", "cpu", ...). None: the one that the environment's FQT_BACKEND names, else for each product the
            fastest that serves it.
        min_speedup: keep a layer float where its float time over its low-bit time, measured as by `fqt.profile` here and
            now, is less than this: 1.0 converts what gains. "auto" is 1.0, and without `example` waits for one: at the first
            eager forward in training the model is converted anew, by the speeds on that batch. Where every layer loses, a
            number is an error, and "auto" leaves the model float with a warning. In torch.distributed rank 0 decides for all
            ranks, which therefore have to convert together.
        example: an input of the model: a tensor, a tuple of arguments or a mapping of keyword arguments. One forward of it, on
            a copy, shows what flows where: the rules' <first> and <last> are then the ends of that flow, an activation is
            exchanged where a layer reads it whose recipe says so, and the log says which converted layers are not called, what
            share of the multiply-adds is converted, and which signs are all alike. For `min_speedup` give it in size and
            memory format those of the training.

    Without `example` <first> and <last> are the first and the last module that holds a matrix, in the order of
    `model.named_modules()`, and the readers of activations are found by torch.fx, or where that cannot trace the model,
    taken to be the layers beside them.

    Returns:
        The model.

    Raises:
        ValueError: the model is converted already, or frozen, a pattern matches no layer, or nothing is left to convert; a
            layer has a `forward` set on the instance that would not reach the converted one, or is pruned and its zeros would
            get codes that are not zero; the named backend is unknown or cannot serve a layer; `min_speedup` is not a positive
            number or "auto", or comes without `example`, which "auto" too needs for a model that is a layer itself, and for
            a recipe whose layers have parameters of their own.
        TypeError: `model` is not a module, `skip` or `only` is not strings, or `overrides` is not such a mapping.

    An error leaves the model as it was.
    """
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}: make an instance" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"convert takes a torch.nn.Module, not {what}")
    recipe, backend = load_recipe(recipe), ops.named_backend(backend)
    skip, only, by_name = patterns("skip", skip), patterns("only", only), load_overrides(overrides)
    refuse_frozen(model, "fqt.convert")
    converted = [name for name, _ in quantized_layers(model)]
    if converted:
        raise ValueError(
            f"the model is converted already ({len(converted)} layers, the first is {converted[0]!r}): "
            f"call fqt.revert(model) before another conversion"
        )
    layers = {name: module for name, module in model.named_modules() if adapter_of(module) is not None}
    _check_speedup(min_speedup, example)
    if min_speedup == AUTO and example is None:
        options = {"skip": skip, "only": only, "overrides": overrides, "fuse": fuse, "backend": backend}
        return _wait_for_a_batch(convert(model, recipe, **options), {"recipe": recipe, **options})
    check_convertible(model, example)
    flow = None if example is None else flow_of(model, example)
    ends = ends_by_kind(model) if flow is None else flow.ends()
    choices = choose(model, layers, recipe, ends, skip=skip, only=only, overrides=by_name)
    if recipe.is_float and all(override is None or override.is_float for override in by_name.values()):
        return model
    chosen = {name: choice.recipe for name, choice in choices.items() if choice.recipe is not None}
    if not chosen:
        raise ValueError(
            f"recipe {recipe.name!r} converts nothing in this {type(model).__name__}: {why_nothing(model, choices)}"
        )
    for name, layer_recipe in chosen.items():
        adapter = adapter_of(layers[name])
        assert adapter is not None
        try:
            layer_recipe.check(adapter.kind)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
    for name in chosen:
        patch = stranger(layers[name])
        if patch is not None:
            raise ValueError(
                f"layer {name!r} has a forward of its own, {patch}, set on the instance, which would go on computing in float: "
                f"convert first and patch afterwards, or keep this layer float by skip={name!r}"
            )
    for each in [recipe, *chosen.values()]:
        exchanges(each)
    least = 1.0 if isinstance(min_speedup, str) else min_speedup
    slow = {} if least is None else _slower(model, chosen, backend, least, example)
    chosen = {name: layer_recipe for name, layer_recipe in chosen.items() if name not in slow}
    if not chosen:
        said = f"recipe {recipe.name!r} converts nothing in this {type(model).__name__}: every layer is slower than "
        if min_speedup == AUTO:
            _remember(model, layers, choices, chosen, slow)
            _log.warning("%sfloat32 here (%s), so it trains in float", said, speeds(slow))
            return model
        raise ValueError(f"{said}min_speedup={least:g} ({speeds(slow)}); lower it, or keep the model float here")

    try:
        for name, layer_recipe in chosen.items():
            quantize_layer(name, layers[name], layer_recipe, backend)
    except ValueError:
        for name in chosen:
            make_plain(layers[name])
        raise
    for name in uncalled(model, flow):
        lend(model.get_submodule(name.rpartition(".")[0]))
    _remember(model, layers, choices, chosen, slow)
    flow = flow or (traced_flow(model) if candidates(model, chosen) else None)
    exchanged = wanted(model, chosen, flow)
    kept = candidates(model, chosen).keys() - exchanged.keys()
    for name, fresh in exchanged.items():
        exchange(model.get_submodule(name), fresh)
    if fuse and any(accumulates(layer.recipe) for _, layer in quantized_layers(model)):
        fuse_model(model, backend)
    if "torch.utils.flop_counter" in sys.modules:
        register_flops()
    log_parameters(model, recipe)
    log_conversion(
        model, recipe, chosen, choices, flow, exchanged, kept, slow, backend=backend, min_speedup=least, example=example
    )
    return model


def _remember(
    model: nn.Module,
    layers: dict[str, nn.Module],
    choices: dict[str, Choice],
    chosen: dict[str, Recipe],
    slow: dict[str, float],
) -> None:
    """Leave with the modules what `summary` and `revert` need: why a layer stays float, how to count, what was switched off."""
    for name, choice in choices.items():
        if name not in chosen:
            layers[name].__dict__[NOTE] = (
                f"kept float: {slow[name]:.2f}x measured" if name in slow else f"kept float {choice.reason}"
            )
    for layer in layers.values():
        count_macs(layer)
    take_no_short_cuts(model)


def take_no_short_cuts(model: nn.Module) -> None:
    """Have torch's transformer encoders call their converted layers in evaluation, where they would multiply the float weights
    of all in one operator. A frozen layer has none."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer) and any(quantized_layers(module)):
            taken = {name: getattr(module, name) for name in _OFF if getattr(module, name, None)}
            module.__dict__.update({name: _OFF[name] for name in taken})
            module.__dict__.setdefault(_SHORT_CUTS, {}).update(taken)


def quantize_layer(name: str, layer: nn.Module, recipe: Recipe, backend: str) -> None:
    """Convert a layer. ValueError where a backend is named that does not serve all that the layer asks of kernels, or
    where the codes do not keep a pruned layer's mask."""
    plain, layer.__class__ = type(layer), converted_class(layer)
    rebind(layer, plain, type(layer))
    assert isinstance(layer, QuantizedLayer)
    layer.__dict__[_LEAF] = "torch.nn"
    layer.recipe = recipe
    added = layer.states_names(parameters=True)
    if added and is_dtensor(layer.weight):
        raise ValueError(
            f"layer {name!r}: recipe {recipe.name!r} adds the parameters {', '.join(added)}, which fully_shard has not seen, "
            f"so that no rank would get the others' gradients of them: convert before sharding"
        )
    if backend:
        layer.backend = backend
        layer.check_backend(name)
    lost = layer.lost_zeros()
    if lost:
        quantizer = recipe.quantizer("output", "w")
        raise ValueError(
            f"layer {name!r} is pruned, and as {quantizer} {lost} of its {layer.weight.numel()} weights would come back from "
            f"zero: choose weights that have a zero, such as {{quantizer: ternary_weight}}, or keep it float by skip={name!r}"
        )


def make_plain(layer: nn.Module) -> None:
    """Undo `quantize_layer`, where it was done."""
    if isinstance(layer, QuantizedLayer):
        del layer.__dict__["recipe"]
        layer.__dict__.pop("backend", None)
        layer.__dict__.pop("fusion", None)
        layer._modules.pop(STATES, None)
        for name in ("changing", "watcher", _LEAF):
            layer.__dict__.pop(name, None)
        plain = plain_class(layer)
        assert plain is not None
        rebind(layer, type(layer), plain)
        layer.__class__ = plain  # type: ignore[assignment]


def _check_speedup(min_speedup: object, example: object) -> None:
    if min_speedup is None or min_speedup == AUTO:
        return
    if not isinstance(min_speedup, int | float) or not min_speedup > 0:
        raise ValueError(f'min_speedup is {min_speedup!r}, not a positive number such as 1.0, and not "auto"')
    if example is None:
        raise ValueError(f"min_speedup={min_speedup:g} is measured: give example=, an input as large as in training")


def _slower(model: nn.Module, chosen: dict[str, Recipe], backend: str, min_speedup: float, example: object) -> dict[str, float]:
    """Layer name -> measured speed-up, of the chosen layers below `min_speedup`. One that `example` does not reach is none."""
    trial = copy.deepcopy(model)
    for name, recipe in chosen.items():
        quantize_layer(name, trial.get_submodule(name), recipe, backend)
    speedups = [measure(trial, example, seconds=0.1).speedups()]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(speedups)  # ranks that converted other layers would train other models
    return {name: speedup for name, speedup in speedups[0].items() if speedup < min_speedup}


class _FirstBatch:
    """A hook before a converted model's forward: with the training's first batch it converts it anew, by measured speeds."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options

    def __call__(self, model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if not model.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        example = {**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs} if kwargs else args
        convert(revert(model), **self.options, min_speedup=AUTO, example=example)


def _wait_for_a_batch(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """Have a model that is converted measure its layers when the training begins. ValueError, and the model is as it was before
    it was converted, where it cannot be converted anew while an optimizer has its parameters."""
    layers = dict(quantized_layers(model))
    added = [f"{name}.{state}" for name, layer in layers.items() for state in layer.states_names(parameters=True)]
    if added or "" in layers:
        revert(model)
        what = f"its layers have parameters of their own ({added[0]}, ...)" if added else "the model is a layer itself"
        raise ValueError(f'min_speedup="auto" cannot wait for a batch, because {what}: give example=, an input of the training')
    if layers:
        model.register_forward_pre_hook(_FirstBatch(options), with_kwargs=True)
    return model


def fuse_model(model: nn.Module, backend: str) -> None:
    """Let layers, BatchNorms and poolings hand each other what they did not compute yet."""
    if not any(type(module) in (nn.BatchNorm1d, nn.BatchNorm2d) for module in model.modules()):
        return
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            module.__dict__["fusion"] = Between
        elif type(module) in FUSED:
            module.__class__ = FUSED[type(module)]
            module.__dict__[_LEAF] = "torch.nn"
            if backend and not isinstance(module, FusedMaxPool2d):
                module.__dict__["backend"] = backend


def revert(model: nn.Module) -> nn.Module:
    """Undo `convert`, in place: plain layers and activations again, the parameters as they are now. Returns the model.

    Parameters and buffers of quantizers (a learned step, a running range) go with them; the log names them.

    Raises:
        ValueError: nothing in the model is converted, or it is frozen, or a layer has become something else since, or has got a
            `forward` set on the instance that goes on calling the one of now.
    """
    layers = dict(quantized_layers(model))
    if not layers:
        raise ValueError(f"nothing in this {type(model).__name__} is converted: there is nothing to revert")
    refuse_frozen(model, "fqt.revert")
    for name, layer in layers.items():
        if plain_class(layer) is None:
            raise ValueError(
                f"layer {name!r} is a {type(layer).__name__}, no longer what fqt.convert made of it: "
                f"undo that first (a parametrization: torch.nn.utils.parametrize.remove_parametrizations)"
            )
        patch = stranger(layer)
        if patch is not None:
            raise ValueError(
                f"layer {name!r} has a forward of its own, {patch}, set on the instance since fqt.convert, which would go on "
                f"computing in low bits: take it off first"
            )
    states = [f"{name}.{state}" for name, layer in layers.items() for state in layer.states_names()]
    for number, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, _FirstBatch):
            del model._forward_pre_hooks[number], model._forward_pre_hooks_with_kwargs[number]
    for module in list(model.modules()):
        make_plain(module)
        forget_macs(module)
        module.__dict__.pop(NOTE, None)
        if type(module) in _UNFUSED:
            module.__class__ = _UNFUSED[type(module)]  # type: ignore[assignment]
            module.__dict__.pop("backend", None)
            module.__dict__.pop(_LEAF, None)
        exchange_back(module)
        lend_no_more(module)
        module.__dict__.update(module.__dict__.pop(_SHORT_CUTS, {}))
    if states:
        _log.info("reverted; dropped with the quantizers: %s", ", ".join(states))
    return model
