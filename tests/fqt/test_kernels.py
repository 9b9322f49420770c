"""Every row of the table of kernels that this machine supports equals the reference, bit for bit."""

import itertools
import platform
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fqt import ops, reference
from fqt.cpu import codes, integers, library, signs
from fqt.formats import Format, Shape3
from fqt.geometry import Geometry
from fqt.ops import KERNELS, PRODUCTS, Kernel, Request
from fqt.qtensor import QTensor, codes_dtype
from fqt.quantizers import Quantizer, build, quantize
from fqt.recipe import LEFT_RIGHT
from fqt.recipe_yaml import load_recipe, recipes
from fqt.reference import pack
from fqt.testing import assert_same_codes, assert_same_values

QUANTIZE = [row for row in KERNELS if row.operator == "quantize" and row.device == "cpu"]
DECODE = [row for row in KERNELS if row.operator == "decode" and row.device == "cpu"]
MULTIPLY = [row for row in KERNELS if row.operator in PRODUCTS and row.device == "cpu"]
INSTRUCTION_SETS = ("portable", "neon") if platform.machine() in ("aarch64", "arm64") else ("portable", "avx2", "avx512")
SIZES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65)
QUANTIZE_SIZES = (0, *SIZES, 32, 127, 128, 129)
FILLS = ("normal", "nan", "inf", "tiny", "constant", "zeros", "huge", "negative zero")
LAYOUTS = ("contiguous", "channels_first", "one position", "one channel", "sliced", "transposed", "part", "bfloat16")


@pytest.fixture
def instruction_set(request: pytest.FixtureRequest):
    """The kernels limited to one instruction set, where they are built and the machine has it."""
    reason = codes.refuses_codes((Format("sign", 1),))
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


def built_in() -> list[tuple[str, Quantizer]]:
    """Each quantizer of each recipe, and each width and granularity of the uniform ones: (operand, quantizer)."""
    found = {
        (letter, quantizer)
        for recipe in map(load_recipe, recipes())
        for product, letters in LEFT_RIGHT.items()
        for letter in letters
        if (quantizer := recipe.quantizer(product, letter)) is not None
    }
    granularities = ("tensor", "sample", "token", "channel", "sample_channel")
    for name, bits, granularity, stochastic in itertools.product(
        ("uniform", "affine"), range(1, 9), granularities, (False, True)
    ):
        if (name, bits) != ("uniform", 1):
            found.add(("g", build(name, "g", bits=bits, granularity=granularity, stochastic=stochastic)))
    for name, bits, granularity, stochastic in itertools.product(
        ("uniform", "affine"), (9, 12, 16), granularities, (False, True)
    ):
        found.add(("g", build(name, "g", bits=bits, granularity=granularity, stochastic=stochastic)))
    for word_length, stochastic in itertools.product((1, 5, 8, 9, 13, 16, 17, 22, 23, 24, 25, 31, 32), (False, True)):
        for fraction_length in (3, word_length - 2):
            x = {"word_length": word_length, "fraction_length": fraction_length, "stochastic": stochastic}
            found.add(("x", build("fixed_point", "x", **x)))
    found.add(("w", build("ternary_weight", "w")))
    return sorted(found, key=str)


def tensor(shape: Shape3, fill: str, layout: str, generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, shape[2], generator=generator) * 3
    if fill in ("nan", "inf") and x.numel():
        x.view(-1)[int(torch.randint(x.numel(), (), generator=generator))] = float(fill)
    x = {"tiny": x * 1e-33, "constant": torch.full_like(x, 0.3), "zeros": torch.zeros_like(x), "huge": x * 2e37}.get(fill, x)
    x = x.clamp(max=0) * -0.0 if fill == "negative zero" else x
    if layout == "channels_first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "one position":
        return x[:, :1].expand(shape)
    if layout == "one channel":
        return x[:, :, :1].expand(shape)
    if layout == "sliced":
        return torch.stack([x, x + 1], 3).flatten(2)[:, :, ::2]
    if layout == "transposed":
        return x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    if layout == "part":
        return torch.cat([x, x + 1], 2)[:, :, : shape[2]]
    return x.bfloat16() if layout == "bfloat16" else x


