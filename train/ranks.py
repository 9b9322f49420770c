"""The processes of one run: one alone, or the ranks that torchrun started. Every collective of the program is here."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from train.wording import ConfigError, TrainingError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's place among `world` processes, and the device it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process prints, tracks and writes checkpoints."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over all ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order of rank, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def any(self, *flags: bool) -> list[bool]:
        """Each flag, raised on every rank where it is raised on one."""
        return [count > 0 for count in self.sum([float(flag) for flag in flags])] if self.world > 1 else list(flags)

    def all(self, flag: bool) -> bool:
        """Whether the flag is raised on every rank."""
        return not self.any(not flag)[0]

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank; a mistake that it names there is raised on all of them."""
        if self.world == 1:
            return make()
        outcome: list[Any] = [None, None]
        if self.main:
            try:
                outcome[0] = make()
            except (ConfigError, TrainingError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def broadcast(self, tensors: Iterator[Tensor]) -> None:
        """Overwrites the tensors with rank 0's."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 does the block before the others: what it downloads, they find."""
        if self.world > 1 and not self.main:
            dist.barrier()
        yield
        if self.world > 1 and self.main:
            dist.barrier()


@contextmanager
def join(device: str) -> Iterator[Ranks]:
    """Takes this process's place, and leaves it when the block ends. device: "auto", "cpu" or "cuda".

    Raises ConfigError where cuda is asked for and absent.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('device = "cuda": torch finds no GPU here; leave it out, or set device=cpu.')
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    place = torch.device("cuda", local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(place)
    if world == 1:
        yield Ranks(0, 1, place)
        return
    store, rank, world = next(dist.rendezvous("env://"))  # type: ignore[reportPrivateImportUsage]
    if os.environ.get("GROUP_WORLD_SIZE") == "1":  # torchrun on one machine, which counts its restarts
        # the store outlives a restart, and in it the addresses of the processes before
        start = f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        store = dist.PrefixStore(start, store)  # type: ignore[reportPrivateImportUsage]
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    try:
        yield Ranks(dist.get_rank(), world, place)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise TrainingError("another process of this run ended, and so this one ends too.") from error
    finally:
        dist.destroy_process_group()
