"""Fixed point <WL, FL> as in AdaPT (arXiv 2107.13490, section 3.1): two's complement of WL bits, FL of them fraction."""

from fqt.quantizers.base import Quantizer, register


@register("xwg")
def fixed_point(word_length: int, fraction_length: int, stochastic: bool = True) -> Quantizer:
    """code = round(x * 2^FL), saturated to [-2^(WL-1), 2^(WL-1) - 1]. WL 1 to 32; FL may exceed WL or be negative."""
    for name, value, low, high in (("word_length", word_length, 1, 32), ("fraction_length", fraction_length, -64, 64)):
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{name} {value!r} is not an integer from {low} to {high}")
    step = 2.0**-fraction_length
    limits = (-(2.0 ** (word_length - 1)) * step, max(2.0 ** (word_length - 1) - 1, 0.5) * step)
    return Quantizer("fixed", word_length, "tensor", "none", limits, stochastic=stochastic)
