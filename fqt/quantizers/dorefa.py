"""DoReFa-Net (arXiv 1606.06160). quantize_k(r) = round((2^k - 1) r) / (2^k - 1) on [0, 1]; 32 bits leave a float."""

from fqt.quantizers.base import Quantizer, register


@register("w")
def dorefa_weight(bits: int) -> Quantizer | None:
    """Equations 8 and 9. 1 bit: E|w| sign(w), one scale for the layer; else 2 quantize_k(tanh w / (2 max|tanh w|) + 1/2) - 1.

    2 quantize_k(t/2 + 1/2) - 1 is the uniform grid of 2^k levels on [-1, 1], applied to t = tanh w / max|tanh w|.
    """
    if bits == 32:
        return None
    if bits == 1:
        return Quantizer("sign", 1, "tensor", "absmean")
    return Quantizer("uint", bits, "tensor", "none", limits=(-1.0, 1.0), offset=True, transform="tanh")


@register("x")
def dorefa_activation(bits: int) -> Quantizer | None:
    """Section 2.5: quantize_k(clip(x, 0, 1)); the gradient passes where 0 <= x <= 1."""
    if bits == 32:
        return None
    return Quantizer("uint", bits, "tensor", "none", limits=(0.0, 1.0), pass_range=(0.0, 1.0))


@register("g")
def dorefa_gradient(bits: int) -> Quantizer | None:
    """Equation 12: 2m [quantize_k(g / 2m + 1/2 + N(k)) - 1/2], m = max |g| of the sample, N(k) uniform of width one step.

    Rounding to nearest after uniform noise of one step is stochastic rounding, so this is b-bit SR on [-m, m].
    """
    if bits == 32:
        return None
    return Quantizer("uint", bits, "sample", "absmax", offset=True, stochastic=True)
