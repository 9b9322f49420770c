"""Every row of the table of kernels that this machine supports equals the reference, bit for bit."""

import itertools
import math
import platform
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fqt import ops, reference
from fqt.cpu import integers, library, signs
from fqt.formats import Format, Shape3
from fqt.geometry import Geometry
from fqt.ops import KERNELS, PRODUCTS, Kernel, Request
from fqt.qtensor import QTensor, codes_dtype
from fqt.quantizers import build, quantize
from fqt.reference import pack
from fqt.rows import Serves
from fqt.testing import assert_same_codes, assert_same_scales, assert_same_values
from tests.fqt.helpers import effort
from tests.fqt.random_cases import (
    FILLS,
    LAYOUTS,
    QUANTIZE_SIZES,
    built_in,
    calibration_options,
    coded,
    layer,
    quantize_options,
    scales,
    tensor,
)

QUANTIZE = [row for row in KERNELS if row.operator == "quantize" and row.device == "cpu"]
CALIBRATE = [row for row in KERNELS if row.operator == "calibrate" and row.device == "cpu"]
ENCODE = [row for row in KERNELS if row.operator == "encode" and row.device == "cpu"]
DECODE = [row for row in KERNELS if row.operator == "decode" and row.device == "cpu"]
MULTIPLY = [row for row in KERNELS if row.operator in PRODUCTS and row.device == "cpu"]
INSTRUCTION_SETS = ("portable", "neon") if platform.machine() in ("aarch64", "arm64") else ("portable", "avx2", "avx512")


@pytest.fixture
def instruction_set(request: pytest.FixtureRequest):
    """The kernels limited to one instruction set, where they are built and the machine has it."""
    reason = library.refuses()
    if reason is not None:
        pytest.skip(reason)
    level = INSTRUCTION_SETS.index(request.param)
    limit = library.operators().limit_isa
    try:
        if limit(level) != level:
            pytest.skip(f"this machine has no {request.param}")
        yield
    finally:
        limit(len(INSTRUCTION_SETS) - 1)


def seeded(rng: np.random.Generator) -> tuple[random.Random, torch.Generator]:
    """Python's and torch's generators, by the test's own."""
    return random.Random(int(rng.integers(2**62))), torch.Generator().manual_seed(int(rng.integers(2**62)))


@contextmanager
def told(x: Tensor, format: Format, options: dict) -> Iterator[None]:
    """Adds what was asked to an error."""
    try:
        yield
    except AssertionError as error:
        threads = torch.get_num_threads()
        error.add_note(f"{format.name}, {tuple(x.shape)} {x.stride()} {x.dtype}, {threads} threads, {options}")
        raise


def quantizer_cases(
    row: Kernel, count: int, draw: random.Random, generator: torch.Generator
) -> Iterator[tuple[Tensor, Format, dict]]:
    """Tensors, formats and keywords of `reference.quantize` for quantizers whose formats a row serves."""
    quantizers = [(quantizer, quantizer.format(operand)) for operand, quantizer in built_in()]
    quantizers = [(quantizer, format) for quantizer, format in quantizers if row.refuses(Request("cpu", (format,))) is None]
    while count:
        quantizer, format = draw.choice(quantizers)
        shape = (draw.choice((0, 1, 2, 5, 16, 33)), draw.choice(QUANTIZE_SIZES), draw.choice(QUANTIZE_SIZES))
        if math.prod(shape) <= 60_000:
            x = tensor(shape, draw.choice(FILLS), draw.choice(LAYOUTS), generator)
            yield x, format, quantize_options(draw, generator, quantizer, x, format)
            count -= 1


def assert_quantizes_as_the_reference(row: Kernel, x: Tensor, format: Format, options: dict) -> None:
    actual, actual_mask = ops.load(row.function)(x, format, **options)
    expected, expected_mask = reference.quantize(x, format, **options)
    with told(x, format, options):
        assert_same_codes(actual, expected)
        assert (actual_mask is None) == (expected_mask is None)
        assert expected_mask is None or torch.equal(actual_mask, expected_mask), "masks differ"


