"""The CUDA kernels on a GPU: every tile that it holds, against the reference on the CPU; nothing waits; graphs capture them."""

import random

import numpy as np
import pytest
import torch

from fqt import ops, reference
from fqt.cuda_kernels import plan, products, runtime
from fqt.formats import Format
from fqt.geometry import Geometry
from fqt.ops import Request
from fqt.qtensor import QTensor
from fqt.testing import assert_same_values
from tests.fqt.cuda_kernels.cases import OPERATORS, TILES, case
from tests.fqt.random_cases import coded

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def _served() -> None:
    reason = runtime.refuses()
    if reason is not None:
        pytest.skip(reason)


def on_gpu(value):
    if isinstance(value, QTensor):
        parts = (on_gpu(part) for part in (value.codes, value.scale, value.offset, value.index))
        return QTensor(*parts, value.format, value.shape)
    return value.cuda() if isinstance(value, torch.Tensor) else value


def assert_equal_on_gpu(operator: str, args: tuple, rules: plan.Rules) -> None:
    actual = getattr(products, operator)(*(on_gpu(value) for value in args), rules=rules).cpu()
    try:
        assert_same_values(actual, getattr(reference, operator)(*args))
    except AssertionError as error:
        geometry = next((value for value in args if isinstance(value, Geometry)), None)
        error.add_note(f"{operator} {args[0].format.name} {args[0].shape} x {args[1].format.name} {args[1].shape}, {geometry}")
        raise


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.family}-{tile.rows}x{tile.columns}")
def test_products_equal_the_reference(operator: str, tile: plan.Tile, rng: np.random.Generator):
    """The cases that the emulator runs, then larger ones: many blocks, deep sums, windows."""
    rules = plan.Rules(tiles=(tile,))
    if not rules.held(runtime.device(torch.cuda.current_device())):
        pytest.skip("this GPU has no such tile")
    draw = random.Random(int(rng.integers(2**62)))
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    for _ in range(60):
        assert_equal_on_gpu(operator, case(operator, draw, generator), rules)
    window = Geometry(28, 28, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 1)
    outputs = window.output_size[0] * window.output_size[1]
    for shapes in (
        ((4, 130, 4096), (1000, 1, 4096), (4, 130, 1000), None),
        ((8, 784, 128), (192, 9, 128), (8, outputs, 192), window),
        ((16, 784, 64), (64, 9, 64), (16, outputs, 64), window),
    ):
        for _ in range(3):
            assert_equal_on_gpu(operator, case(operator, draw, generator, shapes), rules)


def operands(axes: str) -> tuple[QTensor, QTensor]:
    """A gradient with pruned samples or channels, and signs."""
    draw, generator = random.Random(3), torch.Generator().manual_seed(3)
    g = coded(Format("uint", 4, axes, True), (16, 196, 256), draw, generator, pruned=True)
    shape = (16, 196, 128) if axes == "C" else (256, 1, 128)
    return g, coded(Format("sign", 1), shape, draw, generator)


def test_nothing_waits_for_the_device():
    """Kept samples and channels are counted on the device alone."""
    (g, w), (by_channel, x) = ([on_gpu(q) for q in operands(axes)] for axes in ("N", "C"))
    calls = (
        lambda: products.grad_input(g, w, None, None, (16, 196, 128)),
        lambda: products.grad_weight(by_channel, x, None),
        lambda: products.output(x, w, None, None),
    )
    for call in calls:
        call()  # compiled and loaded
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_a_graph_captures_the_products_and_replays_them_on_new_operands():
    g, x = operands("C")
    held_g, held_x = on_gpu(g), on_gpu(x)
    products.grad_weight(held_g, held_x, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grad = products.grad_weight(held_g, held_x, None)
    held_x.codes.copy_(~x.codes)
    graph.replay()
    flipped = QTensor(~x.codes, x.scale, None, None, x.format, x.shape)
    assert_same_values(grad.cpu(), reference.grad_weight(g, flipped, None))


def test_the_operators_choose_the_kernels():
    left_of = {"output": "sign:N", "grad_input": "uint4+:N", "grad_weight": "uint4+:C", "accumulate": "sign"}
    for operator, left in left_of.items():
        request = Request("cuda", (Format.parse(left), Format("sign", 1)))
        assert ops.select(operator, request)[0].label == "cuda b1"
