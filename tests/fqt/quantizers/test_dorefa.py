"""DoReFa-Net by hand and by its formulas written out, arXiv 1606.06160."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from fqt.quantizers import Quantizer, build, quantize
from fqt.quantizers.base import transformed
from tests.fqt import oracle

pytestmark = pytest.mark.usefixtures("poisoned_memory")
KEY = 0x5DEECE66D


def of_weight(w: list[float], bits: int) -> list[float]:
    """The quantized weights, after the transform."""
    quantizer = build("dorefa_weight", "w", bits=bits)
    w_OKI = torch.tensor(w).view(1, 1, -1)
    return quantize(transformed(w_OKI, quantizer), quantizer, "w")[0].decode()[0, 0].tolist()


def of_activation(x: list[float], bits: int) -> list[float]:
    return quantize(torch.tensor(x).view(1, 1, -1), build("dorefa_activation", "x", bits=bits), "x")[0].decode()[0, 0].tolist()


def test_one_bit_weights_are_their_signs_times_the_mean_of_the_layer():
    """Equation 8: E|w| sign(w), sign(0) = +1; E|w| = (1 + 2 + 0 + 0.5 + 0.5) / 5."""
    assert of_weight([1.0, -2.0, 0.0, 0.5, -0.5], 1) == pytest.approx([0.8, -0.8, 0.8, 0.8, -0.8])
    w = torch.tensor([[[1.0]], [[-3.0]]])  # two output channels, one scale
    assert quantize(w, build("dorefa_weight", "w", bits=1), "w")[0].decode().flatten().tolist() == [2.0, -2.0]


def test_two_bit_weights():
    """Equation 9 with k = 2: t = tanh w / max |tanh w|, levels -1, -1/3, 1/3, 1 with borders at -2/3, 0, 2/3."""
    t = [-1.0, -0.68, -0.6, -0.05, 0.05, 0.6, 0.68, 1.0]
    w = [math.atanh(0.9 * v) for v in t]
    third = 1 / 3
    assert of_weight(w, 2) == pytest.approx([-1, -1, -third, -third, third, third, 1, 1], abs=1e-6)


def test_three_bit_weights():
    """k = 3: levels (2 i - 7) / 7."""
    t = [-1.0, -0.8, -0.5, 0.0, 0.2, 0.4, 0.7, 1.0]
    expected = [2 * round(Fraction(v) * Fraction(7, 2) + Fraction(7, 2)) / 7 - 1 for v in t]
    assert expected == pytest.approx([-1, -5 / 7, -3 / 7, 1 / 7, 1 / 7, 3 / 7, 5 / 7, 1])  # 0 is a tie: 3.5 to the even 4
    assert of_weight([math.atanh(0.5 * v) for v in t], 3) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_of_k_bits_are_the_formula(bits, rng):
    """2 quantize_k(tanh w / (2 max |tanh w|) + 1/2) - 1, in float64; elements next to a border of two codes left out."""
    w = torch.from_numpy(rng.normal(size=(4, 3, 50)))
    levels = 2**bits - 1
    t = torch.tanh(w) / torch.tanh(w).abs().max()
    place = levels * (t / 2 + 0.5)
    formula = 2 * place.round() / levels - 1
    far = ((place - place.floor()) - 0.5).abs() > 1e-3
    assert far.double().mean() > 0.98
    quantizer = build("dorefa_weight", "w", bits=bits)
    values = quantize(transformed(w, quantizer), quantizer, "w")[0].decode()
    torch.testing.assert_close(values[far].double(), formula[far], rtol=0, atol=1e-6)


def test_all_zero_weights_stay_finite():
    assert of_weight([0.0, 0.0], 1) == [0.0, 0.0]
    assert of_weight([0.0, 0.0], 2) == pytest.approx([1 / 3, 1 / 3])  # quantize_2(1/2): a tie to the even 2


def test_activations_by_hand():
    """quantize_k(clip(x, 0, 1)), section 2.5."""
    assert of_activation([-1.0, -0.0, 0.4, 0.5, 0.6, 1.0, 7.0], 1) == [0, 0, 0, 0, 1, 1, 1]  # the tie goes to the even 0
    assert of_activation([-5.0, 0.1, 0.2, 0.49, 0.51, 0.9, 2.0], 2) == pytest.approx([0, 0, 1 / 3, 1 / 3, 2 / 3, 1, 1])
    assert of_activation([0.5, 1 / 510, 1 / 509, 0.9999], 8) == pytest.approx([128 / 255, 0, 1 / 255, 1], abs=1e-7)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_activations_of_k_bits_are_the_formula(bits, rng):
    x = rng.uniform(-0.5, 1.5, 300).astype(np.float32)
    levels = 2**bits - 1
    formula = np.round(levels * np.clip(x.astype(np.float64), 0, 1)) / levels
    np.testing.assert_allclose(of_activation(x.tolist(), bits), formula, atol=1e-6)


def test_the_activations_gradient_passes_from_0_to_1():
    x = torch.tensor([-0.1, 0.0, 0.5, 1.0, 1.1]).view(1, 1, 5)
    assert quantize(x, build("dorefa_activation", "x", bits=2), "x")[1].tolist() == [[[0b01110]]]


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_gradients_are_equation_12_with_the_same_noise(bits, rng):
    """f(g) = 2 m [quantize_k(g / 2m + 1/2 + N(k)) - 1/2] with N(k) = sigma / (2^k - 1), in exact fractions.

    sigma = (1 - u) - 1/2 with u the element's 24 bits: rounding to nearest after it is rounding up just when u is below the
    fractional part.
    """
    levels = 2**bits - 1
    g = (rng.normal(size=(3, 4, 5)) * np.array([1, 1e-3, 30]).reshape(3, 1, 1)).astype(np.float32)
    q, _ = quantize(torch.from_numpy(g), build("dorefa_gradient", "g", bits=bits), "g", key=torch.tensor(KEY), stream=2)
    values = q.decode().numpy()
    compared = 0
    for n in range(3):
        m = Fraction(float(np.abs(g[n]).max()))
        assert q.scale[n].item() == pytest.approx(float(2 * m / levels), rel=1e-6)
        for element, (p, c) in enumerate((p, c) for p in range(4) for c in range(5)):
            value = Fraction(float(g[n, p, c]))
            sigma = 1 - Fraction(oracle.u24(element, n, 2, KEY), 2**24) - Fraction(1, 2)
            place = levels * (value / (2 * m) + Fraction(1, 2)) + sigma
            border = abs(place - math.floor(place) - Fraction(1, 2))
            if border < Fraction(levels, 2**20) and abs(value) < m:
                continue  # float32 may take the other side there
            code = math.floor(place + Fraction(1, 2)) if abs(value) < m else (levels if value > 0 else 0)
            formula = 2 * m * (Fraction(code, levels) - Fraction(1, 2))
            assert values[n, p, c] == pytest.approx(float(formula), abs=float(m) * 1e-6), (n, p, c)
            compared += 1
    assert compared > 50


def test_thirty_two_bits_stay_float():
    for name, operand in (("dorefa_weight", "w"), ("dorefa_activation", "x"), ("dorefa_gradient", "g")):
        assert build(name, operand, bits=32) is None


def test_what_the_quantizers_are():
    assert build("dorefa_weight", "w", bits=1) == Quantizer("sign", 1, "tensor", "absmean")
    assert build("dorefa_gradient", "g", bits=6) == Quantizer("uint", 6, "sample", "absmax", offset=True, stochastic=True)
