"""Uniform quantizers with a range measured on the tensor."""

from fqt.quantizers.base import Quantizer, register


@register("xwg")
def uniform(bits: int = 8, granularity: str = "tensor", stochastic: bool = False) -> Quantizer:
    """Symmetric: scale = max|x| / (2^(b-1) - 1), code = round(x / scale). 2 to 16 bits."""
    return Quantizer("int", bits, granularity, "absmax", stochastic=stochastic)


@register("xwg")
def affine(bits: int = 8, granularity: str = "tensor", stochastic: bool = False) -> Quantizer:
    """Offset = min x, scale = (max x - min x) / (2^b - 1). 1 to 16 bits."""
    return Quantizer("uint", bits, granularity, "minmax", offset=True, stochastic=stochastic)
