"""Gradients that travel between ranks in low bits: a communication hook for DistributedDataParallel.

    ddp.register_comm_hook(None, fqt.distributed.quantized_allreduce_hook(bits=4))

DoReFa's idea on the wire. Each rank cuts its gradients into one piece a rank, encodes the pieces and sends each to its rank
(all-to-all); that one averages them in float32, encodes the mean and sends it to all (all-gather). So every rank ends with the
same numbers, decoded from the same codes, and what travels is 32 / bits times less than in float32, but for the scales.

Two codes, both in blocks with a scale and an offset each that travel with them:
- plain: min-max with stochastic rounding, as `psq`. Exactly unbiased.
- rotated: EDEN (Vargaftik et al., arXiv 2108.08842; for one bit DRIVE, arXiv 2105.08339). A random Hadamard rotation makes a
  block's values nearly normal; they are rounded to the nearest of the levels that suit a normal distribution, and scaled by
  |y|^2 / <y, Q(y)>, which undoes the bias of the rounding for a uniformly random rotation; a Hadamard rotation comes near to
  one, less so where a few values are most of a block. Its error is 3 to 180 times smaller at up to 4 bits, where it is the
  default.
"""

import math
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fqt.formats import Format
from fqt.ops import draw_key
from fqt.qtensor import QTensor
from fqt.quantizers import Quantizer, quantize
from fqt.quantizers.hadamard import walsh

REACH = {1: 0.7979, 2: 1.4936, 4: 2.5139, 8: 4.0}
"""The outermost level by bits, in standard deviations: evenly spaced levels with the least squared error for a normal variable
(Max, 1960, table II; for 8 bits a round number, at which nothing is lost)."""
SCALE_BYTES = 8
"""Of a block's scale and offset in float32."""


def quantized_allreduce_hook(
    bits: int, *, block: int = 1024, rotate: bool | None = None, error_feedback: bool = False, seed: int = 0
) -> "QuantizedAllReduce":
    """A hook for `DistributedDataParallel.register_comm_hook(None, hook)`.

    Args:
        bits: of a gradient on the wire: 1, 2, 4 or 8.
        block: values that share a scale, a power of two.
        rotate: the rotated code; None: for all but 8 bits.
        error_feedback: add what the encoding of this rank's gradients lost to the next step's. Then the sum over steps is
            nearly exact, but one step's mean is not unbiased any more.
        seed: of the rotations.

    Raises:
        ValueError: bits or block are others.
    """
    return QuantizedAllReduce(bits, block, bits < 8 if rotate is None else rotate, error_feedback, seed)


