"""quantize against an exact model: every code, scale and offset with ==, every grid, rounding and granularity."""

import itertools
import math

import numpy as np
import pytest
import torch

from fqt import reference
from fqt.formats import GRIDS, Format
from fqt.qtensor import check
from fqt.testing import assert_same_codes
from tests.fqt import oracle
from tests.fqt.reference.quantize_cases import AXES, KEY, SHAPE, calibration_of, formats, limits_of, quantized

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def model(x: np.ndarray, format: Format, calibrate: str, stochastic: bool, limits=None) -> oracle.Model:
    return oracle.quantize(x, format, calibrate, limits or limits_of(format), KEY if stochastic else None, stream=6)


def awkward_values(rng: np.random.Generator, format: Format) -> np.ndarray:
    """Ties and exact codes where the scale is a power of two, both zeros, large and tiny numbers, and ordinary ones."""
    low, high = format.code_range
    reach = min(high, 300)
    kinds = [
        rng.integers(-reach, reach, SHAPE, endpoint=True) + 0.5,
        rng.integers(-reach, reach, SHAPE, endpoint=True).astype(float),
        rng.normal(size=SHAPE) * reach,
        rng.uniform(low, high, SHAPE),
        np.exp2(rng.uniform(-30, 0, SHAPE)) * rng.choice([-1, 1], SHAPE),
        rng.choice([0.0, -0.0, 0.5, -0.5, 1.5, -1.5, 2.5, -2.5], SHAPE),
        rng.normal(size=SHAPE) * 3.0 * high,
    ]
    return np.choose(rng.integers(0, len(kinds), SHAPE), kinds).astype(np.float32)


@pytest.mark.parametrize(("name", "calibrate"), formats())
@pytest.mark.every(3)
def test_codes_equal_the_exact_model(name, calibrate, rng):
    for axes, stochastic in itertools.product(AXES, (False, True)):
        base = Format.parse(name)
        format = Format(base.grid, base.bits, axes, base.offset)
        if stochastic and format.grid == "sign":
            continue
        x = awkward_values(rng, format)
        model(x, format, calibrate, stochastic).check(quantized(torch.from_numpy(x), format, calibrate, stochastic))


@pytest.mark.parametrize("step", [2.0**-20, 0.1, 3e-5, 2.0**30])
@pytest.mark.parametrize("name", ["int4", "uint3+", "uint8", "fixed12", "fixed30", "e4m3", "e5m2", "ternary"])
def test_a_fixed_range_of_any_step_equals_the_exact_model(name, step, rng):
    format = Format.parse(name)
    limits = limits_of(format, step)
    x = (awkward_values(rng, format) * step).astype(np.float32)
    for stochastic in (False, True):
        expected = model(x, format, "none", stochastic, limits)
        expected.check(quantized(torch.from_numpy(x), format, "none", stochastic, limits=limits))


# --- rounding, by hand -----------------------------------------------------------------------------------------------


def codes_of(values: list[float], name: str, **options) -> list[float]:
    x = torch.tensor(values).view(1, 1, -1)
    q = quantized(x, Format.parse(name), "none", **options)
    return reference.unpack(q.codes, q.format, q.shape)[0, 0].tolist()


def test_ties_go_to_the_even_code():
    assert codes_of([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5], "int4") == [-2, -2, 0, 0, 2, 2, 4]
    assert codes_of([0.5, 1.5, 2.5], "uint2") == [0, 2, 2]
    assert codes_of([-2.5, -1.5, -0.5, 0.5], "fixed30") == [-2, -2, 0, 0]


def test_values_beyond_the_range_saturate():
    inf = math.inf
    assert codes_of([-inf, -1e30, -8.0, 8.0, 1e30, inf], "int4") == [-7, -7, -7, 7, 7, 7]
    assert codes_of([-inf, -9.0, 9.0, inf], "fixed4") == [-8, -8, 7, 7]
    assert codes_of([-inf, -3.0, 99.0, inf], "uint3") == [0, 0, 7, 7]
    assert codes_of([-inf, 1e38, inf], "fixed32") == [-(2**31), 2**31 - 1, 2**31 - 1]
    assert codes_of([-inf, 1e38, inf], "e4m3") == [-448, 448, 448]
    assert codes_of([-inf, 1e38, inf], "e5m2") == [-57344, 57344, 57344]
    for name in ("int4", "uint3", "fixed4", "fixed32", "e4m3", "e5m2"):
        low, high = Format.parse(name).code_range
        assert codes_of([-math.inf, math.inf], name, stochastic=True) == [low, high]