@pytest.mark.every(2)
@pytest.mark.parametrize("part", range(10))
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("row", QUANTIZE, ids=lambda row: row.label)
@pytest.mark.usefixtures("instruction_set", "poisoned_memory")
def test_quantize_equals_the_reference(row: Kernel, part: int, rng: np.random.Generator):
    """Random quantizers, sizes, values, layouts, folds, masks, given ranges and thread counts, 450 an instruction set."""
    draw, generator = seeded(rng)
    for x, format, options in quantizer_cases(row, effort(30), draw, generator):
        torch.set_num_threads(draw.choice((1, 1, 1, 1, 2, 3, 8)))
        assert_quantizes_as_the_reference(row, x, format, options)


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("row", CALIBRATE, ids=lambda row: row.label)
@pytest.mark.usefixtures("instruction_set", "poisoned_memory")
def test_calibrate_equals_the_reference(row: Kernel, part: int, rng: np.random.Generator):
    """The cases of quantizing, 160 an instruction set: scales, inverses, offsets, factors and the kept groups."""
    draw, generator = seeded(rng)
    for x, format, options in quantizer_cases(row, effort(40), draw, generator):
        torch.set_num_threads(draw.choice((1, 1, 1, 1, 2, 3, 8)))
        asked = calibration_options(options)
        with told(x, format, asked):
            assert_same_scales(ops.load(row.function)(x, format, **asked), reference.calibrate(x, format, **asked))


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("row", ENCODE, ids=lambda row: row.label)
@pytest.mark.usefixtures("instruction_set", "poisoned_memory")
def test_encode_equals_the_reference(row: Kernel, part: int, rng: np.random.Generator):
    """By the scales of a built-in calibration, and by such as none makes, 240 an instruction set."""
    draw, generator = seeded(rng)
    for x, format, options in quantizer_cases(row, effort(60), draw, generator):
        torch.set_num_threads(draw.choice((1, 1, 1, 1, 2, 3, 8)))
        if draw.random() < 0.5:
            given = reference.calibrate(x, format, **calibration_options(options))
        else:
            given = scales(x, format, options["fold"], draw, generator)
        asked = {"fold": options["fold"], "key": options["key"] if options["stochastic"] else None, "stream": options["stream"]}
        with told(x, format, {**asked, "scales": given}):
            actual = ops.load(row.function)(x, given, format, **asked)
            shape = (x.shape[0], x.shape[1], x.shape[2])
            expected = given.of(reference.encode(x, given, format, **asked), format, shape)
            assert_same_codes(given.of(actual, format, shape), expected)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("row", QUANTIZE, ids=lambda row: row.label)
