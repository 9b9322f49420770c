"""The ranged and the fixed quantizers that are one line each: values by hand."""

import pytest
import torch

from fqt.quantizers import Quantizer, build, quantize


def values(x: list[float], name: str, operand: str = "x", **options) -> list[float]:
    return quantize(torch.tensor(x).view(1, 1, -1), build(name, operand, **options), operand)[0].decode().flatten().tolist()


def test_uniform_by_hand():
    """scale = 7 / 7 = 1: ties to even, symmetric."""
    assert values([7.0, 0.5, 1.5, -2.5, -6.6, 0.0], "uniform", bits=4) == [7, 0, 2, -2, -7, 0]
    assert values([-127.0, 1.4, 0.2], "uniform") == [-127, 1, 0]
    assert values([2.0, -0.9, 1.1], "uniform", bits=2) == [2, 0, 2]


def test_affine_by_hand():
    """offset = -1, scale = 3 / 3 = 1."""
    assert values([-1.0, 2.0, 0.4, 0.6, -0.5], "affine", bits=2) == [-1, 2, 0, 1, -1]
    assert values([5.0, 5.0], "affine", bits=8) == [5, 5]
    assert values([3.0, 4.0, 3.6], "affine", bits=1) == [3, 4, 4]


def test_uniform_granularities_by_hand():
    x = torch.tensor([[[1.0, 20.0], [3.0, 60.0]], [[-70.0, 0.7], [7.0, 0.1]]])

    def scales(granularity: str) -> list[float]:
        return quantize(x, build("uniform", "x", bits=4, granularity=granularity), "x")[0].scale.tolist()

    assert scales("tensor") == [10]
    assert scales("sample") == pytest.approx([60 / 7, 10])
    assert scales("channel") == pytest.approx([10, 60 / 7])
    assert scales("token") == pytest.approx([20 / 7, 60 / 7, 10, 1])
    assert scales("sample_channel") == pytest.approx([3 / 7, 10, 60 / 7, 0.1])
    weight = quantize(x, build("uniform", "w", bits=4, granularity="channel"), "w")[0]
    assert weight.scale.tolist() == pytest.approx([60 / 7, 10])


def test_ternary_by_hand():
    """scale = mean |w| = 1; round(clip(w / scale)): one half goes to the even 0."""
    assert values([0.4, -0.5, 0.6, -2.0, 1.5, 0.0, 2.0], "ternary_weight", "w") == [0, 0, 1, -1, 1, 0, 1]
    w = torch.tensor([[[1.0, 3.0]], [[-0.2, 0.0]]])
    q, _ = quantize(w, build("ternary_weight", "w", granularity="channel"), "w")
    assert q.scale.tolist() == pytest.approx([2, 0.1])
    assert q.decode().flatten().tolist() == pytest.approx([0, 2, -0.1, 0])  # 1/2 of the scale: a tie


@pytest.mark.parametrize(
    ("word_length", "fraction_length", "x", "expected"),
    [
        (8, 4, [1.03125, 1.09375, -8.5, 7.99, -0.03125], [1.0, 1.125, -8.0, 7.9375, -0.0]),
        (4, 6, [0.2, -0.2, 0.01], [7 / 64, -8 / 64, 1 / 64]),  # FL beyond WL
        (4, -2, [5.0, 6.0, 100.0, -100.0], [4.0, 8.0, 28.0, -32.0]),  # a tie 6 / 4 = 1.5 to the even 2
        (1, 0, [0.7, -0.4, -0.6, -9.0], [0.0, 0.0, -1.0, -1.0]),
        (32, 16, [1 / 65536, 40000.0, -40000.0], [1 / 65536, 2147483647 / 65536, -32768.0]),
        (32, 64, [2.0**-64, 1.0], [2.0**-64, 2147483647 * 2.0**-64]),
        (32, -64, [2.0**64, 2.0**63, 3.4e38], [2.0**64, 0.0, 2147483647 * 2.0**64]),
        (17, 16, [1.0, -1.0, 0.5], [65535 / 65536, -1.0, 0.5]),
    ],
)
def test_fixed_point_by_hand(word_length, fraction_length, x, expected):
    got = values(x, "fixed_point", word_length=word_length, fraction_length=fraction_length, stochastic=False)
    assert got == torch.tensor(expected, dtype=torch.float64).float().tolist()


def test_fixed_point_scales_are_exact_powers_of_two_at_every_length():
    for word_length in range(1, 33):
        for fraction_length in (-64, -7, 0, 1, 31, 64):
            quantizer = build("fixed_point", "w", word_length=word_length, fraction_length=fraction_length)
            key = torch.tensor(3)
            q, _ = quantize(torch.ones(1, 1, 1), quantizer, "w", key=key)
            assert q.scale.item() == 2.0**-fraction_length
            low, _ = q.format.code_range
            lowest, _ = quantize(torch.full((1, 1, 1), -3e38), quantizer, "w", key=key)
            assert lowest.decode().item() == low * 2.0**-fraction_length


def test_float8_by_hand():
    """scale = 448 / 448 = 1: e4m3 has three bits of mantissa, e5m2 two."""
    assert values([448.0, 17.0, 18.0, 19.0, 0.0019], "float8") == [448, 16, 18, 20, 2.0**-9]
    assert values([57344.0, 9.0, 11.0, 1.1], "float8", "g", grid="e5m2") == [57344, 8, 12, 1.0]
    assert values([1.0, 0.5], "float8") == pytest.approx([1.0, 0.5])


def test_what_the_quantizers_are():
    assert build("uniform", "x", bits=5, granularity="token", stochastic=True) == Quantizer(
        "int", 5, "token", "absmax", stochastic=True
    )
    assert build("affine", "g", bits=5) == Quantizer("uint", 5, "tensor", "minmax", offset=True)
    assert build("ternary_weight", "w") == Quantizer("ternary", 2, "tensor", "absmean")
    assert build("fixed_point", "w", word_length=8, fraction_length=4) == Quantizer(
        "fixed", 8, "tensor", "none", (-8.0, 7.9375), stochastic=True
    )
    assert build("float8", "g", grid="e5m2", stochastic=True) == Quantizer("e5m2", 8, "tensor", "absmax", stochastic=True)