def test_the_sign_of_zero_is_plus_one():
    assert codes_of([0.0, -0.0, 1e-45, -1e-45, 5.0, -5.0], "sign") == [1, 1, 1, -1, 1, -1]


def test_exact_codes_are_never_moved_by_stochastic_rounding():
    for name in ("int8", "uint8", "fixed8", "e4m3", "e5m2", "ternary"):
        low, high = Format.parse(name).code_range
        exact = (
            [float(v) for v in oracle.float8_grid(name)] if name in ("e4m3", "e5m2") else [*map(float, range(low, high + 1))]
        )
        assert codes_of(exact, name, stochastic=True) == exact


def test_the_two_extremes_of_the_24_bits():
    """Bits 0 do not move an exact code up but anything above one; bits 2^24 - 1 move what is within 2^-24 of the next."""
    none, all_ones = (38, 247210), (8, 93095)  # (key, element) found by search
    for (key, element), bits, cases in (
        (none, 0, {1.0: 1, 0.0: 0, -3.0: -3, 1.0 + 2.0**-23: 2, 2.0**-30: 1}),
        (all_ones, 2**24 - 1, {1.0: 1, 1.5: 1, 2.0 - 2.0**-23: 1, -(2.0**-26): 0}),
    ):
        assert oracle.u24(element, 0, 6, key) == bits
        x = torch.zeros(1, 1, element + 1)
        for value, code in cases.items():
            x[0, 0, -1] = value
            q, _ = reference.quantize(
                x, Format("int", 4), calibrate="none", limits=(-7.0, 7.0), stochastic=True, key=torch.tensor(key), stream=6
            )
            assert q.decode()[0, 0, -1] == code, (bits, value)


# --- float8 ----------------------------------------------------------------------------------------------------------

TORCH_FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@pytest.mark.parametrize("grid", ["e4m3", "e5m2"])
def test_the_model_of_float8_is_torchs(grid):
    values = torch.arange(256, dtype=torch.uint8).view(TORCH_FLOAT8[grid]).float()
    np.testing.assert_array_equal(values.numpy(), np.array([oracle.float8_value(byte, grid) for byte in range(256)]))


@pytest.mark.parametrize("grid", ["e4m3", "e5m2"])
def test_float8_to_nearest_is_torchs_cast(grid, rng):
    values = np.array(oracle.float8_grid(grid), np.float32)
    middle = (values[1:] + values[:-1]) / 2
    beside = [np.nextafter(middle, np.float32(s)) for s in (-np.inf, np.inf)]
    smallest = float(values[values > 0].min())
    tiny = np.array([smallest * f for f in (0.5, 0.49, 0.51, 1.5, 2.0**-40)] + [1e-45], np.float32)
    ordinary = np.exp2(rng.uniform(-30, math.log2(values.max()), 4000)).astype(np.float32)
    x = np.concatenate([values, [-0.0], middle, *beside, tiny, -tiny, ordinary, -ordinary]).astype(np.float32)
    high = GRIDS[grid].largest
    q = quantized(torch.from_numpy(x).view(1, 1, -1), Format(grid, 8), "none", limits=(-high, high))
    assert q.scale.tolist() == [1.0]
    np.testing.assert_array_equal(q.codes.view(-1), torch.from_numpy(x).to(TORCH_FLOAT8[grid]).view(torch.uint8))


