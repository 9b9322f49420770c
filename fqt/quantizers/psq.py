"""PSQ, the per-sample quantizer of StatQuant (arXiv 2010.14298, section 4.1), and the same for finer groups."""

from fqt.quantizers.base import Quantizer, register


@register("g")
def psq(bits: int, granularity: str = "sample") -> Quantizer:
    """SR((g - min) (2^b - 1) / R) R / (2^b - 1) + min with R = max - min of the group. Unbiased."""
    return Quantizer("uint", bits, granularity, "minmax", offset=True, stochastic=True)
