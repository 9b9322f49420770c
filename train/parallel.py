"""How the ranks of a run share its work: DDP, its gradients in float32 or in a few bits on the wire, or FSDP2.

A checkpoint holds whole tensors, whichever it was: `whole` gathers them, `spread` gives each rank its part again.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from fqt.distributed import QuantizedAllReduce, quantized_allreduce_hook
from fqt.inspect.summary import matrix_weights
from fqt.layers import STATES
from fqt.sharded import is_dtensor, is_sharded_class
from train.config import Distributed
from train.ranks import Ranks


@dataclass
class Parallel:
    """The engine of a run.

    hook: what averages the gradients of the run's own model, where they travel in a few bits.
    """

    config: Distributed
    place: Ranks
    hook: QuantizedAllReduce | None = field(default=None, init=False)

    def wrap(self, model: nn.Module) -> tuple[nn.Module, QuantizedAllReduce | None]:
        """What is called in place of the model, from rank 0's weights on; and the hook of its gradients, if it has one.

        FSDP2 shards the model itself; DDP leaves it as it is.
        """
        if self.place.world == 1:
            return model, None
        if self.config.engine == "fsdp2":
            return shard(model), None
        # the order in which gradients first came would lay them out anew after a run's first step, and after a resumed one's:
        # sums of three ranks and more, and blocks of a few bits, would then be others than in a run that never stopped
        devices = [self.place.device] if self.place.device.type == "cuda" else None
        replica = DistributedDataParallel(model, device_ids=devices, find_unused_parameters=True)
        if self.config.gradient_bits is None:
            return replica, None
        hook = quantized_allreduce_hook(self.config.gradient_bits, error_feedback=self.config.error_feedback)
        replica.register_comm_hook(None, hook)
        return replica, hook

    def copy(self, model: nn.Module, build: Callable[[], nn.Module]) -> nn.Module:
        """A whole copy of the run's model, on every rank. build: makes a converted model with other weights."""
        if not is_sharded_class(type(model)):
            return copy.deepcopy(model)
        made = build()
        made.load_state_dict(whole(model.state_dict()))
        return made.train(model.training)

    def due(self, step: int) -> bool:
        """Whether replicas are compared after a step."""
        every = self.config.compare_every
        return self.place.world > 1 and every > 0 and step % every == 0

    def differing(self, model: nn.Module) -> str:
        """The first weight or scale that is not the same on every rank, and on which ranks; "" if all are."""
        found = self.place.gather(fingerprints(model))
        for name in found[0]:
            others = [str(rank) for rank, prints in enumerate(found) if prints.get(name) != found[0][name]]
            if others:
                return f"{name} on rank {' and '.join(others)}"
        return ""

    def state(self) -> dict[str, Any]:
        """What is this rank's own: the residual of the hook."""
        return {} if self.hook is None else self.hook.state_dict()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken. Raises ValueError where it is no such state."""
        if self.hook is not None:
            self.hook.load_state_dict(dict(state))
        elif state:
            raise ValueError("it holds the residual of gradients in a few bits")

    def scalars(self) -> dict[str, float]:
        """Bytes that this rank has sent, in MiB, and how many times fewer than a ring all-reduce in float32 had sent."""
        if self.hook is None or not self.hook.bytes_sent:
            return {}
        sent, in_float = self.hook.bytes_sent, self.hook.bytes_float
        return {"distributed/sent_mib": sent / 2**20, "distributed/times_fewer": in_float / sent}


def shard(model: nn.Module) -> nn.Module:
    """`fully_shard` of each member of the model's sequences that holds a matrix, and of the rest. Returns the model."""
    from torch.distributed.fsdp import fully_shard  # not at import: it loads the compiler

    for block in blocks(model):
        fully_shard(block)
    fully_shard(model)
    return model


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost members of nn.Sequential and nn.ModuleList that hold a matrix; what is gathered at once in a forward."""
    for child in module.children():
        if isinstance(module, nn.Sequential | nn.ModuleList):
            if any(matrix_weights(part) for part in child.modules()):
                yield child
        else:
            yield from blocks(child)


def without_sync(module: nn.Module) -> Callable[[], AbstractContextManager[Any]]:
    """What keeps a backward from averaging gradients, since another part of the batch follows."""
    if is_sharded_class(type(module)):
        sharded: Any = module

        @contextmanager
        def kept() -> Iterator[None]:
            sharded.set_requires_gradient_sync(False)
            try:
                yield
            finally:
                sharded.set_requires_gradient_sync(True)

        return kept
    return getattr(module, "no_sync", nullcontext)


def whole(tree: Any) -> Any:
    """Nested values with whole tensors in place of those that are spread over ranks. Every rank has to call it."""

    def gather(tensor: Any) -> Any:
        return tensor.detach().full_tensor() if is_dtensor(tensor) else tensor

    return tree_map_only(Tensor, gather, tree)


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    part: Any = tensor
    return part.to_local() if is_dtensor(tensor) else tensor


def spread_model(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict of whole tensors as the model's own state dict holds them."""
    mine = model.state_dict()
    return {name: _alike(tensor, mine.get(name)) for name, tensor in state.items()}


def spread_optimizer(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state dict of whole tensors, with moments as its parameters are spread."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {
            name: _alike(value, parameters[index]) if isinstance(value, Tensor) and value.dim() else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": moments}


def _alike(tensor: Tensor, like: Tensor | None) -> Tensor:
    if not is_dtensor(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    part: Any = like
    return distribute_tensor(tensor.to(part.device), part.device_mesh, part.placements, src_data_rank=None)


def fingerprints(model: nn.Module) -> dict[str, int]:
    """A checksum of each weight and scale that every rank has whole. BatchNorm's means are not among them: rank 0's count."""
    named = dict(model.named_parameters())
    named |= {name: buffer for name, buffer in model.named_buffers() if f"{STATES}." in name}
    return {name: _checksum(tensor.detach()) for name, tensor in named.items() if not is_dtensor(tensor)}


def _checksum(tensor: Tensor) -> int:
    """Of a tensor's bits; exact, so that it does not depend on the order of the sum."""
    words = torch.int32 if tensor.element_size() % 4 == 0 else torch.uint8
    flat = tensor.contiguous().flatten().view(words).long()
    places = torch.arange(1, flat.numel() + 1, device=flat.device)
    return int((flat * places).sum())
