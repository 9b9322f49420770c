"""PACT (arXiv 1805.06085) and PAMS (arXiv 2011.04212): activations between 0 and alpha, or -alpha and alpha, alpha learned.

    PACT   y = clip(x, 0, alpha),       code = round(y (2^b - 1) / alpha)                  (section 3, equations 1 and 2)
           dy/dalpha = 0 for x < alpha, else 1;  dy/dx = 1 for 0 <= x < alpha, else 0      (section 3, equation 3)
    PAMS   the same for a signed x: clip(x, -alpha, alpha); dy/dalpha = sign(x) where |x| >= alpha   (section 3.2)

PACT trains with an L2 penalty on alpha (section 3, "we include an L2-regularizer"): `decay` adds its gradient,
decay * alpha, so that any optimizer does it; leave it at 0 where the optimizer's own weight decay covers alpha.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fqt.formats import Format
from fqt.qtensor import QTensor, Scales
from fqt.quantizers.base import Quantizer, register
from fqt.quantizers.stages import Calibration, Estimator, register_calibration, register_estimator


class LearnedClip(nn.Module):
    """alpha of one operand."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(alpha))


@register_estimator("pact")
@register_calibration("pact")
@dataclass(frozen=True)
class PACT(Calibration, Estimator):
    """The learned clip as range of an activation, and its gradient.

    Attributes:
        alpha: its first value.
        signed: PAMS's range from -alpha instead of PACT's from 0.
        decay: of the L2 penalty decay * alpha^2 / 2.
    """

    alpha: float = 10.0
    signed: bool = False
    decay: float = 0.0
    operands = "x"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha {self.alpha!r} is not a positive number")
        if not (math.isfinite(self.decay) and self.decay >= 0):
            raise ValueError(f"decay {self.decay!r} is not 0 or a positive number")

    def state(self, letter: str, layer: nn.Module | None) -> LearnedClip:
        return LearnedClip(self.alpha)

    def scales(self, rows_GE: Tensor, format: Format, state: nn.Module | None, update: bool) -> Scales:
        assert isinstance(state, LearnedClip), "PACT needs a layer that holds its alpha"
        alpha = state.alpha.detach().float().clamp(min=1e-30)
        steps = torch.full_like(alpha, format.code_range[1])
        bad = rows_GE.isnan().any()  # infinities saturate, as in any range that is given beforehand
        scale = torch.where(bad, torch.nan, alpha / steps).reshape(1)
        return Scales(scale, torch.where(scale.isnan(), 0.0, (steps / alpha).reshape(1)))

    def resume(self, state: nn.Module, q: QTensor) -> None:
        assert isinstance(state, LearnedClip)
        with torch.no_grad():
            state.alpha.copy_(q.scale[0] * q.format.code_range[1])

    def save(self, x: Tensor, q: QTensor, state: nn.Module | None) -> tuple[Tensor, ...]:
        assert isinstance(state, LearnedClip)
        alpha = state.alpha.detach()
        # two bits an element: whether it passes, and whether it lies beyond alpha
        beyond = (x >= alpha).to(torch.int8) - ((x <= -alpha).to(torch.int8) if self.signed else 0)
        passes = x.abs() < alpha if self.signed else (x >= 0) & (x < alpha)
        return passes, beyond, alpha.clone()

    def backward(self, g: Tensor, saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        passes, beyond, alpha = saved
        of_alpha = (g.float() * beyond).sum() + self.decay * alpha.float()
        return torch.where(passes, g, 0), of_alpha.to(alpha.dtype)


@register("x")
def pact(bits: int = 4, alpha: float = 10.0, decay: float = 0.0) -> Quantizer:
    """Codes 0 .. 2^b - 1 of clip(x, 0, alpha), alpha learned; it takes the place of a ReLU."""
    stage = PACT(alpha, False, decay)
    return Quantizer("uint", bits, "tensor", stage, estimator=stage)


@register("x")
def pams(bits: int = 4, alpha: float = 10.0, decay: float = 0.0) -> Quantizer:
    """Symmetric codes of clip(x, -alpha, alpha), alpha learned."""
    stage = PACT(alpha, True, decay)
    return Quantizer("int", bits, "tensor", stage, estimator=stage)
