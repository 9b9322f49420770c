"""Calibrating and encoding on a CPU, each by itself, equal the reference bit for bit on every instruction set."""

import itertools
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from fqt import reference
from fqt.cpu import codes, library
from fqt.cpu.rows import ROWS
from fqt.formats import Format, Shape3
from fqt.qtensor import QTensor, Scales
from fqt.rows import Request
from fqt.testing import assert_same_codes, assert_same_values
from tests.fqt.helpers import effort
from tests.fqt.random_cases import FILLS, LAYOUTS, QUANTIZE_SIZES, tensor

pytestmark = pytest.mark.skipif(library.refuses() is not None, reason="the C++ kernels are not built")

AXES = ("", "N", "O", "NP", "C", "NC")
GRIDS = (
    Format("sign", 1),
    Format("ternary", 2),
    *(Format("int", bits) for bits in (2, 3, 4, 7, 8, 9, 13, 16)),
    *(Format("uint", bits, offset=offset) for bits in (1, 2, 3, 4, 5, 8, 9, 16) for offset in (False, True)),
    *(Format("fixed", bits) for bits in (1, 2, 4, 8, 9, 16, 17, 24, 25, 31, 32)),
)
FORMATS = [Format(f.grid, f.bits, axes, f.offset) for f, axes in itertools.product(GRIDS, AXES)]
KINDS = ("normal", "powers of two", "NaN", "zero", "infinite", "tiny", "negative")


@pytest.fixture(params=(0, 1, 2))
def instruction_set(request: pytest.FixtureRequest):
    """The kernels limited to the portable, the second or the third instruction set, where this machine has it."""
    limit = library.operators().limit_isa
    best = limit(2)
    try:
        if limit(request.param) != request.param:
            pytest.skip(f"this machine has {best + 1} instruction sets")
        yield
    finally:
        limit(2)


def drawn_tensor(draw: random.Random, generator: torch.Generator) -> Tensor:
    while True:
        shape = (draw.choice((0, 1, 2, 5, 16, 33)), draw.choice(QUANTIZE_SIZES), draw.choice(QUANTIZE_SIZES))
        if shape[0] * shape[1] * shape[2] <= 30_000:
            return tensor(shape, draw.choice(FILLS), draw.choice(LAYOUTS), generator)


def drawn_fold(draw: random.Random, shape: Shape3, generator: torch.Generator) -> Tensor | None:
    n, p, c = shape
    fold_shape = draw.choice([None, None, None, (1, 1, c), (n, 1, 1), (n, p, 1), (n, p, c), (), (c,)])
    return None if fold_shape is None else torch.randn(fold_shape, generator=generator)


def drawn_calibration(draw: random.Random, x: Tensor, fold: Tensor | None, format: Format, generator: torch.Generator) -> dict:
    """Random keywords of `reference.calibrate`."""
    kinds = ["absmax", "minmax", "none"] + ["absmean"] * (format.grid in ("sign", "ternary"))
    options = {
        "calibrate": draw.choice(kinds),
        "limits": draw.choice([(-1.0, 1.0), (-0.75, 0.25), (-4.0, 3.9375), (-1e-3, 1e3)]),
        "prune": draw.choice(["", "", "bernoulli", "topk"]),
        "keep_one_in": draw.choice((1, 2, 4, 8)),
        "key": torch.randint(-(2**63), 2**63 - 1, (), generator=generator),
        "stream": draw.randrange(0, 16, 2),
    }
    if draw.random() < 0.3:
        options["ranges"] = reference.group_range(reference.group_rows(x.float() if fold is None else x.float() * fold, format))
    return options