class QuantizedAllReduce:
    """See `quantized_allreduce_hook`.

    Attributes:
        bytes_sent, bytes_float: by this rank so far, and what a ring all-reduce in float32 would have sent.
        calls: of the hook so far.
        residuals: by bucket, what the encoding lost, with error feedback.
    """

    def __init__(self, bits: int, block: int, rotate: bool, error_feedback: bool, seed: int) -> None:
        if bits not in REACH:
            raise ValueError(f"bits is {bits!r}: a gradient travels in 1, 2, 4 or 8")
        if type(block) is not int or block < 8 or block & (block - 1):
            raise ValueError(f"block is {block!r}, not a power of two of at least 8")
        self.bits, self.block, self.rotate, self.error_feedback, self.seed = bits, block, rotate, error_feedback, seed
        self.bytes_sent = self.bytes_float = self.calls = 0
        self.residuals: dict[int, Tensor] = {}
        self.__name__ = self.__qualname__ = "quantized_allreduce_hook"  # DDP asks a hook for both

    def __call__(self, state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[reportPrivateImportUsage]
        """The mean over ranks of a bucket's gradients. The bucket's tensor is written to."""
        buffer = bucket.buffer()
        mean = self.mean(buffer, bucket.index())
        done: torch.futures.Future[Tensor] = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else [])
        done.set_result(buffer.copy_(mean))
        return done

    def mean(self, gradients: Tensor, index: int) -> Tensor:
        """The mean over ranks of flat gradients; the same bits on every rank. index: of the bucket, for error feedback."""
        world, rank, count = dist.get_world_size(), dist.get_rank(), gradients.numel()
        if world == 1:
            return gradients
        self.calls += 1
        block = min(self.block, max(8, 1 << (-(-count // world) - 1).bit_length()))
        blocks = -(-count // (world * block))
        x = torch.nn.functional.pad(gradients.float(), (0, world * blocks * block - count))
        if self.error_feedback and (lost := self.residuals.get(index)) is not None and lost.shape == x.shape:
            x = x + lost

        sent = self.encode(x.view(-1, block), self._signs(block, rank, x))
        if self.error_feedback:
            self.residuals[index] = x - self.decode(sent, block, self._signs(block, rank, x)).view_as(x)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)  # a row a block; the first `blocks` rows go to rank 0
        parts = [
            self.decode(part, block, self._signs(block, other, x))
            for other, part in enumerate(received.view(world, blocks, -1))
        ]
        own = self.encode(torch.stack(parts).mean(0), self._signs(block, rank + world, x))
        whole = own.new_empty(world * blocks, own.shape[1])
        getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(whole, own)  # torch 2.14 calls it by the first name
        means = [
            self.decode(part, block, self._signs(block, other + world, x))
            for other, part in enumerate(whole.view(world, blocks, -1))
        ]
        self.bytes_sent += 2 * (world - 1) * own.numel()
        self.bytes_float += 2 * (world - 1) * 4 * count // world
        return torch.cat(means).flatten()[:count].to(gradients.dtype)

    def encode(self, x_NB: Tensor, signs_B: Tensor | None) -> Tensor:
        """Blocks as bytes, (blocks, block * bits / 8 + 8) uint8: codes, scale, offset."""
        ranges, y_NB = None, x_NB
        if signs_B is not None:
            y_NB = walsh(x_NB * signs_B) / math.sqrt(x_NB.shape[1])
            reach_N = REACH[self.bits] * y_NB.square().mean(1).sqrt()
            ranges, rounded = (-reach_N, reach_N), y_NB.clamp(-reach_N.unsqueeze(1), reach_N.unsqueeze(1))
        else:
            rounded = y_NB
        quantizer = Quantizer("uint", self.bits, "sample", "minmax", offset=True, stochastic=signs_B is None)
        key = draw_key(x_NB) if signs_B is None else None
        q, _ = quantize(rounded.unsqueeze(1), quantizer, "g", key=key, ranges=ranges)
        assert q.offset is not None
        scales_N2 = torch.stack([q.scale, q.offset], 1)
        if signs_B is not None:
            along_N = (y_NB * q.decode().squeeze(1)).sum(1)
            correction_N = y_NB.square().sum(1) / along_N
            scales_N2 = scales_N2 * torch.where(along_N == 0, 1.0, correction_N).unsqueeze(1)
        return torch.cat([q.codes.flatten(1), scales_N2.view(torch.uint8)], 1)

    def decode(self, bytes_ND: Tensor, block: int, signs_B: Tensor | None) -> Tensor:
        """The inverse of `encode`, (blocks, block) float32."""
        scales_N2 = bytes_ND[:, -SCALE_BYTES:].contiguous().view(torch.float32)
        codes = bytes_ND[:, :-SCALE_BYTES].contiguous().unsqueeze(1)
        format: Format = Quantizer("uint", self.bits, "sample", "minmax", offset=True).format("g")
        scale_N, offset_N = scales_N2.unbind(1)
        y_NB = QTensor(codes, scale_N.contiguous(), offset_N.contiguous(), None, format, (len(codes), 1, block)).decode()[:, 0]
        return y_NB if signs_B is None else walsh(y_NB) * (signs_B / math.sqrt(block))

    def _signs(self, block: int, sender: int, like: Tensor) -> Tensor | None:
        """The random signs of a sender's rotation in this call, which all ranks know; None without rotation."""
        if not self.rotate:
            return None
        # of a 64-bit seed torch's generator reads 32 bits, in which plain sums of the three would come again
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {self.calls} {sender}".encode()))
        return (2 * torch.randint(0, 2, (block,), generator=generator) - 1).to(like)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of this rank: each rank has its own."""
        sent = {"bytes_sent": self.bytes_sent, "bytes_float": self.bytes_float}
        return {"calls": self.calls, **sent, "residuals": {index: lost.clone() for index, lost in self.residuals.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken. Raises ValueError where it is no such state."""
        counts, residuals = ("calls", "bytes_sent", "bytes_float"), state.get("residuals")
        if any(type(state.get(name)) is not int for name in counts) or not isinstance(residuals, dict):
            raise ValueError("this is no state of a quantized all-reduce: its counts or its residuals are missing")
        if any(not isinstance(lost, Tensor) or lost.dtype != torch.float32 or lost.dim() != 1 for lost in residuals.values()):
            raise ValueError("the residuals of this quantized all-reduce are no flat float32 tensors")
        for name in counts:
            setattr(self, name, state[name])
        self.residuals = dict(residuals)


def payload_bytes(elements: int, bits: int, block: int) -> int:
    """Bytes of so many gradients, a whole number of blocks."""
    return elements // block * (block * bits // 8 + SCALE_BYTES)
