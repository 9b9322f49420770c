"""Ranges beside the smallest and largest value: a percentile, which outliers do not widen, and a moving average over batches.

    percentile       the span of which a share of each group's |values| lies within (Wu et al., arXiv 2004.09602, section 3.3)
    moving_average   average <- momentum * average + (1 - momentum) * max|x| of the batch (Jacob et al., arXiv 1712.05877,
                     section 3.1); evaluation uses it as it is

Both are symmetric, and stages for any quantizer: `x: {quantizer: uniform, bits: 4, calibrate: {percentile: {percent: 99}}}`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fqt.formats import Format
from fqt.qtensor import QTensor, Scales
from fqt.quantizers.stages import Calibration, register_calibration
from fqt.reference import calibrate_groups


def symmetric(span: Tensor, format: Format) -> Scales:
    """Scales of the range from -span to span. span: (G,) float32; NaN or infinite where a group cannot be encoded."""
    return Scales(*calibrate_groups(-span, span, None, format, "absmax", (-1.0, 1.0)))


@register_calibration("percentile")
@dataclass(frozen=True)
class Percentile(Calibration):
    """The span that `percent` of the |values| of a group do not exceed, interpolated between neighbours.

    A group with a NaN or an infinity cannot be encoded, whatever the percentage.
    """

    percent: float = 99.9

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise ValueError(f"percent {self.percent!r} is not above 0 and at most 100")

    def scales(self, rows_GE: Tensor, format: Format, state: nn.Module | None, update: bool) -> Scales:
        if rows_GE.shape[1] == 0:
            return symmetric(rows_GE.new_zeros(rows_GE.shape[0]), format)
        sizes = rows_GE.abs().sort(1).values  # not torch.quantile, which takes at most 2^24 elements
        place = self.percent / 100 * (sizes.shape[1] - 1)
        low = min(int(place), sizes.shape[1] - 1)
        high = min(low + 1, sizes.shape[1] - 1)
        span = torch.lerp(sizes[:, low], sizes[:, high], place - low)
        return symmetric(torch.where(rows_GE.isfinite().all(1), span, torch.nan), format)


class Average(nn.Module):
    """The running max|x| of one operand, 0 before its first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(()))
        self.average: Tensor


@register_calibration("moving_average")
@dataclass(frozen=True)
class MovingAverage(Calibration):
    """One span for the tensor, an average over the batches of training; `eval()` freezes it.

    A batch that is not finite does not enter the average; it cannot be encoded. Ranks average their spans, so that they keep
    the same. Before the first batch of training the batch at hand gives the span.
    """

    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum {self.momentum!r} is not at least 0 and below 1")

    def check(self, format: Format) -> None:
        if format.axes or format.block:
            raise ValueError("moving_average keeps one range for a tensor: use granularity tensor")

    def state(self, letter: str, layer: nn.Module | None) -> Average:
        return Average()

    def scales(self, rows_GE: Tensor, format: Format, state: nn.Module | None, update: bool) -> Scales:
        assert isinstance(state, Average), "a moving average needs a layer that holds it"
        seen = rows_GE.abs().amax() if rows_GE.numel() else rows_GE.new_zeros(())
        finite = seen.isfinite()
        if update:
            shared = torch.where(finite, seen, 0.0)
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(shared)
                shared = shared / dist.get_world_size()
            average = state.average
            moved = torch.where(average > 0, self.momentum * average + (1 - self.momentum) * shared, shared)
            state.average.copy_(torch.where(finite, moved, average))
        span = torch.where(state.average > 0, state.average.float(), seen)
        return symmetric(torch.where(finite, span, torch.nan).reshape(1), format)

    def resume(self, state: nn.Module, q: QTensor) -> None:
        assert isinstance(state, Average)
        state.average.copy_(q.scale[0] * q.format.code_range[1])