def drawn_values(draw: random.Random, count: int, generator: torch.Generator) -> Tensor:
    """Factors or offsets that no calibration need have made; those of a kind, or of all kinds side by side."""
    kinds = {
        "normal": torch.randn(count, generator=generator),
        "powers of two": torch.randint(-20, 20, (count,), generator=generator).float().exp2(),
        "NaN": torch.where(torch.rand(count, generator=generator) < 0.5, torch.nan, 1.5),
        "zero": torch.where(torch.rand(count, generator=generator) < 0.5, 0.0, -0.0),
        "infinite": torch.where(torch.rand(count, generator=generator) < 0.5, torch.inf, -torch.inf),
        "tiny": torch.randn(count, generator=generator) * 1e-38,
        "negative": -torch.rand(count, generator=generator) * 100,
    }
    if draw.random() < 0.5:
        return kinds[draw.choice(KINDS)]
    which = torch.randint(len(KINDS), (count,), generator=generator)
    return torch.stack([kinds[kind] for kind in KINDS])[which, torch.arange(count)]


def drawn_scales(draw: random.Random, rows_GE: Tensor, format: Format, generator: torch.Generator) -> Scales:
    """Scales from outside: each tensor of any values, at times not contiguous, at times with groups left out.

    A calibration gives scale NaN to a group in which something has no code; what a NaN becomes elsewhere is not specified.
    """
    groups = rows_GE.shape[0]
    scale, inverse, offset = (drawn_values(draw, groups, generator) for _ in range(3))
    shifted = rows_GE - offset.unsqueeze(1) if format.offset else rows_GE
    scale = torch.where((shifted * inverse.unsqueeze(1)).isnan().any(1), torch.nan, scale)
    factor = index = None
    if draw.random() < 0.3:
        keep = torch.rand(groups, generator=generator) < draw.choice((0.0, 0.3, 0.7, 1.0))
        factor = torch.where(keep, torch.rand(groups, generator=generator) + 0.5, 0.0)
        index = torch.full((groups,), -1, dtype=torch.int32)
        index[: int(keep.sum())] = keep.nonzero()[:, 0].int()
    if draw.random() < 0.2:
        scale, inverse, offset = torch.stack([scale, inverse, offset], 1).unbind(1)
    return Scales(scale, inverse, offset if format.offset else None, factor, index)


@pytest.mark.usefixtures("instruction_set", "poisoned_memory")
def test_calibrate_equals_the_reference(rng: np.random.Generator):
    """Random formats, tensors, folds, calibrations, given ranges, pruning and thread counts, 250 an instruction set."""
    draw, generator = random.Random(int(rng.integers(2**62))), torch.Generator().manual_seed(int(rng.integers(2**62)))
    for _ in range(effort(250)):
        x, format = drawn_tensor(draw, generator), draw.choice(FORMATS)
        fold = drawn_fold(draw, (x.shape[0], x.shape[1], x.shape[2]), generator)
        options = drawn_calibration(draw, x, fold, format, generator)
        torch.set_num_threads(draw.choice((1, 1, 1, 2, 3, 8)))
        actual = codes.calibrate(x, format, fold=fold, **options)
        expected = reference.calibrate(x, format, fold=fold, **options)
        try:
            for name in ("scale", "inverse", "offset", "factor", "index"):
                one, other = getattr(actual, name), getattr(expected, name)
                assert (one is None) == (other is None), name
                if one is not None:
                    assert_same_values(one, other)
        except AssertionError as error:
            error.add_note(f"{format.name} of {tuple(x.shape)} {x.stride()} {x.dtype}, fold {fold is not None}, {options}")
            raise


