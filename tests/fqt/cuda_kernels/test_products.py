"""The CUDA kernels, run on the emulator of tests/cuda: what they compute equals the reference, bit for bit."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from fqt import reference, selfcheck
from fqt.cuda_kernels import plan, products, runtime
from fqt.formats import Format
from fqt.geometry import Geometry
from fqt.qtensor import QTensor
from fqt.testing import assert_same_values
from tests.fqt.cuda_kernels import machine
from tests.fqt.cuda_kernels.cases import OPERATORS, TILES, case, row
from tests.fqt.helpers import effort
from tests.fqt.random_cases import coded


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory):
    return machine.build(machine.ROOT / "tests/cuda/kernels.cpp", tmp_path_factory.mktemp("cuda") / "kernels.so")


@pytest.fixture
def emulator(library, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> machine.Emulator:
    emulator = machine.Emulator(library, int(rng.integers(2**31)))
    monkeypatch.setattr(runtime, "launch", emulator.launch)
    monkeypatch.setattr(runtime, "of", lambda tensor: emulator.device)
    monkeypatch.setattr(runtime, "refuses", lambda: None)
    return emulator


def assert_multiplies_as_the_reference(operator: str, args: tuple, rules: plan.Rules) -> None:
    try:
        assert_same_values(getattr(products, operator)(*args, rules=rules), getattr(reference, operator)(*args))
    except AssertionError as error:
        a, b, geometry = args[0], args[1], next((v for v in args if isinstance(v, Geometry)), None)
        error.add_note(f"{operator} {a.format.name} {a.shape} x {b.format.name} {b.shape}, {geometry}, index {a.index}")
        raise


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.family}-{tile.rows}x{tile.columns}")
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.every(4)
def test_products_equal_the_reference(operator: str, tile: plan.Tile, emulator: machine.Emulator, rng: np.random.Generator):
    """Random layers, windows, formats, pruning, masks and biases, whose results are smaller than a tile, and ragged."""
    draw = random.Random(int(rng.integers(2**62)))
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    wanted, tried = set() if operator == "grad_weight" else {4, 8}, 0
    while tried < effort(2) or not bytes_at_a_time(emulator) >= wanted:
        assert_multiplies_as_the_reference(operator, case(operator, draw, generator), plan.Rules(tiles=(tile,)))
        tried += 1
    assert {kernel.file for kernel, *_ in emulator.launched if kernel.instance} == {tile.family}


def bytes_at_a_time(emulator: machine.Emulator) -> set[int]:
    """Of the copies of the products that were launched."""
    return {kernel.instance[3] for kernel, *_ in emulator.launched if kernel.instance}


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.family}-{tile.rows}x{tile.columns}")
@pytest.mark.every(2)
def test_many_tiles_and_stages_equal_the_reference(tile: plan.Tile, emulator: machine.Emulator, rng: np.random.Generator):
    """Results of several ragged tiles, sums deeper than the stages, a sum in slices, planes and windows among them."""
    draw = random.Random(int(rng.integers(2**62)))
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    window = Geometry(9, 8, (3, 3), (2, 1), (1, 1, 1, 0), (1, 1), 1)
    outputs = window.output_size[0] * window.output_size[1]
    emulator.device = plan.Device((9, 0), 8, 232_448)
    deep, wide, convolution = (1, 140, 4136), (1, 70, 270), (4, 72, 260)
    for operator, shapes in (
        ("output", (deep, (270, 1, 4136), (1, 140, 270), None)),
        ("grad_input", (wide, (1050, 1, 270), (1, 70, 1050), None)),
        ("grad_weight", ((2, 2100, 33), (65, 1, 33), (2, 2100, 65), None)),
        ("output", (convolution, (70, 9, 260), (4, outputs, 70), window)),
        ("grad_input", (convolution, (70, 9, 260), (4, outputs, 70), window)),
    ):
        assert_multiplies_as_the_reference(operator, case(operator, draw, generator, shapes), plan.Rules(tiles=(tile,)))


def test_the_float_part_of_a_split_sum_comes_once(emulator: machine.Emulator):
    """A long sum of a small result is cut into slices; a scale of its own for each sample cuts it too, within a workspace."""
    emulator.device = plan.Device((8, 0), 64, 232_448)
    draw, generator = random.Random(5), torch.Generator().manual_seed(5)
    x = coded(Format("sign", 1), (3, 12_000, 9), draw, generator)
    for axes, expected in (("C", 4), ("NC", 3)):
        g = coded(Format("uint", 2, axes, True), (3, 12_000, 10), draw, generator)
        emulator.launched.clear()
        assert_same_values(products.grad_weight(g, x, None), reference.grad_weight(g, x, None))
        assert [slices for kernel, _, slices, _ in emulator.launched if kernel.instance] == [expected]


def test_samples_that_exceed_the_workspace_go_by_parts(emulator: machine.Emulator):
    rules = plan.Rules(workspace=3 * 10 * 30 * 4)  # integers of three samples
    draw, generator = random.Random(6), torch.Generator().manual_seed(6)
    geometry = Geometry(4, 5, (3, 1), (1, 1), (1, 1, 0, 0), (1, 1), 1)
    x = coded(Format("sign", 1), (8, 20, 9), draw, generator)
    for axes, pruned in (("NC", False), ("N", False), ("N", True)):
        g = coded(Format("uint", 4, axes, True), (8, 20, 10), draw, generator, pruned)
        emulator.launched.clear()
        assert_same_values(products.grad_weight(g, x, geometry, rules=rules), reference.grad_weight(g, x, geometry))
        assert [slices for kernel, _, slices, _ in emulator.launched if kernel.instance] == [3, 3, 2]


def test_pruned_samples_cost_no_product(emulator: machine.Emulator):
    """Blocks of pruned samples return before they multiply anything."""
    rules = plan.Rules(tiles=(plan.MMA[1],))
    codes = torch.randint(256, (4, 64, 32), dtype=torch.uint8)
    index, scale = torch.tensor([2, -1, -1, -1], dtype=torch.int32), torch.tensor([0.0, 0.0, 0.5, 0.0])
    format = Format("uint", 4, "N")
    g = QTensor(codes, scale, None, index, format, (4, 64, 64))
    w = QTensor(torch.randint(256, (64, 1, 8), dtype=torch.uint8), torch.ones(1), None, None, Format("sign", 1), (64, 1, 64))
    args = (g, w, None, None, (4, 64, 64))
    assert_same_values(products.grad_input(*args, rules=rules), reference.grad_input(*args))
    _, blocks, _, instructions = emulator.launched[-1]
    assert (blocks, instructions) == (4, 4 * 4 * 8), "of one block in four: its planes, by 4 x 8 instructions a tile of 64 x 64"


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.every(2)
def test_the_check_before_a_row_first_serves_runs_every_tile(operator: str, emulator: machine.Emulator):
    every = [{"rules": plan.Rules(tiles=(tile,))} for tile in TILES]
    emulated, function = replace(row(operator), device="cpu", settings=lambda: every), getattr(products, operator)
    once = selfcheck.compare(replace(emulated, settings=tuple), function)
    emulator.launched.clear()
    assert selfcheck.compare(emulated, function) > once >= 9
    gemms = {(kernel.file, *kernel.instance[:2]) for kernel, *_ in emulator.launched if kernel.instance}
    assert gemms == {(tile.family, tile.rows, tile.columns) for tile in TILES}
    with pytest.raises(AssertionError, match="by sign"):
        selfcheck.compare(emulated, lambda *args, **options: -function(*args, **options))

    def wrong_on_one(*args, **options):
        return function(*args, **options) + (options.get("rules") == every[-1]["rules"])

    with pytest.raises(AssertionError, match=r"by sign.* with rules=Rules\(tiles=\(Tile\(family='gemm_wgmma'"):
        selfcheck.compare(emulated, wrong_on_one)


def test_sums_beyond_31_bits_are_refused():
    format = Format("uint", 8, "C")
    positions = 2**30 // 255 + 1
    none, one = torch.empty(0, dtype=torch.uint8), torch.ones(1)
    g = QTensor(none, one, None, None, format, (1, positions, 1))
    x = QTensor(none, one, None, None, Format("sign", 1), (1, positions, 1))
    with pytest.raises(ValueError, match=r"4,210,753 positions of 8-bit codes are too many for the backend 'cuda'; take a"):
        products.grad_weight(g, x, None)