@pytest.mark.parametrize("grid", ["e4m3", "e5m2"])
def test_float8_stochastic_rounding_goes_to_a_neighbour_as_its_24_bits_say(grid, rng):
    values = np.array(oracle.float8_grid(grid))
    share = rng.random(len(values) - 1)
    x = (values[:-1] * (1 - share) + values[1:] * share).astype(np.float32)  # one in every gap
    codes = codes_of(x.tolist(), grid, stochastic=True)
    ups = 0
    for element, (value, code) in enumerate(zip(x.tolist(), codes, strict=True)):
        low, high = oracle.float8_neighbours(value, grid)
        up = high > low and oracle.u24(element, 0, 6, KEY) < (value - low) / (high - low) * 2**24
        assert code == (high if up else low), (element, value)
        ups += up
    assert 0.3 * len(x) < ups < 0.7 * len(x)  # both ways were tried


# --- what is not finite, and ranges that vanish ----------------------------------------------------------------------

RANGED = ["sign:N", "ternary:N", "int8:N", "int16:N", "uint4+:N", "uint16+:N", "e4m3:N", "e5m2:N"]


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", RANGED)
def test_a_group_that_is_not_finite_decodes_to_nan_and_spoils_no_other(name, bad, stochastic, rng):
    if name.startswith("sign") and stochastic:
        pytest.skip("signs are not rounded")
    format, calibrate = Format.parse(name), calibration_of(name)
    x = rng.normal(size=SHAPE).astype(np.float32)
    x[1, 2, 3] = bad
    q = quantized(torch.from_numpy(x), format, calibrate, stochastic)
    assert q.scale.isnan().tolist() == [False, True, False]
    assert not q.codes[1].any(), "stored bits 0"
    if q.offset is not None:
        assert q.offset[1] == 0
    values = q.decode()
    assert bool(values[1].isnan().all())
    assert bool(values[[0, 2]].isfinite().all())
    model(x, format, calibrate, stochastic).check(q)


@pytest.mark.parametrize("name", ["uint4+:N", "uint16+:N"])
def test_a_range_that_overflows_decodes_to_nan(name):
    x = torch.tensor([[[-3e38, 3e38]], [[1.0, 2.0]]])
    q = quantized(x, Format.parse(name), "minmax")
    assert q.scale.isnan().tolist() == [True, False]
    assert bool(q.decode()[0].isnan().all())
    q = quantized(x, Format.parse(name), "absmax")
    assert q.scale.isnan().tolist() == [True, False]


@pytest.mark.parametrize("name", ["sign", "ternary", "int8", "uint4", "uint4+", "fixed8", "fixed30", "e4m3", "e5m2"])
def test_with_a_fixed_range_infinities_saturate_and_only_nan_spoils(name):
    format = Format.parse(name)
    low, high = format.code_range
    x = torch.tensor([[[-math.inf, 1.0, math.inf]]])
    codes = reference.unpack(quantized(x, format, "none").codes, format, (1, 1, 3))[0, 0].tolist()
    assert (codes[0], codes[2]) == (low, high)
    x[0, 0, 1] = math.nan
    q = quantized(x, format, "none")
    assert q.scale.isnan().all()
    assert not q.codes.any()
    assert bool(q.decode().isnan().all())


@pytest.mark.parametrize("name", RANGED)
def test_all_zero_groups_decode_to_zero(name):
    x = torch.zeros(3, 2, 5)
    x[1] = torch.linspace(-1, 1, 10).view(2, 5)
    q = quantized(x, Format.parse(name), calibration_of(name))
    assert q.scale[0] == 0
    assert q.scale[1] > 0
    assert torch.equal(q.decode()[[0, 2]], torch.zeros(2, 2, 5))


@pytest.mark.parametrize("value", [3.7, -0.3, 1e-35, -1e-40, 3e38])
@pytest.mark.parametrize("name", ["uint1+:N", "uint4+:N", "uint16+:N"])
def test_a_constant_group_is_its_offset(name, value):
    q = quantized(torch.full((2, 3, 4), value), Format.parse(name), "minmax", stochastic=True)
    assert not q.scale.any()
    assert torch.equal(q.decode(), torch.full((2, 3, 4), value))


