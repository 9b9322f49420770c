"""Packed codes, and the estimator's mask."""

import math

import numpy as np
import pytest
import torch

from fqt import reference
from fqt.formats import Format
from tests.fqt import oracle, oracle_products
from tests.fqt.reference.quantize_cases import AXES, calibration_of, quantized

SIZES = [*range(1, 18), 31, 32, 33, 63, 64, 65]


def full_range_codes(format: Format, shape: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    return oracle_products.random_operand(rng, format, shape).codes


pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("axes", ["", "NP", "C", "NC"])
@pytest.mark.parametrize(
    "name",
    ["sign", "uint1", "fixed1", "ternary", "int2", "uint2", "int3", "int4", "uint4", "fixed4", "uint5", "int8", "uint8",
     "fixed8", "e4m3", "e5m2", "int9", "uint16", "fixed16", "fixed17", "fixed25", "fixed32"],
)  # fmt: skip
@pytest.mark.every(2)
def test_pack_and_unpack_for_every_width_and_ragged_sizes(name, axes, rng):
    base = Format.parse(name)
    format = Format(base.grid, base.bits, axes)
    for size in SIZES:
        shape = (2, size, 2) if not format.grouping.in_order else (2, 2, size)
        codes = full_range_codes(format, shape, rng)
        expected = oracle.pack(codes, format)  # its padding bits are 0
        dtype = {16: np.int16, 32: np.int32}.get(format.storage_bits, np.uint8)
        packed = torch.from_numpy(expected.astype(dtype))
        assert tuple(packed.shape) == format.packed_shape(shape)
        assert torch.equal(reference.unpack(packed, format, shape).double(), torch.from_numpy(codes))

        stored = np.vectorize(lambda code: oracle.stored_integer(code, format), otypes=[np.int64])(codes)
        rows = reference.group_rows(torch.from_numpy(stored.astype(dtype)), format)
        assert torch.equal(reference.pack(rows, format, shape), packed)


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("name", ["sign", "ternary", "uint2+", "int3", "uint4+", "uint1+"])
def test_padding_bits_are_zero_after_quantize(name, axes, rng):
    base = Format.parse(name)
    format = Format(base.grid, base.bits, axes, base.offset)
    for size in (1, 3, 5, 9, 13):
        x = torch.from_numpy(rng.normal(size=(2, size, size)).astype(np.float32))
        q = quantized(x, format, calibration_of(name), base.grid != "sign")
        codes = reference.unpack(q.codes, format, q.shape).double().numpy()
        np.testing.assert_array_equal(q.codes, oracle.pack(codes, format))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 7, 8, 12, 16])
def test_codes_of_b_bits_are_the_sum_of_b_planes(bits, rng):
    """Hence b binary products make a b-bit product, offsets and all."""
    x = torch.from_numpy(rng.normal(size=(4, 3, 9)).astype(np.float32))
    format = Format("uint", bits, "N", True)
    q = quantized(x, format, "minmax", stochastic=True)
    codes = reference.unpack(q.codes, format, q.shape)
    planes = [(codes.long() >> j & 1).float() for j in range(bits)]
    assert torch.equal(sum(2.0**j * plane for j, plane in enumerate(planes)), codes)
    w = torch.from_numpy(rng.choice([-1.0, 1.0], (5, 9)).astype(np.float32))
    assert torch.equal(sum(2.0**j * (plane @ w.T) for j, plane in enumerate(planes)), codes @ w.T)


# --- the estimator's mask --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 7, 8, 9, 17])
def test_the_mask_holds_a_bit_an_element(channels, rng):
    x = rng.normal(size=(3, 2, channels)).astype(np.float32)
    x[0, 0, 0], x[1, 1, -1] = math.nan, -math.inf
    _, mask = reference.quantize(torch.from_numpy(x), Format("sign", 1), calibrate="none", pass_range=(-1.0, 0.5))
    inside = (x >= np.float32(-1)) & (x <= np.float32(0.5))
    np.testing.assert_array_equal(mask, oracle.pack(np.where(inside, 1.0, -1.0), Format("sign", 1)))
    g = torch.from_numpy(rng.normal(size=x.shape).astype(np.float32))
    np.testing.assert_array_equal(reference.apply_mask(g, mask), np.where(inside, g, 0))


def test_the_borders_of_the_mask_belong_to_the_inside_and_nan_does_not():
    x = torch.tensor([-1.0, 1.0, -1.0000001, 1.0000001, 0.0, math.nan, math.inf, -math.inf]).view(1, 1, 8)
    assert reference.pass_mask(x, -1.0, 1.0).tolist() == [[[0b00010011]]]


def test_the_mask_of_a_bfloat16_tensor_compares_its_float32_values():
    """0.3 is no bfloat16; the bfloat16 just above it is outside a range that ends there."""
    x = torch.tensor([0.298828125, 0.30078125]).to(torch.bfloat16).view(1, 1, 2)
    assert torch.equal(reference.pass_mask(x, 0.0, 0.3), reference.pass_mask(x.float(), 0.0, 0.3))


def test_a_masked_gradient_keeps_its_dtype_and_drops_nan():
    mask = reference.pass_mask(torch.tensor([[[0.0, 5.0]]]), -1.0, 1.0)
    g = torch.tensor([[[2.0, math.nan]]], dtype=torch.bfloat16)
    masked = reference.apply_mask(g, mask)
    assert masked.dtype == torch.bfloat16
    assert masked.tolist() == [[[2.0, 0.0]]]
