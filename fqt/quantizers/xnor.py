"""XNOR-Net (arXiv 1603.05279, section 3), the forward of 1-Bit FQT: signs, and a scale for each output channel's weights."""

from fqt.quantizers.base import Quantizer, register


@register("x")
def xnor_activation() -> Quantizer:
    """sign(x), sign(0) = +1. The gradient passes where |x| <= 1 (BinaryNet, arXiv 1602.02830, section 2.3)."""
    return Quantizer("sign", 1, "tensor", "none", pass_range=(-1.0, 1.0))


@register("w")
def xnor_weight() -> Quantizer:
    """alpha * sign(w), alpha = mean |w| of the output channel (section 3.1). The gradient passes unchanged."""
    return Quantizer("sign", 1, "channel", "absmean")