@pytest.mark.parametrize("shape", [(3, 5000, 33), (2, 1100, 72), (700, 3, 17), (1, 1, 9001), (40, 9, 64)], ids=str)
@pytest.mark.usefixtures("instruction_set")
@pytest.mark.every(2)
def test_quantize_equals_the_reference_across_chunks_and_threads(row: Kernel, shape: Shape3, rng: np.random.Generator):
    """Tensors that are cut: into tasks, long rows, tiles, batches of images, parts of a sum."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    for layout in ("contiguous", "channels_first"):
        x = tensor(shape, "normal", layout, generator)
        for threads, granularity in itertools.product((1, 3), ("tensor", "sample", "token", "channel", "sample_channel")):
            torch.set_num_threads(threads)
            format = build("psq", "g", bits=3, granularity=granularity).format("g")  # type: ignore[union-attr]
            options = {"calibrate": "minmax", "stochastic": True, "key": torch.tensor(-7), "stream": 2}
            assert_quantizes_as_the_reference(row, x, format, options)
            sign = Format("sign", 1, format.axes)
            assert_quantizes_as_the_reference(row, x, sign, {"calibrate": "absmean", "pass_range": (-1.0, 1.0)})
        x[-1, -1, -1] = float("nan")
        assert_quantizes_as_the_reference(row, x, Format("sign", 1), {"calibrate": "none"})


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.usefixtures("instruction_set")
def test_pruning_of_many_groups_equals_the_reference(rng: np.random.Generator):
    """Equal ranges, a few wide ones, ranges of 0 and such that are not finite; 1 group and thousands."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    for groups, mode, b in itertools.product((1, 2, 7, 64, 3000), ("bernoulli", "topk"), (2, 4, 8)):
        for kind in ("heavy tails", "equal", "zeros", "infinite"):
            x = torch.randn(groups, 2, 5, generator=generator)
            if kind == "heavy tails":
                x = x * torch.randn(groups, 1, 1, generator=generator).mul(3).exp()
            elif kind == "equal":
                x = torch.ones_like(x)
            elif kind == "zeros":
                x[: groups // 2] = 0.0
            else:
                x[:: groups // 3 + 1] = float("inf")
            options = {"calibrate": "minmax", "prune": mode, "keep_one_in": b, "key": torch.tensor(groups), "stream": 4}
            assert_quantizes_as_the_reference(QUANTIZE[0], x, Format("uint", 4, "N", True), options)


def test_ranges_are_given_for_each_group():
    x, psq = torch.randn(2, 3, 4), build("psq", "g", bits=4)
    assert psq is not None
    low, high = x.amin((1, 2)), x.amax((1, 2))
    key = torch.tensor(3)
    assert_same_codes(quantize(x, psq, "g", key=key, ranges=(low, high))[0], quantize(x, psq, "g", key=key)[0])
    fold = torch.tensor(-2.0)
    assert_same_codes(
        quantize(x, psq, "g", key=key, ranges=(high * fold, low * fold), fold=fold)[0],
        quantize(x, psq, "g", key=key, fold=fold)[0],
    )
    with pytest.raises(
        ValueError, match=r"smallest values are torch.float32 of shape \(1,\), expected float32 of shape \(2,\)"
    ):
        quantize(x, psq, "g", key=key, ranges=(low[:1], high))
    with pytest.raises(ValueError, match="largest values are torch.float64"):
        quantize(x, psq, "g", key=key, ranges=(low, high.double()))


def test_a_key_is_needed_to_draw():
    for quantizer in (build("psq", "g", bits=4), build("agp", "g", bits=4)):
        assert quantizer is not None
        with pytest.raises(ValueError, match="draws random numbers: give it a key"):
            quantize(torch.randn(2, 3, 4), quantizer, "g")


# --- products --------------------------------------------------------------------------------------------------------


@pytest.mark.every(2)
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("row", MULTIPLY, ids=lambda row: f"{row.operator}-{row.label}")
@pytest.mark.usefixtures("instruction_set", "poisoned_memory")
def test_products_equal_the_reference(row: Kernel, part: int, rng: np.random.Generator):
    """Random layers, formats, pruning, masks, biases and thread counts, 60 an instruction set."""
    draw, generator = seeded(rng)
    for _ in range(effort(15)):
        x_shape, w_shape, g_shape, geometry = layer(draw)
        assert isinstance(row.refuses, Serves), "its formats are drawn from what it serves"
        left, right = row.refuses.draw(draw, geometry)
        pruned = draw.random() < 0.4
        torch.set_num_threads(draw.choice((1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 8)))
        if row.operator == "output":
            bias = draw.choice((None, torch.randn(w_shape[0], generator=generator)))
            args = (coded(left, x_shape, draw, generator), coded(right, w_shape, draw, generator), bias, geometry)
        elif row.operator == "grad_input":
            mask_shape = Format("sign", 1).packed_shape(x_shape)
            mask = draw.choice((None, torch.randint(256, mask_shape, generator=generator, dtype=torch.uint8)))
            w = coded(right, w_shape, draw, generator)
            args = (coded(left, g_shape, draw, generator, pruned), w, mask, geometry, x_shape)
        else:
            args = (coded(left, g_shape, draw, generator, pruned), coded(right, x_shape, draw, generator), geometry)
        actual = ops.load(row.function)(*args)
        try:
            assert_same_values(actual, getattr(reference, row.operator)(*args))
        except AssertionError as error:
            error.add_note(f"{left.name} x {right.name}, {g_shape}, {w_shape}, {geometry}, {torch.get_num_threads()} threads")
            raise


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("row", DECODE, ids=lambda row: row.label)
@pytest.mark.usefixtures("instruction_set", "poisoned_memory")
def test_decode_equals_the_reference(row: Kernel, part: int, rng: np.random.Generator):
    """Random formats, granularities, sizes and thread counts, 240 an instruction set."""
    draw, generator = seeded(rng)
    assert isinstance(row.refuses, Serves), "its formats are drawn from what it serves"
    for _ in range(effort(60)):
        (format,) = row.refuses.draw(draw)
        shape = (draw.choice((0, 1, 2, 5, 33)), draw.choice(QUANTIZE_SIZES), draw.choice(QUANTIZE_SIZES))
        shape = draw.choice((shape, shape, shape, (3, 700, 33), (1, 1, 40_000)))
        torch.set_num_threads(draw.choice((1, 1, 3)))
        q = coded(format, shape, draw, generator)
        try:
            assert_same_values(ops.load(row.function)(q), reference.decode(q))
        except AssertionError as error:
            error.add_note(f"{format.name}, {shape}")
            raise


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_narrow_sums_do_not_overflow(bits: int):
    """The largest codes under signs that are all +1: entries of 60 to 252, bytes of 240 to 252, 16 bits filled to the last."""
    for terms in (4095, 4096, 4097, 9000):
        largest = torch.full((1, terms), 2**bits - 1, dtype=torch.uint8)
        one = torch.ones(1)
        plus = Format("sign", 1)
        g_format = Format("uint", bits)
        g = QTensor(pack(largest, g_format, (1, 1, terms)), one, None, None, g_format, (1, 1, terms))
        w = QTensor(torch.full((terms, 1, 1), 255, dtype=torch.uint8), one, None, None, plus, (terms, 1, 3))
        grad = signs.grad_input(g, w, None, None, (1, 1, 3))
        assert grad.tolist() == [[[terms * (2**bits - 1.0)] * 3]]
        g = QTensor(pack(largest, g_format, (1, terms, 1)), one, None, None, g_format, (1, terms, 1))
        x = QTensor(torch.full((1, terms, 1), 255, dtype=torch.uint8), one, None, None, plus, (1, terms, 3))
        assert signs.grad_weight(g, x, None).tolist() == [[[terms * (2**bits - 1.0)] * 3]]
        x = QTensor(torch.zeros(1, 1, -(-terms // 8), dtype=torch.uint8), one, None, None, plus, (1, 1, terms))
        w = QTensor(pack(torch.ones(1, terms, dtype=torch.uint8), plus, (1, 1, terms)), one, None, None, plus, (1, 1, terms))
        assert signs.output(x, w, None, None).tolist() == [[[-float(terms)]]]


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize(
    ("left", "right"),
    [("uint8", "uint8"), ("fixed8", "uint8"), ("uint8", "fixed8"), ("fixed8", "fixed8"), ("int8", "int8"), ("uint8", "sign"),
     ("sign", "uint8"), ("uint4", "fixed4"), ("fixed4", "uint4"), ("uint8", "fixed2"), ("uint2", "uint8"), ("int4", "int8"),
     ("fixed16", "fixed16"), ("fixed8", "fixed16"), ("uint8", "fixed16"), ("fixed16", "uint8"), ("fixed16", "fixed14"),
     ("fixed14", "fixed15"), ("fixed15", "fixed14"), ("sign", "fixed16"), ("fixed9", "fixed10")],
)  # fmt: skip
@pytest.mark.every(3)
def test_sums_of_integers_do_not_overflow(left: str, right: str):
    """Extreme codes, all of one sign: about the terms that 16 bits, 32 bits of bytes and 32 bits of codes hold, and beyond."""

    def filled(name: str, code: int, shape: Shape3, axes: str = "") -> QTensor:
        format = replace(Format.parse(name), axes=axes)
        stored = (code + 1) // 2 if format.grid == "sign" else code if format.bits > 8 else code % 2**format.storage_bits
        groups = format.groups(shape)
        rows = torch.full((groups, shape[0] * shape[1] * shape[2] // groups), stored, dtype=codes_dtype(format))
        return QTensor(pack(rows, format, shape), torch.ones(groups), None, None, format, shape)

    for terms in (255, 256, 257, 545, 2200, 32767, 32768, 32769, 33026, 65_800, 140_000):
        for a, b in itertools.product(Format.parse(left).code_range, Format.parse(right).code_range):
            expected = float(np.float32(terms * a * b))
            output = integers.output(filled(left, a, (1, 1, terms)), filled(right, b, (1, 1, terms)), None, None)
            assert output.item() == expected, (terms, a, b)
            g, w = filled(left, a, (1, 1, terms)), filled(right, b, (terms, 1, 1))
            assert integers.grad_input(g, w, None, None, (1, 1, 1)).item() == expected, (terms, a, b)
            if Format.parse(left).bits + Format.parse(right).bits > 30:
                continue  # refused
            for axes, shape in (("", (terms, 1, 1)), ("N", (1, terms, 1)), ("C", (1, terms, 1))):
                g, x = filled(left, a, shape, axes), filled(right, b, shape)
                assert integers.grad_weight(g, x, None).item() == expected, (terms, a, b, axes)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.usefixtures("instruction_set")
def test_products_of_integers_equal_the_reference_across_chunks(rng: np.random.Generator):
    """Images larger than what is worked off at a time, and more of them; tokens likewise."""
    draw, generator = seeded(rng)
    for n, size, inputs, outputs, stride in ((9, 40, 5, 18, 1), (1, 150, 3, 5, 1), (3, 70, 4, 66, 2), (70, 9, 70, 3, 1)):
        geometry = Geometry(size, size, (3, 3), (stride, stride), (1, 1, 1, 1), (1, 1), 1)
        out = geometry.output_size[0] ** 2
        x_shape, w_shape, g_shape = (n, size**2, inputs), (outputs, 9, inputs), (n, out, outputs)
        for left, right in (("int8", "int8"), ("uint8+", "uint8+"), ("uint2", "sign")):
            one, other = (Format.parse(name) for name in (left, right))
            x, w = coded(replace(one, axes="N"), x_shape, draw, generator), coded(other, w_shape, draw, generator)
            assert_same_values(integers.output(x, w, None, geometry), reference.output(x, w, None, geometry))
            g = coded(replace(one, axes="N"), g_shape, draw, generator)
            assert_same_values(
                integers.grad_input(g, w, None, geometry, x_shape), reference.grad_input(g, w, None, geometry, x_shape)
            )
            x = coded(other, x_shape, draw, generator)
            for axes in ("C", "NC"):
                g = coded(replace(one, axes=axes), g_shape, draw, generator)
                actual = integers.grad_weight(g, x, geometry)
                assert_same_values(actual, reference.grad_weight(g, x, geometry))


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS[-1:], indirect=True)
@pytest.mark.usefixtures("instruction_set")
def test_sums_over_a_batch_pass_32_bits():
    rows = 8_500_000
    one, codes = torch.ones(1), torch.full((1, rows, 1), 255, dtype=torch.uint8)
    g = QTensor(codes, one, None, None, Format("uint", 8), (1, rows, 1))
    x = QTensor(codes, one, None, None, Format("sign", 1), (1, rows, 1))
    assert rows * 255 > 2**31
    assert signs.grad_weight(g, x, None).item() == float(np.float32(rows * 255))


@pytest.mark.parametrize(
    ("operator", "formats", "convolution", "reason"),
    [
        ("output", ("sign:NP", "sign"), True, "cpu: scales 'NP' of x and '' of w vary"),
        ("output", ("uint9", "sign"), False, "cpu: the kernel multiplies signs by signs, not uint9 by sign"),
        ("output", ("uint9", "sign"), False, "cpu int8: the kernel multiplies integers of at most 8 bits, not uint9 by sign"),
        (
            "output",
            ("fixed17", "sign"),
            False,
            "cpu int16: the kernel multiplies integers of at most 16 bits",
        ),
        ("output", ("uint9", "sign"), False, "those of more than 8 in two's complement, not uint9 by sign"),
        (
            "output",
            ("int8:NP", "int8:O"),
            True,
            "cpu int16: the kernel is for words of more than 8 bits, not int8:NP",
        ),
        ("grad_weight", ("int16", "fixed15"), False, "cpu int16: sums of int16 by fixed15 overflow 32 bits at once"),
        ("output", ("int8", "e4m3"), False, "integers of at most 8 bits, not int8 by e4m3"),
        ("output", ("int8:NP", "int8:O"), True, "cpu int8: scales 'NP' of x and 'O' of w vary"),
        ("grad_input", ("uint9:N", "sign"), False, "cpu: the kernel multiplies unsigned codes of 1 to 8 bits"),
        ("grad_input", ("uint4:C", "sign"), False, "cpu: scales 'C' of g and '' of w vary"),
        ("grad_input", ("uint4:N", "sign:O"), False, "cpu: scales 'N' of g and 'O' of w vary"),
        ("grad_input", ("int8:N", "int8:O"), False, "cpu int8: scales 'N' of g and 'O' of w vary"),
        ("grad_weight", ("uint4:NP", "sign"), False, "cpu: scales 'NP' of g"),
        ("grad_weight", ("int8:NP", "int8"), False, "cpu int8: scales 'NP' of g and '' of x vary"),
    ],
)
def test_products_refuse_with_a_reason(operator: str, formats: tuple[str, str], convolution: bool, reason: str):
    if library.refuses() is not None:
        pytest.skip("the kernels are not built")
    geometry = Geometry(3, 3, (3, 3), (1, 1), (0, 0, 0, 0), (1, 1), 1) if convolution else None
    request = Request("cpu", (Format.parse(formats[0]), Format.parse(formats[1])), geometry)
    kernel, reasons = ops.select(operator, request)
    assert kernel.backend == "reference"
    assert any(reason in text for text in map(str, reasons)), reasons