def assert_quantizes_as_the_reference(row: Kernel, x: Tensor, format: Format, options: dict) -> None:
    actual, actual_mask = ops.load(row.function)(x, format, **options)
    expected, expected_mask = reference.quantize(x, format, **options)
    try:
        assert_same_codes(actual, expected)
        assert (actual_mask is None) == (expected_mask is None)
        assert expected_mask is None or torch.equal(actual_mask, expected_mask), "masks differ"
    except AssertionError as error:
        error.add_note(f"{format.name}, {tuple(x.shape)} {x.stride()} {x.dtype}, {torch.get_num_threads()} threads, {options}")
        raise


def quantize_options(
    draw: random.Random, generator: torch.Generator, quantizer: Quantizer, x: torch.Tensor, format: Format
) -> dict:
    """Random keywords of `reference.quantize` beside the quantizer's own."""
    shape = x.shape
    fold_shape = draw.choice([None, None, (1, 1, shape[2]), (shape[0], 1, 1), (shape[0], shape[1], 1)])
    options = {
        "calibrate": quantizer.calibrate,
        "limits": quantizer.limits,
        "stochastic": quantizer.stochastic,
        "prune": quantizer.prune,
        "keep_one_in": quantizer.keep_one_in,
        "pass_range": draw.choice([None, (-1.0, 1.0), (0.0, 0.5)]),
        "fold": None if fold_shape is None else torch.rand(fold_shape, generator=generator),
        "key": torch.randint(-(2**63), 2**63 - 1, (), generator=generator),
        "stream": draw.randrange(0, 16, 2),
    }
    if draw.random() < 0.3:
        folded = x.float() if fold_shape is None else x.float() * options["fold"]
        options["ranges"] = reference.group_range(reference.group_rows(folded, format))
    return options


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("row", QUANTIZE, ids=lambda row: row.backend)
@pytest.mark.usefixtures("instruction_set", "poisoned_memory")
def test_quantize_equals_the_reference(row: Kernel, rng: np.random.Generator):
    """Random quantizers, sizes, values, layouts, folds, masks, given ranges and thread counts, 1,300 an instruction set."""
    draw = random.Random(int(rng.integers(2**62)))
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    quantizers = [(quantizer, quantizer.format(operand)) for operand, quantizer in built_in()]
    served = 0
    while served < 1300:
        quantizer, format = draw.choice(quantizers)
        shape = (draw.choice((0, 1, 2, 5, 16, 33)), draw.choice(QUANTIZE_SIZES), draw.choice(QUANTIZE_SIZES))
        if row.refuses(Request("cpu", (format,))) is not None or shape[0] * shape[1] * shape[2] > 60_000:
            continue
        x = tensor(shape, draw.choice(FILLS), draw.choice(LAYOUTS), generator)
        options = quantize_options(draw, generator, quantizer, x, format)
        torch.set_num_threads(draw.choice((1, 1, 1, 1, 2, 3, 8)))
        assert_quantizes_as_the_reference(row, x, format, options)
        served += 1


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("row", QUANTIZE, ids=lambda row: row.backend)
@pytest.mark.parametrize("shape", [(3, 5000, 33), (2, 1100, 72), (700, 3, 17), (1, 1, 9001), (40, 9, 64)], ids=str)
@pytest.mark.usefixtures("instruction_set")
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

# formats of the left operand, of the right; {b}: bits
PRODUCT_FORMATS = {
    "output": (("sign", "sign:N", "sign:NP"), ("sign", "sign:O")),
    "grad_input": (("uint{b}+:N", "uint{b}+:N", "uint{b}+", "uint{b}:N", "uint{b}:NP"), ("sign",)),
    "grad_weight": (("uint{b}+:C", "uint{b}+:C", "uint{b}+:NC", "uint{b}+:N", "uint{b}+", "uint{b}:C"), ("sign",)),
}
# axes of the scales of the left operand, of the right
PRODUCT_AXES = {
    "output": (("", "N", "NP"), ("", "O")),
    "grad_input": (("", "N", "N", "NP"), ("",)),
    "grad_weight": (("", "C", "C", "N", "NC"), ("",)),
}
INTEGERS = (
    Format("sign", 1),
    Format("ternary", 2),
    *(Format("int", 8) for _ in range(6)),
    *(Format("int", bits) for bits in range(2, 9)),
    *(Format("uint", bits, "", offset) for bits in range(1, 9) for offset in (False, True)),
    *(Format("fixed", bits) for bits in range(1, 9)),
)
WORDS = tuple(Format(grid, bits) for grid in ("fixed", "int") for bits in (9, 10, 12, 13, 14, 15, 16))


