"""MX and NVFP4 codes against exhaustive tables of the formats, and as recipes of real layers."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import fqt
from fqt.formats import GRIDS
from fqt.quantizers import build, quantize
from fqt.quantizers.mx import MX_FORMATS, largest_exponent
from fqt.reference import unpack

# the OCP's tables: every code's value
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E2M3 = [i / 8 for i in range(16)] + [2 * (1 + i / 8) for i in range(8)] + [4 * (1 + i / 8) for i in range(8)]
E3M2 = [i / 16 for i in range(4)] + [2.0 ** (e - 3) * (1 + i / 4) for e in range(1, 8) for i in range(4)]
TABLES = {"e2m1": E2M1, "e2m3": E2M3, "e3m2": E3M2}


def table(name: str) -> list[float]:
    """The values of the codes 0, 1, ... without a sign, finite ones."""
    if name in TABLES:
        return TABLES[name]
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[name]
    values = torch.arange(128, dtype=torch.uint8).view(dtype).float().tolist()
    return [value for value in values if math.isfinite(value)]


def nearest(value: float, values: list[float]) -> float:
    """To the nearest of the values, ties to the even code, beyond the largest to it."""
    size = min(abs(Fraction(value)), Fraction(values[-1]))
    best = min(range(len(values)), key=lambda code: (abs(Fraction(values[code]) - size), code % 2))
    return math.copysign(values[best], value)


@pytest.mark.parametrize("name", ["e2m1", "e2m3", "e3m2", "e4m3", "e5m2"])
def test_every_code_stands_for_its_value(name):
    grid = GRIDS[name]
    values = table(name)
    codes = torch.arange(len(values), dtype=torch.uint8)
    sign = codes + 2 ** (grid.fewest - 1)
    format = fqt.Format(name, grid.fewest)
    for bits, factor in ((codes, 1), (sign, -1)):
        packed = bits if format.storage_bits == 8 else bits.view(-1, 2)[:, 0] | bits.view(-1, 2)[:, 1] << 4
        decoded = unpack(packed.view(1, 1, -1), format, (1, 1, len(values)))
        assert decoded.flatten().tolist() == [factor * value for value in values]
    assert values[-1] == grid.largest and largest_exponent(grid) == math.floor(math.log2(values[-1]))


def interesting(values: list[float]) -> list[float]:
    """All values, the middles between neighbours, and what lies next to these."""
    middles = [(a + b) / 2 for a, b in itertools.pairwise(values)]
    close = [float(np.nextafter(np.float32(m), np.float32(to))) for m in middles for to in (-1e9, 1e9)]
    every = [*values, *middles, *close]
    return [*every, *(-value for value in every)]


@pytest.mark.parametrize("format", MX_FORMATS)
@pytest.mark.every(2)
def test_mx_codes_are_the_specifications(format):
    name = MX_FORMATS[format]
    values, quantizer = table(name), build("mx", "x", format=format)
    wanted = [v for v in interesting(values) if abs(v) <= values[-1]]
    rows = [wanted[i : i + 31] for i in range(0, len(wanted), 31)]
    for power in (-30, 5):
        # the first element of each block sets its scale to 2^power
        block = torch.tensor([[values[-1], *row, *[0.0] * (31 - len(row))] for row in rows]) * 2.0**power
        q, _ = quantize(block.unsqueeze(1), quantizer, "x")
        assert q.scale.tolist() == [2.0**power] * len(rows)
        assert q.decode()[:, 0].tolist() == [
            [nearest(v / 2**power, values) * 2.0**power for v in row] for row in block.tolist()
        ]
    assert q.format.name == f"{name}:NP/32"


def test_the_exponent_is_floored_so_the_largest_may_saturate():
    x = torch.zeros(1, 1, 64)
    x[0, 0, 0], x[0, 0, 32] = 7.9, 8.0
    q, _ = quantize(x, build("mx", "x"), "x")
    assert q.scale.tolist() == [1.0, 2.0] and q.decode()[0, 0, 0] == 6.0 and q.decode()[0, 0, 32] == 8.0
    x[0, 0, 1], x[0, 0, 40] = float("nan"), float("inf")
    q, _ = quantize(x, build("mx", "x"), "x")
    assert q.scale.isnan().all() and q.decode().isnan().all()
    zero, _ = quantize(torch.zeros(1, 1, 32), build("mx", "x"), "x")
    assert zero.decode().eq(0).all()
    tiny, _ = quantize(torch.full((1, 1, 32), 2.0**-140), build("mx", "x"), "x")
    assert tiny.scale.item() == 2.0**-127


def test_nvfp4_codes_are_made_with_two_levels_of_scales():
    torch.manual_seed(0)
    x = torch.randn(6, 1, 64) * torch.logspace(-2, 2, 6).view(6, 1, 1)
    q, _ = quantize(x, build("nvfp4", "x"), "x")
    blocks = x.view(6, 4, 16).numpy()
    of_tensor = np.float32(np.abs(blocks).max()) / np.float32(6 * 448)
    scale = np.abs(blocks).max(2) / np.float32(6) / of_tensor
    of_block = np.array([[nearest(float(v), table("e4m3")) for v in row] for row in scale], dtype=np.float32)
    np.testing.assert_array_equal(q.scale.view(6, 4).numpy(), of_block * of_tensor)
    inverse = np.float32(1) / (of_block * of_tensor)
    codes = [[[nearest(float(v), E2M1) for v in row] for row in block] for block in blocks * inverse[:, :, None]]
    expected = np.array(codes, dtype=np.float32) * (of_block * of_tensor)[:, :, None]
    np.testing.assert_array_equal(q.decode().view(6, 4, 16).numpy(), expected)


@pytest.mark.parametrize("format", ["mxfp4", "mxfp8_e4m3", "nvfp4"])
def test_stochastic_rounding_has_no_bias(format):
    g = torch.randn(64).clamp(-2, 2) + 0.1
    g[::16] = 3.0  # every block reaches the same range
    name, options = ("nvfp4", {}) if format == "nvfp4" else ("mx", {"format": format})
    quantizer = build(name, "g", stochastic=True, **options)
    draws = 4000
    decoded = quantize(g.expand(1, draws, 64), quantizer, "g", key=torch.tensor(7))[0].decode()[0]
    error = (decoded.mean(0) - g).abs() / (decoded.std(0) / draws**0.5 + 1e-6)
    assert float(error.max()) < 5, "of 64 means; 5 standard errors are passed once in 30,000 runs"


def recipe(name: str, **options) -> fqt.Recipe:
    products = {
        product: fqt.Product(*[build(name, letter, **options) for letter in letters])
        for product, letters in (("output", "xw"), ("grad_input", "gw"), ("grad_weight", "gx"))
    }
    return fqt.Recipe(name, **products)


@pytest.mark.parametrize(
    ("name", "options", "bound"), [("mx", {"format": "mxfp8_e4m3"}, 0.06), ("nvfp4", {}, 0.2), ("mx", {}, 0.25)]
)
@pytest.mark.parametrize("kind", ["linear", "tokens", "conv"])
def test_layers_train_with_blocks_in_all_three_products(name, options, bound, kind):
    torch.manual_seed(0)
    plain = nn.Conv2d(32, 16, 3, padding=1) if kind == "conv" else nn.Linear(64, 48)
    shape = {"linear": (64, 64), "tokens": (4, 32, 64), "conv": (4, 32, 6, 6)}[kind]
    layer = fqt.convert(type(plain)(*((32, 16, 3, 1, 1) if kind == "conv" else (64, 48))), recipe(name, **options))
    layer.load_state_dict(plain.state_dict())
    one = torch.randn(shape).requires_grad_()
    other = one.detach().clone().requires_grad_()
    y, expected = layer(one), plain(other)
    g = torch.randn_like(y)
    y.backward(g)
    expected.backward(g)
    for actual, wanted in ((y, expected), (one.grad, other.grad), (layer.weight.grad, plain.weight.grad)):
        assert float((actual - wanted).detach().norm() / wanted.detach().norm()) < bound
    (row,) = fqt.summary(layer).rows
    assert row.backend == "reference" and "/block" in row.output and "in blocks of" not in row.output
    assert "not" in row.note


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(ValueError, match="format 'mxfp5' is not one of mxfp4, mxfp6_e2m3"):
        build("mx", "x", format="mxfp5")
    x, w = build("mx", "x"), build("mx", "w")
    with pytest.raises(ValueError, match=r"grad_input.w cannot be 'saved', its blocks lie along the axis"):
        fqt.Recipe("bad", fqt.Product(x, w), fqt.Product(build("mx", "g"), "saved"), fqt.Product("float", "float"))
    with pytest.raises(ValueError, match="a grid named 'e2m1' exists already"):
        fqt.register_grid(fqt.Grid("e2m1", 4, 4, 2, 1, 6.0))
