"""Block formats: MXFP4, MXFP6, MXFP8 and MXINT8 of the OCP (Microscaling Formats specification 1.0) and NVIDIA's NVFP4.

    MX      blocks of 32 values share a scale 2^k, k = floor(log2 max|v|) - (largest exponent of the element's format), limited
            to E8M0's -127 .. 127 (section 6.3); elements are small floats, to nearest even, larger values saturate
    NVFP4   blocks of 16 values share an E4M3 scale, max|v| / 6 / t to nearest; t is the tensor's float32, max|v| / (6 * 448)
            (arXiv 2509.25149, section 2 and appendix B)

    grid     sign exponent mantissa   values
    e2m1     1    2        1          0, .5, 1, 1.5, 2, 3, 4, 6
    e2m3     1    2        3          to 7.5
    e3m2     1    3        2          to 28
    e4m3, e5m2                        of `fqt.quantizers.float8`

Blocks lie along the axis that a product sums over, so an operand is quantized for each product anew (granularity "block").
The reference multiplies them, block by block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fqt.formats import GRIDS, Format, Grid, register_grid
from fqt.qtensor import Scales
from fqt.quantizers.base import Quantizer, register
from fqt.quantizers.stages import Calibration, register_calibration
from fqt.reference.codes import MIN_RANGE

register_grid(Grid("e2m1", 4, 4, 2, 1, 6.0))
register_grid(Grid("e2m3", 6, 6, 2, 3, 7.5))
register_grid(Grid("e3m2", 6, 6, 3, 2, 28.0))

MX_FORMATS = {"mxfp4": "e2m1", "mxfp6_e2m3": "e2m3", "mxfp6_e3m2": "e3m2", "mxfp8_e4m3": "e4m3", "mxfp8_e5m2": "e5m2"}


def largest_exponent(grid: Grid) -> int:
    """The exponent of the largest finite value."""
    return int(torch.frexp(torch.tensor(grid.largest, dtype=torch.float64)).exponent) - 1


@register_calibration("e8m0")
@dataclass(frozen=True)
class E8M0(Calibration):
    """A power of two for each block, as the MX specification finds it."""

    def scales(self, rows_GE: Tensor, format: Format, state: nn.Module | None, update: bool) -> Scales:
        widest = rows_GE.abs().amax(1) if rows_GE.shape[1] else rows_GE.new_zeros(rows_GE.shape[0])
        exponent = torch.frexp(widest).exponent - 1 - largest_exponent(GRIDS[format.grid])
        scale = torch.ldexp(torch.ones_like(widest), exponent.clamp(-127, 127))
        inverse = torch.ldexp(torch.ones_like(widest), -exponent.clamp(-127, 127))
        zero, bad = widest == 0, ~widest.isfinite()
        scale = torch.where(bad, torch.nan, torch.where(zero, 0.0, scale))
        return Scales(scale, torch.where(bad | zero, 0.0, inverse))


@register_calibration("nvfp4")
@dataclass(frozen=True)
class NVFP4(Calibration):
    """An E4M3 scale for each block, times one float32 for the tensor."""

    def scales(self, rows_GE: Tensor, format: Format, state: nn.Module | None, update: bool) -> Scales:
        widest = rows_GE.abs().amax(1) if rows_GE.shape[1] else rows_GE.new_zeros(rows_GE.shape[0])
        bad = ~widest.isfinite()
        largest = GRIDS[format.grid].largest
        finite = torch.where(bad, 0.0, widest)
        of_tensor = (finite.amax() if finite.numel() else finite.new_zeros(())) / torch.full_like(finite, largest * 448.0)
        wide = finite.amax() >= MIN_RANGE if finite.numel() else finite.new_zeros((), dtype=torch.bool)
        share = torch.where(wide, finite / torch.full_like(finite, largest) / torch.where(wide, of_tensor, 1.0), 0.0)
        of_block = share.clamp(max=448.0).to(torch.float8_e4m3fn).float()
        scale = of_block * of_tensor
        inverse = torch.where(scale > 0, torch.ones_like(scale) / torch.where(scale > 0, scale, 1.0), 0.0)
        return Scales(torch.where(bad, torch.nan, scale), torch.where(bad, 0.0, inverse))


@register("xwg")
def mx(format: str = "mxfp4", stochastic: bool = False, block: int = 32) -> Quantizer:
    """An MX format by its name: mxfp4, mxfp6_e2m3, mxfp6_e3m2, mxfp8_e4m3, mxfp8_e5m2."""
    if format not in MX_FORMATS:
        raise ValueError(f"format {format!r} is not one of {', '.join(MX_FORMATS)}")
    grid = GRIDS[MX_FORMATS[format]]
    return Quantizer(grid.name, grid.fewest, "block", E8M0(), stochastic=stochastic, block=block)


@register("xwg")
def nvfp4(stochastic: bool = False, block: int = 16) -> Quantizer:
    """NVIDIA's 4-bit floats with two levels of scales."""
    return Quantizer("e2m1", 4, "block", NVFP4(), stochastic=stochastic, block=block)
