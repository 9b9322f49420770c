"""Linear layers whose weight torch.distributed.tensor.parallel has split: each rank quantizes and multiplies its part.

    ColwiseParallel  x whole,              w by output channels:  y by output channels
    RowwiseParallel  x by input channels,  w by input channels:   y as parts that add up over the ranks

A rank's part is a layer of its own to the recipe: scales of a tensor are those of the part, and its random numbers its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fqt.sharded import is_dtensor, refuse_dtensor

Multiply = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def multiply_part(x: Any, weight: Any, bias: Any, multiply: Multiply) -> Tensor:
    """The output for a DTensor x, as a DTensor.

    Args:
        x, weight, bias: (..., I), (O, I), (O,) or None, split over one axis of ranks as the styles above do it.
        multiply: of this rank's parts of x, weight and bias, its part of the output.

    Raises:
        TypeError: they are split otherwise.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard  # not at import: few need it

    last = x.dim() - 1
    layout = (x.placements, weight.placements) if is_dtensor(weight) else None
    mesh, shape = x.device_mesh, torch.Size((*x.shape[:-1], weight.shape[0]))
    stride = torch.empty(shape, device="meta").stride()
    if layout == ((Replicate(),), (Shard(0),)):
        x_part = x.to_local(grad_placements=[Partial()])
        y_part = multiply(x_part, weight.to_local(), None if bias is None else bias.to_local())
        return DTensor.from_local(y_part, mesh, [Shard(last)], run_check=False, shape=shape, stride=stride)
    if layout == ((Shard(last),), (Shard(1),)):
        y_part = multiply(x.to_local(), weight.to_local(), None)
        y = DTensor.from_local(y_part, mesh, [Partial()], run_check=False, shape=shape, stride=stride)
        return y if bias is None else y + bias
    refuse_dtensor(x)
    raise AssertionError("x is a DTensor")