def formats(row: Kernel, draw: random.Random) -> tuple[Format, Format]:
    """Formats of two operands that a row may serve."""
    if row.backend == "cpu":
        names = [draw.choice(choices) for choices in PRODUCT_FORMATS[row.operator]]
        left, right = (Format.parse(name.format(b=draw.choice((4, 4, 4, *range(1, 9))))) for name in names)
        return left, right
    narrow = row.backend == "cpu int8" or draw.random() < 0.3
    pair = [draw.choice(INTEGERS), draw.choice(INTEGERS if narrow else WORDS)]
    if row.backend == "cpu int16":
        pair = draw.sample([draw.choice(WORDS), pair[1]], 2)
    left, right = (
        replace(format, axes=draw.choice(axes)) for format, axes in zip(pair, PRODUCT_AXES[row.operator], strict=True)
    )
    return left, right


def coded(format: Format, shape: Shape3, draw: random.Random, generator: torch.Generator, pruned: bool = False) -> QTensor:
    """A quantized tensor of random codes and scales, now and then NaN; pruned: only some of its groups, at times none, kept."""
    groups = format.groups(shape)
    elements = shape[0] * shape[1] * shape[2] // max(groups, 1)
    low, high = format.code_range
    codes = torch.randint(low, high + 1, (groups, elements), generator=generator)
    if draw.random() < 0.3:
        codes = torch.where(codes < (low + high) / 2, low, high)
    stored = (codes + 1) // 2 if format.grid == "sign" else codes % 2 ** min(format.storage_bits, 8)
    stored = (codes if format.storage_bits > 8 else stored).to(codes_dtype(format))
    scale = torch.rand(groups, generator=generator) + 0.1
    offset = torch.randn(groups, generator=generator) if format.offset else None
    if groups and draw.random() < 0.1:
        scale[draw.randrange(groups)] = float("nan")
    index = None
    if pruned:
        keep = torch.rand(groups, generator=generator) < draw.choice((0.0, 0.3, 0.6, 1.0))
        kept = keep.nonzero().flatten()
        index = torch.full((groups,), -1, dtype=torch.int32)
        index[: kept.numel()] = kept.int()
        scale = torch.where(keep, scale, 0.0)
        offset = None if offset is None else torch.where(keep, offset, 0.0)
    return QTensor(pack(stored, format, shape), scale, offset, index, format, shape)