@pytest.mark.usefixtures("instruction_set", "poisoned_memory")
def test_encode_equals_the_reference(rng: np.random.Generator):
    """By scales that the reference calibrated, and by scales from outside; nearest and stochastic; 350 an instruction set."""
    draw, generator = random.Random(int(rng.integers(2**62))), torch.Generator().manual_seed(int(rng.integers(2**62)))
    for _ in range(effort(350)):
        x, format = drawn_tensor(draw, generator), draw.choice(FORMATS)
        shape = (x.shape[0], x.shape[1], x.shape[2])
        fold = drawn_fold(draw, shape, generator)
        if draw.random() < 0.5:
            scales = reference.calibrate(x, format, fold=fold, **drawn_calibration(draw, x, fold, format, generator))
        else:
            rows_GE = reference.group_rows(x.float() if fold is None else x.float() * fold, format)
            scales = drawn_scales(draw, rows_GE, format, generator)
        key = draw.choice((None, torch.randint(-(2**63), 2**63 - 1, (), generator=generator)))
        options = {"fold": fold, "key": key, "stream": draw.randrange(0, 16, 2)}
        torch.set_num_threads(draw.choice((1, 1, 1, 2, 3, 8)))
        actual, expected = codes.encode(x, scales, format, **options), reference.encode(x, scales, format, **options)
        ones = torch.ones(format.groups(shape))
        offset = ones if format.offset else None
        try:
            assert_same_codes(*(QTensor(made, ones, offset, None, format, shape) for made in (actual, expected)))
        except AssertionError as error:
            error.add_note(f"{format.name} of {shape} {x.stride()} {x.dtype}, {scales}, {options}")
            raise


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("shape", [(3, 5000, 33), (2, 1100, 72), (700, 3, 17), (1, 1, 9001), (40, 9, 64)], ids=str)
@pytest.mark.every(2)
def test_tensors_that_are_cut_equal_the_reference(shape: Shape3):
    """Into tasks, long rows, tiles and threads; calibrated and encoded in two steps, which are also the two in one."""
    generator = torch.Generator().manual_seed(sum(shape))
    for layout, axes, threads in itertools.product(("contiguous", "channels_first"), ("", "N", "NP", "C", "NC"), (1, 3)):
        torch.set_num_threads(threads)
        x, format, key = tensor(shape, "normal", layout, generator), Format("uint", 3, axes, True), torch.tensor(-7)
        given = {"calibrate": "minmax", "prune": "bernoulli", "keep_one_in": 2, "key": key, "stream": 2}
        scales = codes.calibrate(x, format, **given)
        assert_same_values(scales.scale, reference.calibrate(x, format, **given).scale)
        encoded = scales.of(codes.encode(x, scales, format, key=key, stream=2), format, shape)
        assert_same_codes(encoded, reference.quantize(x, format, stochastic=True, **given)[0])
        assert_same_codes(encoded, codes.quantize(x, format, stochastic=True, **given)[0])


@pytest.mark.usefixtures("instruction_set")
def test_what_cannot_be_encoded_has_bits_zero():
    """Scale NaN, or factor 0: no bit is set, whatever the values, and other groups draw as if it were not there."""
    x, key = torch.full((3, 1, 4), 0.7), torch.tensor(11)
    ones = torch.ones(3)
    for format in (Format("uint", 4, "N"), Format("sign", 1, "N"), Format("fixed", 12, "N"), Format("fixed", 32, "N")):
        whole = codes.encode(x, Scales(ones, ones * 7), format, key=key)
        spoilt = codes.encode(x, Scales(torch.tensor([1.0, torch.nan, 1.0]), ones * 7), format, key=key)
        index = torch.tensor([0, 2, -1], dtype=torch.int32)
        pruned = codes.encode(x, Scales(ones, ones * 7, None, torch.tensor([2.0, 0.0, 2.0]), index), format, key=key)
        for made in (spoilt, pruned):
            assert not made[1].any()
            assert torch.equal(made[[0, 2]], whole[[0, 2]]) and bool(whole[1].any())


def test_blocks_and_small_floats_are_refused_by_name():
    for row in (row for row in ROWS if row.operator in ("calibrate", "encode")):
        for name in ("int4:NP/32", "e4m3"):
            format = Format.parse(name)
            reason = row.refuses(Request("cpu", (format,)))
            assert reason is not None and name in reason, reason
        assert row.refuses(Request("cpu", (Format("fixed", 32, "NC"),))) is None