@pytest.mark.parametrize("name", ["int8:N", "uint4+:N", "e4m3:N", "ternary:N", "sign:N"])
@pytest.mark.parametrize(("exponent", "vanishes"), [(-100, False), (-101, True), (-126, True), (-140, True), (-149, True)])
def test_ranges_below_2_to_the_minus_100_count_as_constant(name, exponent, vanishes):
    """The least range that counts is exactly 2^-100; what is less decodes to 0, or to its minimum."""
    format, calibrate = Format.parse(name), calibration_of(name)
    span = math.ldexp(1.0, exponent)
    x = np.zeros((1, 1, 8), np.float32)
    x[0, 0, :4] = span
    if calibrate == "absmean":
        x[0, 0, 4:] = -span
    q = quantized(torch.from_numpy(x), format, calibrate)
    assert (float(q.scale) == 0) == vanishes
    decoded = q.decode()
    assert bool(decoded.isfinite().all())
    if vanishes:
        assert not decoded.any()
    else:
        assert float(decoded.max()) == pytest.approx(span, rel=2e-7)
    model(x, format, calibrate, False).check(q)


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-33, 1e-29, 1e30, 1e38])
@pytest.mark.parametrize("name", ["int8:N", "int16:NP", "uint4+:C", "uint16+:N", "e5m2:N", "ternary:N", "sign:NC"])
def test_extreme_sizes_equal_the_exact_model(name, size, rng):
    x = np.clip(rng.normal(size=SHAPE), -3, 3).astype(np.float32) * np.float32(size)
    for stochastic in (False, True):
        if stochastic and name.startswith("sign"):
            continue
        format = Format.parse(name)
        calibrate = calibration_of(name)
        model(x, format, calibrate, stochastic).check(quantized(torch.from_numpy(x), format, calibrate, stochastic))


# --- empty tensors, strides, dtypes, threads -------------------------------------------------------------------------


@pytest.mark.parametrize("prune", ["", "bernoulli", "topk"])
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 3, 0), (2, 0, 5), (0, 0, 0)])
@pytest.mark.parametrize("axes", AXES)
def test_empty_tensors_have_codes_scales_and_values(axes, shape, prune):
    for name in ("sign", "ternary", "int8", "uint4+", "uint16+", "fixed24", "e4m3"):
        base = Format.parse(name)
        format = Format(base.grid, base.bits, axes, base.offset)
        calibrate = "none" if base.grid == "fixed" else calibration_of(name)
        options = {"prune": prune, "keep_one_in": 2} if prune else {}
        q, mask = reference.quantize(
            torch.empty(shape), format, calibrate=calibrate, limits=(-128.0, 127.0), key=torch.tensor(1),
            stochastic=base.grid != "sign", pass_range=(-1.0, 1.0), **options,
        )  # fmt: skip
        check(q)
        assert q.decode().shape == shape
        assert calibrate == "none" or not q.scale.any()
        assert mask is not None
        assert mask.shape == Format("sign", 1).packed_shape(shape)


