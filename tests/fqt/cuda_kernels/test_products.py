"""The CUDA kernels, run on the emulator of tests/cuda: what they compute equals the reference, bit for bit."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from fqt import reference
from fqt.cuda_kernels import plan, products, runtime
from fqt.formats import Format
from fqt.geometry import Geometry
from fqt.qtensor import QTensor
from fqt.testing import assert_same_values
from tests.fqt.cuda_kernels import machine
from tests.fqt.test_kernels import coded, layer

TILES = (*plan.MMA, *plan.WGMMA)
FORMATS = {
    "output": (("sign", "sign:N", "sign:NP", "uint2", "uint4+:N", "uint8:NP"), ("sign", "sign:O")),
    "accumulate": (("sign",), ("sign:O",)),
    "grad_input": (("uint1+:N", "uint4+:N", "uint3+", "uint6:N", "uint4+:NP", "uint8+:N"), ("sign",)),
    "grad_weight": (("uint1+:C", "uint4+:C", "uint3+", "uint6:N", "uint4+:NC", "uint8+:N", "uint2:NC"), ("sign",)),
}


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


def case(operator: str, draw: random.Random, generator: torch.Generator, shapes=None):
    """Arguments of a product of random operands: a random layer, or the given one (x, w, g, geometry)."""
    while True:
        x_shape, w_shape, g_shape, geometry = shapes or layer(draw)
        left, right = (Format.parse(draw.choice(names)) for names in FORMATS[operator])
        work = g_shape[0] * g_shape[1] * g_shape[2] * w_shape[1] * w_shape[2]
        if products.refuses(operator, (left, right), geometry) is None and (shapes or work < 3e5):
            break
    pruned = draw.random() < 0.4
    if operator in ("output", "accumulate"):
        operands = coded(left, x_shape, draw, generator), coded(right, w_shape, draw, generator)
        bias = draw.choice((None, torch.randn(w_shape[0], generator=generator)))
        return (*operands, bias, geometry) if operator == "output" else (*operands, geometry)
    if operator == "grad_input":
        mask_shape = Format("sign", 1).packed_shape(x_shape)
        mask = draw.choice((None, torch.randint(256, mask_shape, generator=generator, dtype=torch.uint8)))
        return coded(left, g_shape, draw, generator, pruned), coded(right, w_shape, draw, generator), mask, geometry, x_shape
    return coded(left, g_shape, draw, generator, pruned), coded(right, x_shape, draw, generator), geometry


def assert_multiplies_as_the_reference(operator: str, args: tuple) -> None:
    try:
        assert_same_values(getattr(products, operator)(*args), getattr(reference, operator)(*args))
    except AssertionError as error:
        a, b, geometry = args[0], args[1], next((v for v in args if isinstance(v, Geometry)), None)
        error.add_note(f"{operator} {a.format.name} {a.shape} x {b.format.name} {b.shape}, {geometry}, index {a.index}")
        raise


@pytest.mark.parametrize("operator", FORMATS)
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.family}-{tile.rows}x{tile.columns}")
@pytest.mark.usefixtures("poisoned_memory")
def test_products_equal_the_reference(
    operator: str, tile: plan.Tile, emulator: machine.Emulator, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
):
    """Random layers, windows, formats, pruning, masks and biases, whose results are smaller than a tile, and ragged."""
    monkeypatch.setattr(plan, "MMA", (tile,))
    monkeypatch.setattr(plan, "WGMMA", ())
    draw = random.Random(int(rng.integers(2**62)))
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    for _ in range(60):
        assert_multiplies_as_the_reference(operator, case(operator, draw, generator))
    assert {kernel.file for kernel in emulator.launched if kernel.instance} == {tile.family}
    assert operator == "grad_weight" or {kernel.instance[3] for kernel in emulator.launched if kernel.instance} >= {4, 8}
