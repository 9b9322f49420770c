"""A static range: found once, as `fqt.calibrate` does, kept beside the layer, and used by every forward from then on.

Outside of it values saturate, so the gradient of an activation passes inside the range alone (the clipped straight-through
estimator); a weight's passes everywhere, so that it can come back. Training leaves the range as it is (Wu et al., arXiv
2004.09602, section 5, fine-tune so); `fqt.calibrate` finds it anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fqt.formats import Format
from fqt.qtensor import QTensor, Scales
from fqt.quantizers.stages import Calibration, Estimator, register_calibration, register_estimator
from fqt.reference import apply_mask, calibrate_groups, pass_mask


def _look_again(module: nn.Module, _: object) -> None:
    """Whether loaded ranges are numbers. A function of the module, so that a model can be pickled."""
    assert isinstance(module, Range)
    module.known = not bool(module.low.isnan().any())


class Range(nn.Module):
    """The range of each group of one operand, from `low` to `high`, (G,) float32; NaN until it is set."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.register_buffer("low", torch.full((groups,), torch.nan))
        self.register_buffer("high", torch.full((groups,), torch.nan))
        self.low: Tensor
        self.high: Tensor
        self.known = False
        self.register_load_state_dict_post_hook(_look_again)

    @torch.no_grad()
    def set(self, low: Tensor, high: Tensor) -> None:
        """Take a range of finite numbers, (G,) each."""
        self.low.copy_(low)
        self.high.copy_(high)
        self.known = True


@register_estimator("stored")
@register_calibration("stored")
@dataclass(frozen=True)
class Stored(Calibration, Estimator):
    """The stored range as that of an operand, and for x the estimator that clips at its ends.

    Attributes:
        groups: how many ranges there are: 1, which all groups of a tensor share, or one for each output channel of a weight.
    """

    groups: int = 1
    operands = "xw"

    def __post_init__(self) -> None:
        if type(self.groups) is not int or self.groups < 1:
            raise ValueError(f"groups {self.groups!r} is not a positive integer")

    def __str__(self) -> str:
        return self.word

    def check(self, format: Format) -> None:
        if format.block or format.grid == "sign":
            what = "a range for each block" if format.block else "no range at all"
            raise ValueError(f"stored keeps one range, or one for each output channel, and {format.name} has {what}")

    def state(self, letter: str, layer: nn.Module | None) -> Range:
        return Range(self.groups)

    def scales(self, rows_GE: Tensor, format: Format, state: nn.Module | None, update: bool) -> Scales:
        assert isinstance(state, Range), "a stored range needs a layer that holds it"
        if not state.known:
            raise RuntimeError("no range is stored yet for this layer: fqt.calibrate(model, loader) finds it")
        low, high = (end.float().expand(rows_GE.shape[0]) for end in (state.low, state.high))
        return Scales(*calibrate_groups(low, high, None, format, "minmax" if format.offset else "absmax", (-1.0, 1.0)))

    def resume(self, state: nn.Module, q: QTensor) -> None:
        assert isinstance(state, Range)
        low_code, high_code = q.format.code_range
        if q.offset is not None:
            state.set(q.offset, q.offset + q.scale * (high_code - low_code))
        else:
            state.set(q.scale * (-high_code if low_code < 0 else 0), q.scale * high_code)

    def save(self, x: Tensor, q: QTensor, state: nn.Module | None) -> tuple[Tensor, ...]:
        assert isinstance(state, Range)
        return (pass_mask(x, state.low.float(), state.high.float()),)

    def backward(self, g: Tensor, saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (apply_mask(g, saved[0]).to(g.dtype),)
