"""Launch planning is plain Python: what is served, how tensors lie, tiles, cuts."""

import itertools
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fqt import ops
from fqt.formats import Format
from fqt.geometry import Geometry
from fqt.reference import group_rows
from fqt.triton_kernels import plan
from fqt.triton_kernels.rows import ROWS

WINDOW = Geometry(8, 8, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1)
CHIPS = ((8, 0), (8, 7), (8, 9), (9, 0), (10, 0))


def test_fqt_does_not_load_triton():
    code = "import sys, fqt, fqt.inspect.doctor; fqt.convert; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("axes", ["", "N", "NP", "C", "NC"])
@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 4, 1), (3, 1, 2)])
def test_stored_order_is_the_formats(axes: str, shape: tuple[int, int, int]):
    """Addresses computed from the plan's strides walk a tensor of any layout in the order that the reference stores."""
    format = Format("int", 8, axes)
    x = torch.arange(shape[0] * shape[1] * shape[2]).view(shape[2], shape[0], shape[1]).permute(1, 2, 0)
    lie = plan.stored(format, shape)
    r0, r1, l0, l1 = lie.strides(*x.stride())
    memory = x.permute(2, 0, 1).flatten()
    walked = [
        memory[r // lie.row_split * r0 + r % lie.row_split * r1 + i // lie.split * l0 + i % lie.split * l1].item()
        for r, i in itertools.product(range(lie.rows), range(lie.length))
    ]
    assert walked == group_rows(x, format).flatten().tolist()
    assert lie.rows // lie.group_rows == format.groups(shape)


def test_a_reduction_covers_every_element_once(rng: np.random.Generator):
    draw = random.Random(int(rng.integers(2**62)))
    for _ in range(300):
        shape = tuple(draw.choice((1, 2, 7, 64, 300, 5000)) for _ in range(3))
        lie = plan.stored(Format("int", 8, draw.choice(("", "N", "NP", "C", "NC"))), shape)  # type: ignore[arg-type]
        cut = plan.reduction(lie)
        elements = lie.length if cut.each_row else lie.group_rows
        step = cut.columns if cut.each_row else cut.rows
        assert cut.span % step == 0 and (cut.chunks - 1) * cut.span < elements <= cut.chunks * cut.span
        programs, chunks = cut.grid(lie)
        assert programs * (cut.rows if cut.each_row else lie.group_rows) >= lie.rows and chunks == cut.chunks
        assert cut.columns % 8 == 0 and cut.rows & (cut.rows - 1) == 0


@pytest.mark.parametrize("chip", CHIPS)
def test_tiles_fit_their_chip_and_the_product(chip: tuple[int, int]):
    for m, n, k in itertools.product((1, 16, 64, 100, 512, 16384), repeat=3):
        for turned, holds in itertools.product((False, True), plan.HOLDS):
            t = plan.RULES.tile(m, n, k, chip, turned=turned, holds=holds)
            assert t.bytes <= plan.shared_bytes(chip) and t.k >= 32 and plan.fits_registers(t, chip, turned=turned, holds=holds)
            assert t == plan.TILES[-1] or (t.m < 2 * m and t.n < 2 * n)
    assert plan.RULES.tile(8192, 8192, 8192, (9, 0)) == plan.TILES[0]
    assert plan.shared_bytes((8, 7)) == plan.shared_bytes((8, 0)) < plan.shared_bytes((9, 0))


def test_the_largest_tile_that_gives_every_processor_work():
    assert plan.RULES.tile(1024, 1024, 1024, (9, 0)).m * plan.RULES.tile(1024, 1024, 1024, (9, 0)).n == 64 * 64
    assert plan.RULES.tile(1024, 1024, 1024, (9, 0), programs=8) == plan.RULES.tile(8192, 8192, 1024, (9, 0))


def test_cuts_of_a_sum_cover_it_and_do_not_overflow(rng: np.random.Generator):
    draw = random.Random(int(rng.integers(2**62)))
    formats = [Format("sign", 1), Format("int", 8), Format("uint", 8), Format("uint", 4)]
    for _ in range(500):
        terms, tiles = draw.choice((1, 31, 1000, 10**5, 10**7)), draw.choice((1, 9, 500))
        t, pair = draw.choice(plan.TILES), (draw.choice(formats), draw.choice(formats))
        cut = plan.RULES.split(tiles, terms, t, *pair)
        assert cut.chunk % t.k == 0 and (cut.splits - 1) * cut.chunk < terms <= cut.splits * cut.chunk
        assert plan.bound(cut.chunk, *pair) < plan.WIDE


def test_bounds_hold_while_bytes_are_centred():
    byte = Format("uint", 8)
    assert plan.centre(byte) == 128 and plan.centre(Format("uint", 7)) == plan.centre(Format("int", 8)) == 0
    assert plan.bound(10, byte, Format("sign", 1)) == 10 * 256
    assert plan.bound(10, Format("uint", 4), Format("int", 8)) == 10 * 15 * 127


def test_operands_that_many_tiles_read_are_unpacked_once():
    sign = Format("sign", 1)
    assert not plan.RULES.expands(sign, 2, 1) and plan.RULES.expands(sign, 3, 1) and plan.RULES.expands(sign, 1, 2)
    assert plan.RULES.expands(Format("uint", 8), 1, 1)


def test_samples_are_worked_off_apart_where_tiles_are_few():
    assert plan.RULES.samples_apart(10, 128, 36_864)
    assert not plan.RULES.samples_apart(200, 128, 36_864)
    assert not plan.RULES.samples_apart(10, 1, 36_864)
    assert not plan.RULES.samples_apart(10, 1 << 20, 36_864)


def test_capability_and_processors_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch):
    """A machine may have several kinds of GPUs; rules that a caller hands over stay as they are."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from fqt.triton_kernels import launch

    chips = {0: ((8, 0), 108), 1: ((9, 0), 132)}
    current = [0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: chips[current[0]][0])
    assert plan.refuses_float8() == "8-bit floats need compute capability 8.9"
    current[0] = 1
    assert plan.refuses_float8() is None
    monkeypatch.setattr(launch, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=chips[device][1]))
    launch._usual.cache_clear()
    there = [SimpleNamespace(is_cuda=True, device=index) for index in chips]
    assert [launch.fitted(plan.RULES, like).processors for like in there] == [108, 132]  # type: ignore[arg-type]
    launch._usual.cache_clear()
    mine = plan.Rules(processors=7)
    assert launch.fitted(mine, there[0]) is mine  # type: ignore[arg-type]
    assert launch.fitted(plan.RULES, torch.zeros(1)) is plan.RULES


@pytest.mark.parametrize(
    ("operator", "names", "geometry", "reason"),
    [
        ("output", ("sign", "sign:O"), WINDOW, None),
        ("output", ("sign:NP", "sign"), WINDOW, "scales 'NP' of x and '' of w vary"),
        ("output", ("int9", "sign"), None, "integers of at most 8 bits, not int9 by sign"),
        ("output", ("e4m3", "int8"), None, "integers of at most 8 bits, not e4m3 by int8"),
        ("grad_input", ("uint4+:C", "sign"), None, "scales 'C' of g and '' of w vary"),
        ("grad_weight", ("uint4+:NC", "sign"), WINDOW, None),
        ("grad_weight", ("uint4+:NP", "sign"), None, "scales 'NP' of g and '' of x vary"),
        ("accumulate", ("int8", "sign"), None, "products of signs, not int8 by sign"),
    ],
)
def test_refusals_say_why(operator: str, names: tuple[str, str], geometry: Geometry | None, reason: str | None):
    pytest.importorskip("triton", reason="Triton is not installed")
    formats = (Format.parse(names[0]), Format.parse(names[1]))
    said = next(row for row in ROWS if (row.operator, row.variant) == (operator, "")).refuses(
        ops.Request("cuda", formats, geometry)
    )
    assert said is None if reason is None else said is not None and reason in said
    kernel, reasons = ops.select(operator, ops.Request("cuda", formats, geometry))
    assert (kernel.label == "triton") == (reason is None)
    assert reason is None or any(reason in text for text in map(str, reasons))


def test_float8_is_a_row_of_its_own_that_promises_no_bits(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    request = ops.Request("cuda", (Format("e4m3", 8), Format("e5m2", 8)))
    kernel, _ = ops.select("output", request)
    assert kernel.label == "triton float8" and not kernel.exact
    assert all(row.exact for row in ops.KERNELS if row.label != "triton float8")
    monkeypatch.setattr(plan, "device_capability", lambda: (8, 0))
    kernel, reasons = ops.select("output", request)
    assert kernel.backend == "reference" and "triton float8: 8-bit floats need compute capability 8.9" in map(str, reasons)


def test_without_triton_every_row_refuses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "installed", lambda: False)
    sign = Format("sign", 1)
    for operator, formats in (("quantize", (sign,)), ("output", (sign, sign)), ("norm_sign", ())):
        kernel, reasons = ops.select(operator, ops.Request("cuda", formats))
        assert kernel.backend == "reference" and "triton: Triton is not installed: pip install triton" in map(str, reasons)


def test_codes_of_more_than_16_bits_are_refused():
    reason = ROWS[0].refuses(ops.Request("cuda", (Format("fixed", 17),)))
    assert reason == "the kernel is for codes of at most 16 bits: more need float64 arithmetic, not fixed17"
