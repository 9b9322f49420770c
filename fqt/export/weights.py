"""What a file of weights holds: each entry of the plain model's state dict, that of a quantized weight with its codes.

The codes and scales are those that an evaluation multiplies with (`layer.quantized_weight`); nothing is calibrated again.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fqt.layers import PACKED, STATES, QuantizedLayer, quantized_layers
from fqt.qtensor import QTensor


@dataclass(frozen=True)
class Entry:
    """One tensor of a plain model's state dict.

    Attributes:
        name: its name there.
        value: as the plain model has it, any dtype; of a quantized weight the decoded codes, float32.
        q: the codes, logical (O, K, I); None where the model computes with the value itself.
    """

    name: str
    value: Tensor
    q: QTensor | None = None


def entries(model: nn.Module) -> list[Entry]:
    """The state dict of the plain model that a converted or frozen one was, in its order, on the CPU.

    A tensor with several names, such as a tied one, is listed under each; under that of a quantized weight with codes.

    Raises:
        ValueError: a layer's weight is computed anew at every access, by a parametrization or by the layer, so that no plain
            layer could hold its codes; or a quantized weight is not finite.
    """
    layers = dict(quantized_layers(model))
    weights = {_joined(name, layer.weight_name): _entry(name, layer) for name, layer in layers.items()}
    found: dict[str, Entry] = {}
    for key, value in model.state_dict().items():
        owner = next((name for name in _owners(key) if name in layers), None)
        inside = key.removeprefix(f"{owner}.") if owner else key
        part = inside.split(".")[0] if owner is not None else ""
        if part == STATES:
            continue
        weight = "" if owner is None else _joined(owner, layers[owner].weight_name)
        if weights.get(weight) is not None:
            found.setdefault(weight, weights[weight])  # type: ignore[arg-type]  # its place is before the bias
        if part != PACKED:
            found.setdefault(key, Entry(key, value.detach().cpu()))
    return list(found.values())


def _joined(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def _owners(key: str) -> list[str]:
    """The modules that a name of a state dict may be within, the nearest first."""
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, -1, -1)]


def _entry(name: str, layer: QuantizedLayer) -> Entry | None:
    """A layer's weight with its codes; None where it has none."""
    if parametrize.is_parametrized(layer):
        raise ValueError(
            f"layer {name!r} computes its weight by a parametrization, which a plain layer has not: export "
            f"fqt.freeze(model), or bake it in by torch.nn.utils.parametrize.remove_parametrizations"
        )
    q = layer.quantized_weight()
    if q is None:
        return None
    full, value = _joined(name, layer.weight_name), _in_own_shape(name, layer, q.decode().cpu())
    if not bool(value.isfinite().all()):
        raise ValueError(f"weight {full!r} holds a NaN or an infinity: there is nothing to export")
    return Entry(full, value, q)


def _in_own_shape(name: str, layer: QuantizedLayer, w_OKI: Tensor) -> Tensor:
    """(O, K, I) in the shape of the layer's own weight.

    Raises:
        ValueError: the layer computes (O, K, I) from its weight otherwise than by reordering it.
    """
    # a twin whose weight counts its elements, so that its (O, K, I) tells where each of them goes
    number, twin = torch.arange(w_OKI.numel(), dtype=torch.float64), copy.copy(layer)
    twin.__dict__.update(_parameters={}, **{layer.weight_name: number.view(layer.weight.shape)})
    place = twin.weight_OKI().flatten()
    if not torch.equal(place.sort().values, number):
        raise ValueError(
            f"layer {name!r}, a {type(layer).__name__}, multiplies by another weight than its parameter, which a plain layer "
            f"would compute once more, from the codes: keep it float by fqt.convert(..., skip={name!r})"
        )
    return torch.empty_like(w_OKI).flatten().index_copy_(0, place.long(), w_OKI.flatten()).view(layer.weight.shape)
