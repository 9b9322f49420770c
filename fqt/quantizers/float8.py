"""8-bit floats, e4m3 (more mantissa: forward) and e5m2 (more range: gradients), as in arXiv 2209.05433."""

from fqt.formats import GRIDS
from fqt.quantizers.base import Quantizer, register


@register("xwg")
def float8(grid: str = "e4m3", granularity: str = "tensor", stochastic: bool = False) -> Quantizer:
    """scale = max|x| / largest float8, code = the float8 nearest to x / scale (or stochastic between neighbours)."""
    known = [name for name, grid_ in GRIDS.items() if grid_.is_float and grid_.fewest == 8]
    if grid not in known:
        raise ValueError(f"grid {grid!r} is not one of {', '.join(map(repr, known))}")
    return Quantizer(grid, 8, granularity, "absmax", stochastic=stochastic)
