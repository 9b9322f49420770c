"""freeze: from a converted model to one for inference, whose weights are the codes that its evaluation multiplies by.

An evaluation of a converted model quantizes its weights again at every forward. In a frozen copy they are codes for good: each
weight is packed once, as the forward would, and the float weight, the gradients and all that only training reads are gone.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from fqt.convert import make_plain
from fqt.inspect.summary import NOTE, count_no_more, ran
from fqt.layers import PACKED, STATES, QuantizedLayer, quantized_layers
from fqt.layers.parametrized import beneath
from fqt.packed import PackedWeight

TRAINED_BY = "trained_by"
"""Attribute of a frozen layer: the recipe that it was trained by, gradients included."""
_log = logging.getLogger("fqt")


def freeze(model: nn.Module) -> nn.Module:
    """A copy of a converted model for inference, in evaluation, with packed weights. The model itself is left as it is.

    Its outputs are those of `model.eval()` under `torch.no_grad()`, bit for bit, wherever the same kernels serve. It is a
    module like any other: `.to()`, copies, torch.compile, torch.export, state dicts (`layer.packed.0.codes`), threads.
    Parametrizations, masks and norms of a packed weight (torch.nn.utils) are part of its codes. Layers that stayed float, and
    weights that the recipe keeps float, stay as they are. Gradients pass to inputs, multiplied in float by the codes; no
    parameter asks for one, and `.train()` is refused.

    A converted layer that the forwards since the conversion did not call, because the module around it reads its weight, keeps
    that weight in float. Where none has run yet this cannot be known, and such a module reads NaN: run one first.

    Raises:
        ValueError: nothing in the model is converted, or it is frozen already; or a weight is computed before every forward by
            something that is not of torch.nn.utils.
    """
    layers = dict(quantized_layers(model))
    if not layers:
        raise ValueError(f"nothing in this {type(model).__name__} is converted: fqt.convert it first, then train it")
    if any(layer.frozen for layer in layers.values()):
        raise ValueError(f"this {type(model).__name__} is frozen already: use it as it is, or copy.deepcopy it")
    frozen = copy.deepcopy(model, not_copied(model)).eval()
    copies = dict(quantized_layers(frozen))
    idle = {name for name, layer in copies.items() if ran(frozen) and not ran(layer)}
    for name in idle:
        layer = copies.pop(name)
        make_plain(layer)
        layer.__dict__[NOTE] = "not called before it was frozen: its weight stays float, for whatever reads it"
    for name, layer in copies.items():
        bake(name, layer)
    before, after = _pack_all(copies)
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    for module in frozen.modules():
        count_no_more(module)
    kept = f"; not called, so kept float: {', '.join(sorted(idle)[:6])}" if idle else ""
    level = logging.WARNING if idle else logging.INFO
    _log.log(level, "frozen: %d layers, weights of %s bytes as %s%s", len(copies), f"{before:,}", f"{after:,}", kept)
    return frozen


def not_copied(model: nn.Module) -> dict[int, Any]:
    """What stands in the copy for parts that deepcopy refuses or that belong to training: a memo for it."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # a masked or normed weight, with the graph of its forward
                memo[id(value)] = value.detach().clone()
        watcher = vars(module).get("watcher")
        if watcher is not None:
            memo[id(watcher)] = None
    return memo


def bake(name: str, layer: QuantizedLayer) -> None:
    """Make parameters of what is computed before every forward."""
    if parametrize.is_parametrized(layer):
        # not by torch's remove_parametrizations: that changes the class, which the copy shares with the model
        computed = {of: getattr(layer, of).detach().clone() for of in layer.parametrizations}  # type: ignore[union-attr]
        layer.__class__ = beneath(layer)  # type: ignore[assignment]
        del layer._modules["parametrizations"]
        for of, value in computed.items():
            layer.register_parameter(of, nn.Parameter(value))
    for hook in list(layer._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(layer, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(layer, hook.name)
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(layer, hook._tensor_name)
    if layer._parameters.get(layer.weight_name, layer) is None:
        raise ValueError(
            f"layer {name!r}: it keeps three weights, as keys or values have a size of their own, and a frozen layer has one: "
            f"convert with skip={name!r}"
        )
    if layer.weight_name not in layer._parameters:
        raise ValueError(
            f"layer {name!r}: its {layer.weight_name} is no parameter but computed before every forward: make it one first, as "
            f"torch.nn.utils.prune.remove does of a mask"
        )


def _pack_all(layers: dict[str, QuantizedLayer]) -> tuple[int, int]:
    """Exchange the float weights of layers for codes; the bytes before and after.

    Layers that share a weight, and encode it alike, share the codes.
    """
    owner: dict[int, str] = {}
    for name, layer in layers.items():
        owner.setdefault(id(layer.weight), name)
    owners = {name: owner[id(layer.weight)] for name, layer in layers.items()}
    before, made = sum(layers[name].weight.nbytes for name in owner.values()), {}
    for name, layer in layers.items():
        alone = name if layer.multiplied() is not layer.weight or _has_state(layer) else ""
        alike = (owners[name], alone, type(layer), layer.window(), layer.recipe.output, layer.backend)
        if alike not in made:
            made[alike] = _packed(layer)
        exchange_weight(layer, made[alike])
    kept = {id(layer.weight): layer.weight.nbytes for layer in layers.values() if layer.weight_name in layer._parameters}
    return before, sum(kept.values()) + sum(buffer.nbytes for weights in made.values() for buffer in weights.buffers())


def _has_state(layer: QuantizedLayer) -> bool:
    return layer.states is not None and "output_w" in layer.states


def _packed(layer: QuantizedLayer) -> nn.ModuleList:
    """The layer's packed weights; none where its recipe keeps the weight float."""
    with torch.no_grad():
        shapes = [part.shape for part in layer.weights()]
        return nn.ModuleList(map(PackedWeight, layer.quantized_weights(), shapes)).eval()


def exchange_weight(layer: QuantizedLayer, weights: nn.ModuleList) -> None:
    """Put packed weights in the place of a layer's float weight, and leave away what evaluation does not read."""
    layer.__dict__[TRAINED_BY] = layer.recipe
    layer.recipe = layer.recipe.frozen()
    for name in ("changing", "watcher"):
        layer.__dict__.pop(name, None)
    if len(weights):
        states = layer._modules.get(STATES)
        if _has_state(layer):
            del states["output_w"]  # type: ignore[index]
        if states is not None and not len(states):  # type: ignore[arg-type]
            del layer._modules[STATES]
        weight = layer._parameters.pop(layer.weight_name)
        assert weight is not None
        layer.put_placeholder(weight, weight.shape)
    layer.add_module(PACKED, weights)