def views(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values laid out otherwise."""
    n, p, c = x.shape
    wide = torch.full((n, p, 2 * c + 3), 77.0, dtype=x.dtype)
    wide[..., 3::2] = x
    image = x.view(n, 2, p // 2, c).permute(0, 3, 1, 2).contiguous()  # (N, C, H, W)
    return {
        "channel first": x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "position first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "every second of a slice": wide[..., 3::2],
        "flattened NCHW": image.flatten(2).transpose(1, 2),
        "flattened channels_last": image.to(memory_format=torch.channels_last).flatten(2).transpose(1, 2),
        "reversed twice": x.flip(1).flip(1),
        "of a larger batch": torch.cat([torch.full_like(x, 9.0), x, torch.full_like(x, -9.0)])[n : 2 * n],
    }


LAID_OUT = ["sign:O", "ternary", "int8:NC", "uint4+:N", "uint4+:C", "uint16+:NP", "fixed24", "e4m3:C"]


@pytest.mark.parametrize("name", LAID_OUT)
def test_codes_do_not_depend_on_strides(name, rng):
    x = torch.from_numpy(rng.normal(size=(3, 4, 7)).astype(np.float32))
    format = Format.parse(name)
    calibrate = "none" if format.grid == "fixed" else calibration_of(name)
    stochastic = format.grid != "sign"
    expected = quantized(x, format, calibrate, stochastic)
    for what, view in views(x).items():
        assert torch.equal(view, x), what
        assert_same_codes(quantized(view, format, calibrate, stochastic), expected)


@pytest.mark.parametrize("name", LAID_OUT)
def test_expanded_tensors_have_the_codes_of_their_copies(name, rng):
    format = Format.parse(name)
    calibrate = "none" if format.grid == "fixed" else calibration_of(name)
    for shape in ((3, 1, 1), (1, 4, 1), (1, 1, 7), (1, 1, 1), (3, 1, 7)):
        x = torch.from_numpy(rng.normal(size=shape).astype(np.float32)).expand(3, 4, 7)
        stochastic = format.grid != "sign"
        expected = quantized(x.contiguous(), format, calibrate, stochastic)
        assert_same_codes(quantized(x, format, calibrate, stochastic), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", LAID_OUT)
def test_other_dtypes_have_the_codes_of_their_float32_values(name, dtype, rng):
    x = torch.from_numpy(rng.normal(size=(3, 4, 7))).to(dtype)
    format = Format.parse(name)
    calibrate = "none" if format.grid == "fixed" else calibration_of(name)
    stochastic = format.grid != "sign"
    before = x.clone()
    fold = torch.from_numpy(rng.normal(size=(1, 1, 7)).astype(np.float32))
    for options in ({}, {"fold": fold}):
        expected = quantized(x.float(), format, calibrate, stochastic, **options)
        assert_same_codes(quantized(x, format, calibrate, stochastic, **options), expected)
    assert torch.equal(x, before), "the input is not changed in place"


def test_the_input_is_not_changed_in_place(rng):
    values = torch.from_numpy(rng.normal(size=SHAPE).astype(np.float32))
    for name, calibrate in formats():
        x = values.clone()
        quantized(x, Format.parse(name), calibrate, stochastic=not name.startswith("sign"))
        assert torch.equal(x, values), (name, calibrate)


@pytest.mark.parametrize("name", LAID_OUT)
def test_one_and_two_threads_make_the_same_codes(name):
    x = torch.randn(64, 33, 65)
    format = Format.parse(name)
    calibrate = "none" if format.grid == "fixed" else calibration_of(name)
    made = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        made.append(quantized(x, format, calibrate, format.grid != "sign"))
    assert_same_codes(*made)


def test_fold_is_multiplied_in_before_the_range_is_measured(rng):
    x = rng.normal(size=SHAPE).astype(np.float32)
    fold = np.exp(rng.normal(size=(1, 1, 7))).astype(np.float32)
    for name in ("uint4+:N", "int8:C", "uint2+:NC"):
        format = Format.parse(name)
        q = quantized(torch.from_numpy(x), format, calibration_of(name), True, fold=torch.from_numpy(fold))
        model(x * fold, format, calibration_of(name), True).check(q)


# --- absmean ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elements", [1, 2, 3, 4, 5, 7, 8, 31, 32, 33, 1000])
def test_absmean_is_a_float64_sum_over_one_fixed_tree(elements, rng):
    """Values of very different sizes, so that another order gives other bits."""
    x = (rng.normal(size=(5, 1, elements)) * np.exp2(rng.integers(-30, 30, (5, 1, elements)))).astype(np.float32)
    q = quantized(torch.from_numpy(x), Format("sign", 1, "O"), "absmean")
    model(x, Format("sign", 1, "O"), "absmean", False).check(q)
    exact = [math.fsum(abs(float(v)) for v in row[0]) / elements for row in x]
    np.testing.assert_allclose(q.scale.numpy(), exact, rtol=2**-23)  # half a float32 step, and the tree's few in 2^-52


def test_another_order_of_the_sum_would_show():
    """1 + 2^-24 is halfway between two float32; whether 2^-53 and 2^-53 survive to tip it is a matter of order."""
    values = (1.0, 2.0**-24, 2.0**-53, 2.0**-53)
    for padding in (0, 4, 12):
        rows = np.array([(*order, *([0.0] * padding)) for order in itertools.permutations(values)], np.float32)
        x = rows[:, None] * np.float32(4 + padding)
        q = quantized(torch.from_numpy(x), Format("sign", 1, "O"), "absmean")
        model(x, Format("sign", 1, "O"), "absmean", False).check(q)
        assert len(set(q.scale.tolist())) == 2


def test_absmean_does_not_depend_on_strides(rng):
    big = (rng.normal(size=(6, 4, 7)) * np.exp2(rng.integers(-40, 40, (6, 4, 7)))).astype(np.float32)
    x = torch.from_numpy(big)
    for axes in AXES:
        expected = quantized(x, Format("sign", 1, axes), "absmean").scale
        for view in views(x).values():
            assert torch.equal(quantized(view, Format("sign", 1, axes), "absmean").scale, expected)


# --- statistics of stochastic rounding -------------------------------------------------------------------------------

ROUNDED = [
    ("int4:N", "absmax"), ("int2", "absmax"), ("int12:NC", "absmax"), ("uint1+:N", "minmax"), ("uint4+:N", "minmax"),
    ("uint4+:C", "absmax"), ("uint8+:NP", "minmax"), ("uint3", "none"), ("ternary", "none"), ("fixed6", "none"),
    ("fixed28", "none"), ("e4m3", "absmax"), ("e5m2:C", "absmax"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "calibrate"), ROUNDED)
def test_stochastic_rounding_is_unbiased_with_the_variance_of_a_coin(name, calibrate, rng):
    """E Q(x) = x and Var Q(x) = f (1 - f) step^2, f the place between two codes. z-tests, false alarm 1e-6 each."""
    copies, keys, format = 100, 30, Format.parse(name)
    x = rng.uniform(0.02, 0.98, (2, 3, 6)) * rng.choice([1, 1] if name == "uint3" else [-1, 1], (2, 3, 6))
    if calibrate == "none":
        x = x * min(format.code_range[1], 20)
    x = torch.from_numpy(x.astype(np.float32))
    low, high = bounds(quantized(x, format, calibrate), x, format, calibrate)
    step = high - low
    share = torch.where(step > 0, (x.double() - low) / torch.where(step > 0, step, 1.0), 0.0)

    total, square = torch.zeros_like(low), torch.zeros_like(low)
    many = x.repeat(copies, 1, 1)  # of samples, so that every group has its range in every granularity
    for key in rng.integers(-(2**63), 2**63, keys):
        q, _ = reference.quantize(
            many, format, calibrate=calibrate, limits=limits_of(format), stochastic=True, key=torch.tensor(int(key))
        )
        error = (q.decode().double() - many).view(copies, *x.shape)
        total += error.sum(0)
        square += error.square().sum(0)

    draws = copies * keys
    # where x is a code but for float32's roundings, there is nothing to vary
    slack = float(x.abs().max()) * 2**-22
    step, share = torch.where(step > 0, step, 0.0).numpy(), share.numpy()
    variance = share * (1 - share) * step**2
    oracle.assert_mean(total.numpy(), draws, np.zeros_like(step), variance, slack=slack)
    of_squares = variance * step**2 * (1 - 2 * share) ** 2  # the variance of a coin's squared error
    oracle.assert_mean(square.sum().numpy(), draws, variance.sum(), of_squares.sum())


def bounds(q, x: torch.Tensor, format: Format, calibrate: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The two values between which each element of x lies."""
    scale = reference.spread(q.scale, q).double()
    offset = 0.0 if q.offset is None else reference.spread(q.offset, q).double()
    y = (x.double() - offset) / torch.where(scale > 0, scale, 1.0)
    if format.is_float:
        near = [oracle.float8_neighbours(max(-m, min(m, v)), format.grid) for v, m in zip(
            y.reshape(-1).tolist(), [GRIDS[format.grid].largest] * y.numel(), strict=True)]  # fmt: skip
        low, high = (torch.tensor([pair[i] for pair in near], dtype=torch.float64).view(y.shape) for i in (0, 1))
    else:
        y = torch.where((y - y.round()).abs() < 1e-5, y.round(), y)  # the extremes of a group are codes but for rounding
        low, high = y.floor(), y.ceil()
    return low * scale + offset, high * scale + offset
