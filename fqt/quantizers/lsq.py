"""LSQ, learned step size quantization (arXiv 1902.08153): the scale of x and w is a parameter that the loss trains.

    code = round(clip(v / s, -Q_N, Q_P)),  value = s * code                                    (section 2, equations 1 and 2)
    d value / d s = -v/s + round(v/s) inside the range, -Q_N or Q_P outside                    (equation 3)
    d value / d v = 1 inside the range, 0 outside                                              (equation 5)

The step's gradient is multiplied by 1 / sqrt(number of values * Q_P) (section 2.2); the step starts at 2 mean|v| / sqrt(Q_P),
from the weights or from the first batch that x's layer sees in training (section 2.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fqt.formats import Format
from fqt.qtensor import QTensor, Scales
from fqt.quantizers.base import Quantizer, register
from fqt.quantizers.stages import Calibration, Estimator, register_calibration, register_estimator


def _look_again(module: nn.Module, _: object) -> None:
    """Whether a loaded step has its first value. A function of the module, so that a model can be pickled."""
    assert isinstance(module, LearnedStep)
    module.started = not bool(module.step.detach().isnan())


class LearnedStep(nn.Module):
    """The step of one operand: a parameter of one number, NaN until it has its first value."""

    def __init__(self, step: float = math.nan) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.tensor(step))
        self.started = not math.isnan(step)
        self.register_load_state_dict_post_hook(_look_again)

    def start(self, step: Tensor) -> None:
        """Take the first value; the mean over the ranks, where there are some."""
        if dist.is_available() and dist.is_initialized():
            step = step.clone()
            dist.all_reduce(step)
            step /= dist.get_world_size()
        with torch.no_grad():
            self.step.copy_(step)
        self.started = True


@register_estimator("lsq")
@register_calibration("lsq")
@dataclass(frozen=True)
class LSQ(Calibration, Estimator):
    """The learned step as scale of an operand, and its gradient.

    Attributes:
        grid, bits: of the quantizer; they set Q_N and Q_P.
    """

    grid: str = "int"
    bits: int = 4
    operands = "xw"

    def __str__(self) -> str:
        return self.word

    @property
    def limits(self) -> tuple[int, int]:
        """-Q_N and Q_P, the smallest and the largest code."""
        low, high = Format(self.grid, self.bits).code_range
        return int(low), int(high)

    def check(self, format: Format) -> None:
        if (format.grid, format.bits) != (self.grid, self.bits):
            made, asked = f"{self.grid}{self.bits}", format.name
            raise ValueError(f"the step's gradient counts codes of {made}, not of {asked}: make lsq anew at these bits")

    def state(self, letter: str, layer: nn.Module | None) -> LearnedStep:
        if letter != "w" or layer is None or layer.weight.is_meta:  # type: ignore[union-attr]
            return LearnedStep()
        return LearnedStep(float(self._first(layer.weight.detach().float())))  # type: ignore[union-attr, operator]

    def _first(self, v: Tensor) -> Tensor:
        return (2 * v.abs().mean() / math.sqrt(self.limits[1])).clamp(min=1e-8)

    def scales(self, rows_GE: Tensor, format: Format, state: nn.Module | None, update: bool) -> Scales:
        assert isinstance(state, LearnedStep), "LSQ needs a layer that holds its step"
        step = state.step.float()
        if not state.started:
            step = self._first(rows_GE)
            if update:
                state.start(step)
        # a step that training has driven below zero means the same grid, mirrored
        step = step.detach().abs().clamp(min=1e-30)
        scale = torch.where(rows_GE.isfinite().all(), step, torch.nan).reshape(1)
        return Scales(scale, torch.where(scale.isnan(), 0.0, torch.ones_like(step) / step))

    def resume(self, state: nn.Module, q: QTensor) -> None:
        assert isinstance(state, LearnedStep)
        with torch.no_grad():
            state.step.copy_(q.scale[0])
        state.started = True

    def save(self, x: Tensor, q: QTensor, state: nn.Module | None) -> tuple[Tensor, ...]:
        assert isinstance(state, LearnedStep)
        return x, q.scale, state.step.detach().clone()

    def backward(self, g: Tensor, saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, scale, step = saved
        low, high = self.limits
        v = x.float() / scale
        inside = (v >= low) & (v <= high)
        of_step = torch.where(inside, v.round() - v, v.clamp(low, high))
        total = (g.float() * of_step).sum() / math.sqrt(x.numel() * high)
        return torch.where(inside, g, 0), (total * torch.where(step < 0, -1.0, 1.0)).to(step.dtype)


@register("xw")
def lsq(bits: int = 4, unsigned: bool = False) -> Quantizer:
    """Learned step, 2 to 8 bits, one step a tensor: symmetric codes, or with `unsigned` 0 .. 2^b - 1 for x behind a ReLU."""
    if type(bits) is not int or not 2 <= bits <= 8:
        raise ValueError(f"bits {bits!r} is not an integer from 2 to 8")
    grid = "uint" if unsigned else "int"
    stage = LSQ(grid, bits)
    return Quantizer(grid, bits, "tensor", stage, estimator=stage)
