"""thaw: from a frozen model to a converted one that trains on from its codes."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor, nn

from fqt.freeze import TRAINED_BY
from fqt.inspect.summary import count_macs
from fqt.layers import PACKED, QuantizedLayer, adapter_of, quantized_layers
from fqt.packed import PackedWeight, canonical
from fqt.qtensor import QTensor
from fqt.quantizers import Quantizer
from fqt.quantizers.stages import Calibration
from fqt.reference import spread, unpack

_log = logging.getLogger("fqt")


def thaw(frozen: nn.Module, architecture: nn.Module) -> nn.Module:
    """Have a frozen model train again, in place: float weights that are the values of its codes, and the recipes that it was
    trained by. Returns the model, in training; the log says what is lost.

    Args:
        architecture: that of the model, whose ties between parameters are made again: where one of them is still float, its
            values are taken.

    Raises:
        ValueError: a layer's weight was transformed with its product before it was packed, by what has no way back.
    """
    layers = dict(quantized_layers(frozen))
    for name, layer in layers.items():
        transform = layer.recipe.output.transform
        if transform is not None and len(layer._modules[PACKED]):  # type: ignore[arg-type]
            raise ValueError(f"layer {name!r} was packed after {transform}, from which no weight comes back: load it frozen")
    packed = {name: [weight.qtensor() for weight in layer._modules[PACKED]] for name, layer in layers.items()}  # type: ignore
    for name, layer in layers.items():
        _thaw_layer(layer)
        if packed[name]:
            _rescale(layer, packed[name])
    _tie(frozen, architecture, {f"{name}.{layer.weight_name}".lstrip(".") for name, layer in layers.items() if packed[name]})
    for parameter in frozen.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    total = sum(math.prod(q.shape) for parts in packed.values() for q in parts)
    changed = sum(_changed(parts, layers[name].quantized_weights()) for name, parts in packed.items())
    for module in frozen.modules():
        if adapter_of(module) is not None:
            count_macs(module)
    _log.warning(
        "loaded to train on: %d layers have the values of their codes as float weights (%d of %d codes would be others now). "
        "Lost: what their weights were between the codes, the state of optimizer, schedule and precision policy, and of the "
        "gradients' quantizers; all parameters train",
        len(layers), changed, total,
    )  # fmt: skip
    return frozen.train()


def _thaw_layer(layer: QuantizedLayer) -> None:
    weights: list[PackedWeight] = list(layer._modules.pop(PACKED))  # type: ignore[arg-type]
    recipe = layer.__dict__.pop(TRAINED_BY)
    if weights:
        placeholder: Tensor = layer.__dict__.pop(layer.weight_name)
        quantizer = recipe.quantizer("output", "w")
        number = torch.arange(placeholder.numel(), device=placeholder.device).view(placeholder.shape)
        flat = torch.empty(placeholder.numel(), device=placeholder.device)
        for weight, place in zip(weights, layer.split(number), strict=True):
            flat[canonical(place)] = _before(weight.qtensor().decode(), quantizer)
        weight = nn.Parameter(flat.view(placeholder.shape).to(placeholder.dtype))
        layer.__dict__["_parameters"] = {layer.weight_name: weight, **layer._parameters}
    del layer.__dict__["recipe"]  # so that all states are made that the recipe has
    layer.recipe = recipe
    calibration = None if not weights else recipe.quantizer("output", "w").calibrate
    if isinstance(calibration, Calibration) and layer.states is not None and "output_w" in layer.states:
        calibration.resume(layer.states["output_w"][calibration.word], weights[0].qtensor())


@torch.no_grad()
def _rescale(layer: QuantizedLayer, packed: list[QTensor]) -> None:
    """Multiply the weight where its scale would be found to be another than that of its codes, as a mean of |w| is over codes
    that have a zero; not where that changes a code."""
    weight = layer._parameters[layer.weight_name]
    assert weight is not None
    now, factor = layer.quantized_weights(), torch.ones_like(weight, dtype=torch.float32)
    number = torch.arange(weight.numel(), device=weight.device).view(weight.shape)
    for q, other, place in zip(packed, now, layer.split(number), strict=True):
        ratio = (spread(q.scale, q) / spread(other.scale, other)).expand(q.shape)
        factor.view(-1)[canonical(place)] = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
    before, codes = weight.clone(), _changed(packed, now)
    weight.mul_(factor.to(weight.dtype))
    if _changed(packed, layer.quantized_weights()) > codes:
        weight.copy_(before)


def _changed(packed: list[QTensor], now: list[QTensor]) -> int:
    """How many codes differ."""
    pairs = zip(packed, now, strict=False)
    return sum(int((unpack(a.codes, a.format, a.shape) != unpack(b.codes, b.format, b.shape)).sum()) for a, b in pairs)


def _before(value: Tensor, quantizer: Quantizer) -> Tensor:
    """A weight whose transform is this value. What a registered transform was given is not known: it is applied once more."""
    if quantizer.transform == "tanh":  # of tanh(w) / max|tanh(w)|, with a largest weight of 1
        return torch.atanh(value.clamp(-1, 1) * math.tanh(1))
    return value


def _tie(model: nn.Module, architecture: nn.Module, decoded: set[str]) -> None:
    """Parameters that are one in the architecture are one in the model: a float one where there is one."""
    names: dict[int, list[str]] = {}
    for name, parameter in architecture.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for tied in names.values():
        if len(tied) > 1:
            source = model.get_parameter(next((name for name in tied if name not in decoded), tied[0]))
            for name in tied:
                path, _, attribute = name.rpartition(".")
                model.get_submodule(path)._parameters[attribute] = source
