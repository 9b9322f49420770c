"""Ternary weights as BitNet b1.58 makes them (arXiv 2402.17764, section 2)."""

from fqt.quantizers.base import Quantizer, register


@register("w")
def ternary_weight(granularity: str = "tensor") -> Quantizer:
    """scale = mean |w|, code = round(clip(w / scale, -1, 1))."""
    return Quantizer("ternary", 2, granularity, "absmean")
