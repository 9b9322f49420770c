"""Layers whose parameters are spread over ranks: FSDP2 (`fully_shard`), FSDP1, tensor parallelism.

In the forward of a layer under FSDP the weight is whole, and nothing here is needed. Outside of it the layer holds this rank's
part, so whoever looks at a weight there looks within `gathered`, on every rank at once: gathering is a collective operation.

`fully_shard` gives a module a class of its own, FSDPModule before the former one. Conversion exchanges the former one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def is_sharded_class(kind: type[nn.Module]) -> bool:
    """Whether `fully_shard` made the class."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # who has such a module has imported it
    return fsdp is not None and issubclass(kind, fsdp.FSDPModule)


def unsharded(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a module, that beneath `fully_shard`'s if it has one."""
    return kind.__bases__[-1] if is_sharded_class(kind) else kind


def sharded_alike(kind: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """`base`, or where `kind` is a class of `fully_shard` one like it that is derived from `base`."""
    if not is_sharded_class(kind):
        return base
    name = kind.__name__.removesuffix(unsharded(kind).__name__) + base.__name__
    body = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
    return type(name, (*kind.__bases__[:-1], base), body)


def is_dtensor(tensor: object) -> bool:
    """Whether a tensor is spread over ranks as torch's DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@contextmanager
def gathered(layer: nn.Module) -> Iterator[None]:
    """Within, the layer's parameters are whole, with the values of now. Every rank must enter it; costs the layer's memory."""
    exchanged: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    try:
        for part in layer.modules():
            for name, parameter in part._parameters.items():
                if is_dtensor(parameter):
                    whole = parameter.detach().full_tensor()  # type: ignore[union-attr]
                    exchanged.append((part._parameters, name, parameter))  # type: ignore[arg-type]
                    part._parameters[name] = nn.Parameter(whole, parameter.requires_grad)  # type: ignore[union-attr]
        yield
    finally:
        for parameters, name, parameter in exchanged:
            parameters[name] = parameter


def is_fsdp1(model: nn.Module) -> bool:
    """Whether FSDP1 holds parameters of the model, of which its modules then have views or parts of other shapes."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules())


@contextmanager
def summoned(model: nn.Module) -> Iterator[None]:
    """Within, the parameters of a model under FSDP1 are whole; under anything else nothing happens."""
    if not is_fsdp1(model):
        yield
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        yield


def check_convertible(model: nn.Module, example: object) -> None:
    """Raises ValueError for a model that is sharded so that it has to be converted first."""
    if is_fsdp1(model):
        raise ValueError("a FullyShardedDataParallel model holds parts of its weights: convert the model, then wrap it")
    if example is not None and any(is_sharded_class(type(module)) for module in model.modules()):
        raise ValueError("example= is run on a copy, and torch cannot copy a model after fully_shard: convert before sharding")


def refuse_dtensor(tensor: Tensor) -> None:
    """Raises TypeError for a tensor whose values are spread over ranks: a scale of its part would not be that of the whole."""
    if is_dtensor(tensor):
        placements: Any = tensor.placements  # type: ignore[attr-defined]
        raise TypeError(
            f"a low-bit product got a DTensor, {', '.join(map(str, placements))}: of tensor parallelism fqt knows linear "
            "layers as ColwiseParallel and RowwiseParallel make them; leave this layer whole"
        )
