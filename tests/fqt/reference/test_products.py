"""The three products against numpy's 64-bit integers and the float order that fqt.reference states, every bit of them."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fqt import multiply, reference
from fqt.formats import Format
from fqt.geometry import Geometry
from fqt.qtensor import QTensor
from fqt.quantizers import build, quantize
from fqt.reference import products
from fqt.testing import assert_same_values
from tests.fqt import oracle, oracle_products

pytestmark = pytest.mark.usefixtures("poisoned_memory")
CASES = 12  # of each pair of formats, half of them linear, half convolutions

# x * w; with a scale for each token only in linear layers
OUTPUT = [
    ("sign", "sign:O"), ("sign", "sign"), ("uint2", "sign"), ("uint1", "uint2+"), ("uint8", "uint8+"), ("uint4+", "sign:O"),
    ("uint4+:N", "int8:O"), ("uint4+:N", "uint3+:O"), ("uint1+", "uint1+"), ("int8:N", "int8:O"), ("int8", "ternary:O"),
    ("fixed8", "fixed4"), ("int16:N", "int16:O"), ("uint16+:N", "uint9+:O"), ("fixed13", "fixed16"), ("e4m3:N", "e4m3:O"),
    ("e5m2", "e4m3:O"), ("e4m3", "uint3+:O"), ("int8:NP", "int8:O"), ("uint3+:NP", "uint2+:O"), ("sign:NP", "sign:O"),
]  # fmt: skip
# g * w, and the share of groups that pruning keeps
GRAD_INPUT = [
    ("uint4+:N", "sign", None), ("uint4+:N", "sign", 0.5), ("uint1+:N", "sign", None), ("uint6+:N", "uint2+", None),
    ("uint8+:N", "uint8+", None), ("uint4+:N", "uint3+", 0.4), ("uint4+", "uint3+", None), ("int8:N", "int8", None),
    ("int8:N", "int8", 0.5), ("int8", "ternary", None), ("uint8+", "sign", 1.0), ("uint4+", "uint2+", 0.0),
    ("int16:N", "int16", None), ("e5m2:N", "e4m3", None), ("e5m2", "e4m3", None), ("uint4+:NP", "uint3+", None),
    ("uint4+:NP", "sign", 0.5), ("int8:N", "int8", 0.0),
]  # fmt: skip
# g * x, and the share of groups that pruning keeps
GRAD_WEIGHT = [
    ("uint4+:C", "sign", None), ("uint4+:C", "sign", 0.5), ("uint4+:C", "uint3+", None), ("uint4+:C", "uint3+", 0.5),
    ("uint4+:C", "sign", 0.0), ("uint4+:N", "sign", None), ("uint4+:N", "sign", 0.5), ("uint4+:N", "sign", 0.0),
    ("uint6+:N", "uint2", None), ("uint8+:N", "uint8+", 0.6), ("uint4+:NC", "sign", None), ("uint4+:NC", "sign", 0.5),
    ("uint4+:NC", "uint3+", None), ("uint3+:NC", "uint3+", 0.5), ("int8:C", "int8", None), ("int8:N", "int8", None),
    ("int8:NC", "int8", 0.5), ("int8", "int8", None), ("uint4+", "uint4+", 1.0), ("uint4+", "sign", 1.0),
    ("uint4+", "sign", 0.0), ("int16:C", "int16", None), ("int16:N", "uint16+", None), ("e5m2:C", "e4m3", None),
    ("e5m2:N", "e4m3", 0.5),
]  # fmt: skip


def random_geometry(rng: np.random.Generator) -> tuple[Geometry, int, int]:
    """A convolution of any kind, and its numbers of input and output channels."""
    while True:
        groups = int(rng.choice([1, 1, 2, 3]))
        depthwise = rng.random() < 0.2
        inputs = groups if depthwise else groups * int(rng.integers(1, 4))
        outputs = groups * int(rng.integers(1, 4))
        geometry = Geometry(
            height=int(rng.integers(1, 6)),
            width=int(rng.integers(1, 6)),
            kernel=(int(rng.integers(1, 4)), int(rng.integers(1, 4))),
            stride=(int(rng.integers(1, 4)), int(rng.integers(1, 4))),
            padding=tuple(int(i) for i in rng.integers(0, 3, 4)),
            dilation=(int(rng.integers(1, 3)), int(rng.integers(1, 3))),
            groups=groups,
        )
        if min(geometry.output_size) >= 1 and math.prod(geometry.output_size) <= 25:
            return geometry, inputs, outputs


def layers(rng: np.random.Generator, linear_only: bool, cases: int = CASES):
    """(geometry or None, x's shape, w's shape, g's shape) of so many random layers."""
    for case in range(cases):
        samples = int(rng.integers(1, 5))
        if case % 2 and not linear_only:
            geometry, inputs, outputs = random_geometry(rng)
            x_shape = (samples, geometry.height * geometry.width, inputs)
            w_shape = (outputs, math.prod(geometry.kernel), inputs // geometry.groups)
            yield geometry, x_shape, w_shape, (samples, math.prod(geometry.output_size), outputs)
        else:
            positions, inputs, outputs = (int(i) for i in rng.integers(1, 20, 3))
            yield None, (samples, positions, inputs), (outputs, 1, inputs), (samples, positions, outputs)


def close_to_decoded(actual: torch.Tensor, accumulate, a: oracle_products.Operand, b: oracle_products.Operand) -> None:
    """What the scales and offsets mean: the product of the decoded tensors, to within a few roundings of its terms."""
    a_values, b_values = a.values.astype(np.float64), b.values.astype(np.float64)
    product = accumulate(a_values, b_values)

    def largest(operand: oracle_products.Operand) -> np.ndarray:
        scaled = np.abs(operand.codes * operand.scale)
        return scaled if operand.offset is None else scaled + np.abs(operand.offset)

    size = accumulate(largest(a), largest(b))
    assert (np.abs(actual.double().numpy() - product) <= size * 2.0**-20).all()


@pytest.mark.parametrize(("x_name", "w_name"), OUTPUT)
def test_output(x_name, w_name, rng):
    for geometry, x_shape, w_shape, g_shape in layers(rng, ":NP" in x_name):
        x = oracle_products.random_operand(rng, Format.parse(x_name), x_shape)
        w = oracle_products.random_operand(rng, Format.parse(w_name), w_shape)
        bias = rng.normal(size=w_shape[0]).astype(np.float32) if rng.random() < 0.5 else None
        y = reference.output(x.q, w.q, None if bias is None else torch.from_numpy(bias), geometry)
        assert y.shape == g_shape
        assert_same_values(y, torch.from_numpy(oracle_products.output(x, w, bias, geometry)))
        if bias is None:
            close_to_decoded(y, lambda a, b, g=geometry, s=g_shape: oracle_products.accumulate_output(a, b, g, s[1]), x, w)


@pytest.mark.parametrize(("g_name", "w_name", "keep"), GRAD_INPUT)
@pytest.mark.every(2)
def test_grad_input(g_name, w_name, keep, rng):
    for geometry, x_shape, w_shape, g_shape in layers(rng, ":NP" in g_name):
        g = oracle_products.random_operand(rng, Format.parse(g_name), g_shape, keep)
        w = oracle_products.random_operand(rng, Format.parse(w_name), w_shape)
        grad = reference.grad_input(g.q, w.q, None, geometry, x_shape)
        assert grad.shape == x_shape
        assert_same_values(grad, torch.from_numpy(oracle_products.grad_input(g, w, geometry, x_shape)))
        close_to_decoded(grad, lambda a, b, s=x_shape, z=geometry: oracle_products.accumulate_grad_input(a, b, z, s), g, w)
        assert_same_values(reference.grad_input(replace(g.q, index=None), w.q, None, geometry, x_shape), grad)

        mask = torch.from_numpy(oracle.pack(rng.choice([-1, 1], x_shape).astype(float), Format("sign", 1)).copy())
        masked = reference.grad_input(g.q, w.q, mask, geometry, x_shape)
        assert_same_values(masked, reference.apply_mask(grad, mask))


@pytest.mark.parametrize(("g_name", "x_name", "keep"), GRAD_WEIGHT)
@pytest.mark.every(2)
def test_grad_weight(g_name, x_name, keep, rng):
    for geometry, x_shape, w_shape, g_shape in layers(rng, linear_only=False):
        g = oracle_products.random_operand(rng, Format.parse(g_name), g_shape, keep)
        x = oracle_products.random_operand(rng, Format.parse(x_name), x_shape)
        grad = reference.grad_weight(g.q, x.q, geometry)
        assert grad.shape == w_shape
        assert_same_values(grad, torch.from_numpy(oracle_products.grad_weight(g, x, geometry, w_shape)))
        close_to_decoded(
            grad, lambda a, b, s=w_shape, z=geometry: oracle_products.accumulate_grad_weight(a, b, z, s).sum(0), g, x
        )
        assert_same_values(reference.grad_weight(replace(g.q, index=None), x.q, geometry), grad)


# --- borders, by hand ------------------------------------------------------------------------------------------------


def test_padding_is_the_value_zero_and_not_a_code():
    """A 3x3 window of ones over a 1x1 image of ones: of the nine terms one lies inside, whatever codes and offsets."""
    geometry = Geometry(1, 1, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1)
    sign = QTensor(torch.ones(1, 1, 1, dtype=torch.uint8), torch.ones(1), None, None, Format("sign", 1), (1, 1, 1))
    window = replace(sign, codes=torch.ones(1, 9, 1, dtype=torch.uint8), shape=(1, 9, 1))
    assert reference.output(sign, window, None, geometry).tolist() == [[[1.0]]]

    zero, format = torch.zeros(1, 1, 1, dtype=torch.uint8), Format("uint", 2, "", True)
    x = QTensor(zero, torch.ones(1), torch.tensor([5.0]), None, format, (1, 1, 1))
    w = replace(x, codes=zero.expand(1, 9, 1), offset=torch.tensor([7.0]), shape=(1, 9, 1))
    assert reference.output(x, w, None, geometry).tolist() == [[[35.0]]]
    assert reference.grad_input(x, w, None, geometry, (1, 1, 1)).tolist() == [[[35.0]]]
    grad = reference.grad_weight(x, replace(x, offset=torch.tensor([7.0])), geometry)
    assert grad.flatten().tolist() == [0, 0, 0, 0, 35, 0, 0, 0, 0]


def test_a_window_that_lies_in_the_padding_alone_gives_zero(rng):
    geometry = Geometry(2, 2, (1, 1), (1, 1), (2, 0, 0, 2), (1, 1), 1)
    x = oracle_products.random_operand(rng, Format("uint", 4, "", True), (1, 4, 3)).q
    w = oracle_products.random_operand(rng, Format("uint", 4, "O", True), (2, 1, 3)).q
    y = reference.output(x, w, None, geometry).view(4, 4, 2)
    assert not y[:2].any()
    assert not y[:, 2:].any()
    assert bool(y[2:, :2].all())


# --- exact accumulators ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [1039, 1040, 1041, 4000, 5000])
def test_accumulators_beyond_float32_are_exact(terms, rng):
    """127 * 127 * 1040 is just below 2^24; an odd sum beyond it is no float32 and must be rounded once, at the end."""
    x_codes = rng.integers(120, 128, (20, 1, terms)).astype(float)
    w_codes = rng.integers(120, 128, (30, 1, terms)).astype(float)
    x_codes[0], w_codes[0], w_codes[1, 0, ::7] = 127, 127, -126
    format = Format("int", 8)
    x, w = (
        QTensor(torch.from_numpy(oracle.pack(c, format).copy()), torch.ones(1), None, None, format, c.shape)
        for c in (x_codes, w_codes)
    )
    exact = (x_codes.astype(np.int64)[:, 0] @ w_codes.astype(np.int64)[:, 0].T).astype(np.float32)
    np.testing.assert_array_equal(reference.output(x, w, None, None)[:, 0], exact)
    image = Geometry(1, 1, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
    np.testing.assert_array_equal(reference.output(x, w, None, image)[:, 0], exact)
    w_t = QTensor(
        torch.from_numpy(oracle.pack(w_codes.transpose(2, 1, 0), format).copy()), torch.ones(1), None, None, format,
        (terms, 1, 30),
    )  # fmt: skip
    np.testing.assert_array_equal(reference.grad_input(x, w_t, None, None, (20, 1, 30))[:, 0], exact)
    turned = [
        QTensor(torch.from_numpy(oracle.pack(c.transpose(2, 1, 0), format).copy()), torch.ones(1), None, None, format,
                (terms, 1, len(c)))
        for c in (w_codes, x_codes)
    ]  # fmt: skip
    np.testing.assert_array_equal(reference.grad_weight(*turned, None)[:, 0], exact.T)


def test_sixteen_bit_accumulators_are_exact(rng):
    format = Format("uint", 16)
    codes = rng.integers(60000, 65536, (2, 1, 3000)).astype(float)
    q = QTensor(torch.from_numpy(oracle.pack(codes, format).copy()), torch.ones(1), None, None, format, (2, 1, 3000))
    exact = codes.astype(np.int64)[:, 0] @ codes.astype(np.int64)[:, 0].T
    np.testing.assert_array_equal(reference.output(q, q, None, None)[:, 0], exact.astype(np.float32))


@pytest.mark.parametrize("setting", ["mkldnn off", "medium precision", "one thread", "two threads"])
def test_settings_of_torch_do_not_reach_the_accumulators(setting, rng):
    """Without oneDNN a float32 convolution may be NNPACK's Winograd, whose transforms are not exact."""
    geometry = Geometry(16, 16, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1)
    x = oracle_products.random_operand(rng, Format("int", 8, "N"), (16, 256, 16)).q
    w = oracle_products.random_operand(rng, Format("int", 8, "O"), (16, 9, 16)).q
    g = oracle_products.random_operand(rng, Format("uint", 4, "C", True), (16, 256, 16)).q
    flat = oracle_products.random_operand(rng, Format("sign", 1), (16, 256, 16)).q
    w_tensor = replace(w, scale=w.scale[:1], format=Format("int", 8))
    g_sample = oracle_products.random_operand(rng, Format("uint", 4, "N", True), (16, 256, 16)).q

    def products() -> list[torch.Tensor]:
        return [
            reference.output(x, w, None, geometry),
            reference.grad_input(g_sample, w_tensor, None, geometry, (16, 256, 16)),
            reference.grad_weight(g, flat, geometry),
            reference.grad_weight(g_sample, flat, geometry),
        ]

    expected = products()
    codes = [reference.unpack(q.codes, q.format, q.shape).double() for q in (x, w)]
    exact = multiply.multiply_output(*codes, geometry).float() * reference.spread(x.scale, x)
    assert_same_values(expected[0], exact * w.scale)
    if setting == "mkldnn off":
        before = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            actual = products()
        finally:
            torch._C._set_mkldnn_enabled(before)
    elif setting == "medium precision":
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            actual = products()
        finally:
            torch.set_float32_matmul_precision(before)
    else:
        torch.set_num_threads(1 if setting == "one thread" else 2)
        actual = products()
    for one, other in zip(actual, expected, strict=True):
        assert_same_values(one, other)


def test_samples_at_a_time_change_nothing(rng, monkeypatch):
    """grad_weight with a scale for each sample works in chunks of samples, to bound its memory."""
    for geometry, x_shape, _, g_shape in layers(rng, linear_only=False, cases=6):
        g = oracle_products.random_operand(rng, Format("uint", 4, "N", True), g_shape, 0.7).q
        x = oracle_products.random_operand(rng, Format("uint", 3, "", True), x_shape).q
        expected = reference.grad_weight(g, x, geometry)
        for elements in (1, 2 * math.prod(x_shape[1:])):
            monkeypatch.setattr(products, "_BLOCK_ELEMENTS", elements)
            assert_same_values(reference.grad_weight(g, x, geometry), expected)


# --- nothing, and what is not a number -------------------------------------------------------------------------------

IMAGE = Geometry(3, 4, (3, 2), (2, 1), (1, 0, 2, 0), (1, 2), 2)


@pytest.mark.parametrize("geometry", [None, IMAGE], ids=["linear", "conv"])
def test_an_empty_batch(geometry, rng):
    positions = math.prod(geometry.output_size) if geometry else 12
    taps, inputs = (6, 2) if geometry else (1, 4)
    for g_axes, prune in (("N", None), ("N", 0.5), ("C", None), ("C", 0.5), ("NC", None), ("", None)):
        for offset in (True, False):
            x = oracle_products.random_operand(rng, Format("uint", 3, "", offset), (0, 12, 4)).q
            w = oracle_products.random_operand(rng, Format("uint", 3, "", offset), (6, taps, inputs)).q
            g = oracle_products.random_operand(rng, Format("uint", 4, g_axes, offset), (0, positions, 6), prune).q
            assert reference.output(x, w, torch.ones(6), geometry).shape == (0, positions, 6)
            if g_axes in ("", "N"):
                assert reference.grad_input(g, w, None, geometry, (0, 12, 4)).shape == (0, 12, 4)
            assert torch.equal(reference.grad_weight(g, x, geometry), torch.zeros(6, taps, inputs))


@pytest.mark.parametrize("geometry", [None, IMAGE], ids=["linear", "conv"])
def test_a_group_that_is_nan_reaches_just_what_it_touches(geometry, rng):
    positions = math.prod(geometry.output_size) if geometry else 12
    taps, inputs = (6, 2) if geometry else (1, 4)

    def spoiled(q: QTensor, group: int) -> QTensor:
        scale = q.scale.clone()
        scale[group] = torch.nan
        return replace(q, scale=scale)

    g = oracle_products.random_operand(rng, Format("int", 8, "N"), (3, positions, 6)).q
    w = oracle_products.random_operand(rng, Format("int", 8), (6, taps, inputs)).q
    x = oracle_products.random_operand(rng, Format("int", 8), (3, 12, 4)).q
    grad = reference.grad_input(spoiled(g, 1), w, None, geometry, (3, 12, 4))
    assert bool(grad[1].isnan().all())
    assert bool(grad[[0, 2]].isfinite().all())
    g_channel = oracle_products.random_operand(rng, Format("int", 8, "C"), (3, positions, 6)).q
    grad = reference.grad_weight(spoiled(g_channel, 4), x, geometry)
    assert bool(grad[4].isnan().all())
    assert bool(grad[[0, 1, 2, 3, 5]].isfinite().all())
    assert bool(reference.grad_weight(spoiled(g, 1), x, geometry).isnan().all())
    assert bool(reference.output(spoiled(x, 0), w, None, geometry).isnan().all())


# --- unbiased --------------------------------------------------------------------------------------------------------

STOCHASTIC = {
    "psq": ("psq", {"bits": 2}),
    "psq by channel": ("psq", {"bits": 2, "granularity": "channel"}),
    "psq by block": ("psq", {"bits": 2, "granularity": "sample_channel"}),
    "agp": ("agp", {"bits": 2}),
    "agp by channel": ("agp", {"bits": 2, "granularity": "channel"}),
    "agp by block": ("agp", {"bits": 4, "granularity": "sample_channel"}),
    "dorefa": ("dorefa_gradient", {"bits": 2}),
    "int8": ("uniform", {"bits": 3, "granularity": "sample", "stochastic": True}),
}


@pytest.mark.parametrize("geometry", [None, Geometry(3, 3, (2, 3), (1, 1), (1, 0, 1, 1), (1, 1), 2)], ids=["linear", "conv"])
@pytest.mark.parametrize("method", STOCHASTIC)
@pytest.mark.every(2)
def test_the_gradients_of_stochastic_codes_are_unbiased(method, geometry, rng):
    """E grad_input(Q(g)) = grad_input(g), and so for grad_weight: z-tests over keys, false alarm 1e-6 a test.

    A key serves several copies of the samples, whose groups draw for themselves. The variance is the sample's.
    """
    keys, copies = 150, 16
    positions = math.prod(geometry.output_size) if geometry else 3
    taps, inputs = (6, 3) if geometry else (1, 6)
    size = np.exp(rng.normal(size=(4, 1, 1)) + rng.normal(size=(1, 1, 4)))
    g = torch.from_numpy((rng.normal(size=(4, positions, 4)) * size).astype(np.float32))
    x = oracle_products.random_operand(rng, Format("uint", 2, "", True), (4, 9 if geometry else 3, 6))
    w = oracle_products.random_operand(rng, Format("sign", 1), (4, taps, inputs))
    x_shape = (4 * copies, *x.codes.shape[1:])
    x_copies = replace(x.q, codes=x.q.codes.repeat(copies, 1, 1), shape=x_shape)
    name, options = STOCHASTIC[method]
    quantizer = build(name, "g", **options)
    assert quantizer is not None
    exact, x_values, w_values = (v.astype(np.float64) for v in (g.numpy(), x.values, w.values))
    expected = {"grad_weight": oracle_products.accumulate_grad_weight(exact, x_values, geometry, w.codes.shape).sum(0)}
    if quantizer.granularity == "sample":
        expected["grad_input"] = oracle_products.accumulate_grad_input(exact, w_values, geometry, x.codes.shape)
    got = {product: np.zeros((keys, *value.shape)) for product, value in expected.items()}
    for i, key in enumerate(rng.integers(-(2**63), 2**63, keys)):
        q, _ = quantize(g.repeat(copies, 1, 1), quantizer, "g", key=torch.tensor(int(key)), stream=8)
        got["grad_weight"][i] = reference.grad_weight(q, x_copies, geometry).double().numpy() / copies
        if "grad_input" in got:
            grad = reference.grad_input(q, w.q, None, geometry, x_shape)
            got["grad_input"][i] = grad.double().view(copies, *x.codes.shape).mean(0).numpy()
    for product, values in got.items():
        assert values.var(0).max() > 0, product
        slack = np.abs(values).max() * 2.0**-20
        oracle.assert_mean(values.sum(0), keys, expected[product], values.var(0), slack=slack, independent=False)


def test_the_output_of_stochastic_codes_is_unbiased(rng):
    """Both operands drawn, in streams of their own: independent, so the product of the means is the mean."""
    draws = 400
    x, w = (torch.from_numpy(rng.normal(size=s).astype(np.float32)) for s in ((3, 2, 5), (4, 1, 5)))
    quantizer = build("affine", "x", bits=2, stochastic=True)
    assert quantizer is not None
    got = np.zeros((draws, 3, 2, 4))
    for draw, key in enumerate(rng.integers(-(2**63), 2**63, draws)):
        x_q, _ = quantize(x, quantizer, "x", key=torch.tensor(int(key)), stream=0)
        w_q, _ = quantize(w, quantizer, "w", key=torch.tensor(int(key)), stream=2)
        got[draw] = reference.output(x_q, w_q, None, None).numpy()
    expected = x.double().numpy() @ w[:, 0].double().numpy().T
    oracle.assert_mean(got.sum(0), draws, expected, got.var(0), slack=1e-5, independent=False)


def test_topk_is_measurably_biased(rng):
    """The z-test above can fail: what the paper's code does is not unbiased."""
    draws = 300
    g = torch.from_numpy((rng.normal(size=(8, 3, 4)) * np.exp(rng.normal(size=(8, 1, 1)))).astype(np.float32))
    x = oracle_products.random_operand(rng, Format("sign", 1), (8, 3, 6))
    topk = build("agp", "g", bits=4, mode="topk")
    assert topk is not None
    got = np.zeros((draws, 4, 1, 6))
    for draw in range(draws):
        got[draw] = reference.grad_weight(quantize(g, topk, "g", key=torch.tensor(draw))[0], x.q, None).numpy()
    expected = oracle_products.accumulate_grad_weight(g.double().numpy(), x.values.astype(np.float64), None, (4, 1, 6)).sum(0)
    with pytest.raises(AssertionError, match="biased"):
        oracle.assert_mean(got.sum(0), draws, expected, got.var(0), slack=1e-5, independent=False)


@pytest.mark.parametrize("stride", [(1, 1), (1, 3), (3, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_weight_gradient_of_a_1x1_window_stays_within_its_memory(stride, groups):
    """torch 2.14's convolution_backward corrupts the heap for 1x1 windows with stride (1, 3) on AVX-512."""
    torch.set_num_threads(2)
    for samples, channels, outputs in itertools.product((1, 2, 5), (8, 16), (2, 6)):
        geometry = Geometry(11, 7, (1, 1), stride, (1, 0, 2, 0), (1, 1), groups)
        positions = geometry.output_size[0] * geometry.output_size[1]
        g, x = torch.randn(samples, positions, outputs), torch.randn(samples, 77, channels)
        whole = multiply.multiply_grad_weight(g, x, geometry)
        parts = multiply.multiply_grad_weight_of_samples(g, x, geometry).sum(0)
        torch.testing.assert_close(whole, parts)