def layer(draw: random.Random) -> tuple[Shape3, Shape3, Shape3, Geometry | None]:
    """Shapes of x, w and g of a random linear layer or convolution, and its geometry."""
    n = draw.choice((0, 1, 1, 2, 3, 5, 17))
    if draw.random() < 0.3:
        sizes = (0, *SIZES, 127, 128, 129)
        p, i, o = draw.choice((0, 1, 1, 2, 5, 33)), draw.choice(sizes), draw.choice(sizes)
        n, p = draw.choice([(n, p)] * 30 + [(2100, 1), (1, 1500), (40, 33)])
        return (n, p, i), (o, 1, i), (n, p, o), None
    groups = draw.choice((1, 1, 1, 2, 3, 17))
    sizes = SIZES if groups == 1 else (1, 2, 5, 8, 9) if groups < 10 else (1, 2)
    i, o = draw.choice(sizes), draw.choice(sizes)
    while True:
        kernel = draw.choice([(1, 1), (1, 3), (3, 1), (2, 2), (4, 2), (5, 5), *[(3, 3)] * 4])
        geometry = Geometry(
            draw.randint(1, 9),
            draw.randint(1, 9),
            kernel,
            (draw.randint(1, 3), draw.randint(1, 3)),
            (draw.randint(0, 3), draw.randint(0, 3), draw.randint(0, 3), draw.randint(0, 3)),
            (draw.randint(1, 2), draw.randint(1, 3)),
            groups,
        )
        if min(geometry.output_size) > 0:
            break
    pixels, outputs = geometry.height * geometry.width, geometry.output_size[0] * geometry.output_size[1]
    if n * outputs * kernel[0] * kernel[1] * i * o > 5e5:
        n = 1
    return (n, pixels, i * groups), (o * groups, kernel[0] * kernel[1], i), (n, outputs, o * groups), geometry


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("row", MULTIPLY, ids=lambda row: f"{row.operator}-{row.backend}")
@pytest.mark.usefixtures("instruction_set", "poisoned_memory")
def test_products_equal_the_reference(row: Kernel, rng: np.random.Generator):
    """Random layers, formats, pruning, masks, biases and thread counts, 520 an instruction set."""
    draw = random.Random(int(rng.integers(2**62)))
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    served = 0
    while served < 520:
        x_shape, w_shape, g_shape, geometry = layer(draw)
        left, right = formats(row, draw)
        if row.refuses(Request("cpu", (left, right), geometry)) is not None:
            continue
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
        served += 1


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("row", DECODE, ids=lambda row: row.backend)
@pytest.mark.usefixtures("instruction_set", "poisoned_memory")
def test_decode_equals_the_reference(row: Kernel, rng: np.random.Generator):
    """Random formats, granularities, sizes and thread counts."""
    draw = random.Random(int(rng.integers(2**62)))
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    wide = tuple(Format("fixed", bits) for bits in (17, 23, 24, 25, 31, 32))
    for _ in range(600):
        format = replace(draw.choice((*INTEGERS, *WORDS, *wide)), axes=draw.choice(("", "N", "O", "NP", "C", "NC")))
        shape = (draw.choice((0, 1, 2, 5, 33)), draw.choice(QUANTIZE_SIZES), draw.choice(QUANTIZE_SIZES))
        shape = draw.choice((shape, shape, shape, (3, 700, 33), (1, 1, 40_000)))
        assert row.refuses(Request("cpu", (format,))) is None
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
    draw = random.Random(int(rng.integers(2**62)))
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
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
        ("output", ("fixed17", "sign"), False, "cpu int16: the kernel multiplies integers of at most 16 bits, not fixed17"),
        ("output", ("uint9", "sign"), False, "cpu int16: the kernel multiplies 9 to 16 bits in two's complement, not uint9"),
        ("output", ("int8:NP", "int8:O"), True, "cpu int16: the kernel is for words of 9 to 16 bits, not int8:NP by int8:O"),
        ("grad_weight", ("int16", "fixed15"), False, "cpu int16: sums of int16 by fixed15 overflow 32 bits at once: 30 bits"),
        ("output", ("int8", "e4m3"), False, "integers of at most 8 bits, not int8 by e4m3"),
        ("output", ("int8:NP", "int8:O"), True, "cpu int8: scales 'NP' of x and 'O' of w vary"),
        ("grad_input", ("uint9:N", "sign"), False, "cpu: the kernel multiplies unsigned codes of 1 to 8 bits"),
        ("grad_input", ("uint4:C", "sign"), False, "cpu: scales 'C' of g and '' of the other operand vary"),
        ("grad_input", ("uint4:N", "sign:O"), False, "cpu: scales 'N' of g and 'O' of the other operand vary"),
        ("grad_input", ("int8:N", "int8:O"), False, "cpu int8: scales 'N' of g and 'O' of w vary"),
        ("grad_weight", ("uint4:NP", "sign"), False, "cpu: scales 'NP' of g"),
        ("grad_weight", ("int8:NP", "int8"), False, "cpu int8: scales 'NP' of g and '' of x vary"),
    ],
)
def test_products_refuse_with_a_reason(operator: str, formats: tuple[str, str], convolution: bool, reason: str):
    if signs.refuses_output((Format("sign", 1), Format("sign", 1)), None) is not None:
        pytest.skip("the kernels are not built")
    geometry = Geometry(3, 3, (3, 3), (1, 1), (0, 0, 0, 0), (1, 1), 1) if convolution else None
    request = Request("cpu", (Format.parse(formats[0]), Format.parse(formats[1])), geometry)
    kernel, reasons = ops.select(operator, request)
    assert kernel.backend == "reference"
    assert any(reason in text for text in reasons), reasons
