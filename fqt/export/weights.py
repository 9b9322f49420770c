"""What a file of weights holds: each entry of the plain model's state dict, that of a quantized weight with its codes.

The codes and scales are those that an evaluation multiplies with (`layer.quantized_weight`); nothing is calibrated again.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fqt.layers import STATES, QuantizedLayer, quantized_layers
from fqt.qtensor import QTensor


@dataclass(frozen=True)
class Entry:
    """One tensor of a plain model's state dict.

    Attributes:
        name: its name there.
        value: as the plain model has it, any dtype; of a quantized weight the decoded codes, float32.
        q: the codes, logical (O, K, I); None where the model computes with the value itself.
        layer: whose weight it is, where it has codes.
    """

    name: str
    value: Tensor
    q: QTensor | None = None
    layer: QuantizedLayer | None = None


def entries(model: nn.Module) -> list[Entry]:
    """The plain model's state dict, in its order, on the CPU. Tensors that share memory, such as tied ones, are each listed.

    Raises:
        ValueError: a layer's weight is computed anew at every access, by a parametrization or by the layer, so that no plain
            layer could hold its codes; a weight that is not finite; or a quantized weight that another layer reads as a float.
    """
    quantized: dict[str, Entry] = {}
    memory: dict[int, str] = {}
    for name, layer in quantized_layers(model):
        if parametrize.is_parametrized(layer):
            raise ValueError(
                f"layer {name!r} computes its weight by a parametrization, which a plain layer has not: bake it in first, by "
                f"torch.nn.utils.parametrize.remove_parametrizations"
            )
        q = layer.quantized_weight()
        if q is None:
            continue
        own = next(key for key, parameter in layer.named_parameters(recurse=False) if parameter is layer.weight)
        full = f"{name}.{own}" if name else own
        value = in_own_shape(layer, name, own, q.decode().cpu())
        if not bool(value.isfinite().all()):
            raise ValueError(f"weight {full!r} holds a NaN or an infinity: there is nothing to export")
        quantized[full] = Entry(full, value, q, layer)
        memory[layer.weight.data_ptr()] = full
    states = tuple(f"{name}.{STATES}." if name else f"{STATES}." for name, _ in quantized_layers(model))
    found = []
    for name, value in model.state_dict().items():
        if name.startswith(states):
            continue
        of = memory.get(value.data_ptr()) if value.numel() else None
        if name not in quantized and of is not None and value.shape == quantized[of].value.shape:
            raise ValueError(
                f"{name!r} and the quantized weight {of!r} are one tensor, and {name!r} is read as a float: no file holds both "
                f"as one; untie them, or keep {of.rpartition('.')[0]!r} float by skip="
            )
        found.append(quantized.get(name) or Entry(name, value.detach().cpu()))
    return found


def in_own_shape(layer: QuantizedLayer, name: str, own: str, w_OKI: Tensor) -> Tensor:
    """(O, K, I) in the shape of the layer's own weight.

    Args:
        name, own: of the layer, and of its weight within it.

    Raises:
        ValueError: the layer computes (O, K, I) from its weight otherwise than by reordering it.
    """
    weight = layer.weight
    twin = copy.copy(layer)
    twin._parameters = dict(layer._parameters)
    twin._parameters[own] = nn.Parameter(torch.arange(weight.numel(), dtype=torch.float64).view(weight.shape), False)
    place = twin.weight_OKI().flatten()
    if not torch.equal(place.sort().values, torch.arange(weight.numel(), dtype=torch.float64)):
        raise ValueError(
            f"layer {name!r}, a {type(layer).__name__}, multiplies by another weight than its parameter, which a plain layer "
            f"would compute once more, from the codes: keep it float by fqt.convert(..., skip={name!r})"
        )
    return torch.empty_like(w_OKI).flatten().index_copy_(0, place.long(), w_OKI.flatten()).view(weight.shape)
