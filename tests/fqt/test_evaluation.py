"""An evaluation of few rows by one operator has the bits of the two, and is left to them where it is not for it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import fqt
from fqt import evaluation, ops, reference
from fqt.cpu import library
from fqt.formats import Format
from fqt.quantizers import Quantizer
from fqt.testing import assert_same_values
from tests.fqt.helpers import case_seeds, random_case
from tests.fqt.random_cases import FILLS, LAYOUTS, built_in, coded, tensor

pytestmark = pytest.mark.skipif(library.refuses() is not None, reason="the C++ kernels are not built")
WEIGHTS = [Format("sign", 1), Format("ternary", 2)]
WEIGHTS += [Format(grid, bits, "", grid == "uint") for grid in ("int", "fixed", "uint") for bits in range(2, 9)]


def narrow() -> list[tuple[Quantizer, Format]]:
    """Quantizers of activations that the operator is for."""
    found = []
    for letter, quantizer in built_in():
        plain = replace(quantizer, stochastic=False, prune="", keep_one_in=1, pass_range=None, transform="", estimator=None)
        format = plain.format("x" if letter == "w" else letter)
        if format.bits <= 8 and not format.block and format.axes in ("", "N", "NP") and not format.is_float:
            found.append((plain, format))
    return list(dict.fromkeys(found))


def frozen(recipe: str, *sizes: int, bias: bool = True) -> nn.Module:
    model = fqt.convert(nn.Linear(*sizes, bias=bias), fqt.load_recipe(recipe).everywhere())
    return fqt.freeze(model)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One number for each call of the C++ operator: its rows."""
    rows, whole = [], evaluation._evaluate

    def counted(x, *rest):
        rows.append(x.shape[0] * x.shape[1])
        return whole(x, *rest)

    monkeypatch.setattr(evaluation, "_evaluate", counted)
    return rows


@contextmanager
def by_two_operators() -> Iterator[None]:
    """Within it no number of rows is few."""
    few, evaluation.FEW = evaluation.FEW, -1
    yield
    evaluation.FEW = few


@pytest.mark.usefixtures("poisoned_memory")
def test_its_bits_are_those_of_quantizing_and_multiplying(rng: np.random.Generator) -> None:
    """400 random cases: quantizers, weights, values, strides, rows, biases, threads and instruction sets."""
    quantizers, best = narrow(), library.operators().limit_isa(2)
    assert len(quantizers) > 40
    try:
        for seed in case_seeds(rng, 400):
            with random_case(seed) as (draw, generator):
                quantizer, format = draw.choice(quantizers)
                n, p = draw.choice([(1, 1)] * 4 + [(1, 3), (4, 1), (2, 3), (3, 5), (16, 1), (1, 16), (0, 1), (1, 0)])
                channels, out = draw.choice((1, 3, 16, 31, 32, 64, 129, 300)), draw.choice((0, 1, 2, 15, 16, 17, 64, 70))
                x = tensor((n, p, channels), draw.choice(FILLS), draw.choice(LAYOUTS), generator)
                of_weight = replace(draw.choice(WEIGHTS), axes=draw.choice(("", "O")))
                w = coded(of_weight, (out, 1, channels), draw, generator)
                bias = draw.choice((None, torch.randn(out, generator=generator)))
                library.operators().limit_isa(draw.randint(0, best))
                torch.set_num_threads(draw.choice((1, 1, 2, 3)))
                y = evaluation.few_rows(x, quantizer, format, w, bias, "")
                torch.set_num_threads(1)
                options = {"calibrate": quantizer.calibrate, "limits": quantizer.limits}
                q, _ = reference.quantize(x, format, **options)
                assert y is not None
                assert_same_values(y, reference.output(q, w, bias, None))
    finally:
        library.operators().limit_isa(best)


@pytest.mark.parametrize("recipe", ["fqt_1bit", "int8", "int8_token", "int4", "bitnet", "dorefa_w1a2g6", "xnor"])
def test_a_frozen_layer_computes_few_rows_by_it(recipe: str, calls: list[int]) -> None:
    """And what it computes is what the two operators do, which a model that trains still calls."""
    model = frozen(recipe, 40, 24)
    with torch.no_grad():
        for shape in ((40,), (1, 40), (16, 40), (2, 3, 40), (17, 40), (4, 5, 40)):
            x = torch.randn(shape)
            before = len(calls)
            y = model(x)
            with by_two_operators():
                assert torch.equal(model(x), y)
            rows = x.numel() // 40
            assert calls[before:] == ([rows] if rows <= 16 else []), shape
        half = model(torch.randn(1, 40).half())
        assert half.dtype == torch.float16 and len(calls) == 5


def test_what_is_not_for_it_goes_the_other_way(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 40)
    with torch.no_grad():
        for model in (frozen("adapt", 40, 24), fqt.convert(nn.Linear(40, 24), fqt.load_recipe("int8").everywhere()).eval()):
            model(x)  # 16 bits; a weight that is not packed
        assert not calls
        model = frozen("int8", 40, 24)
        with torch.autograd.profiler.profile():  # A profiler is to see both operators.
            model(x)
        monkeypatch.setenv("FQT_BACKEND", "reference")
        model(x)
        monkeypatch.delenv("FQT_BACKEND")
        monkeypatch.setattr(ops, "KERNELS", [row for row in ops.KERNELS if row.backend == "reference"])
        model(x)
    assert not calls
    monkeypatch.undo()
    leaf = x.clone().requires_grad_()
    model(leaf).sum().backward()  # an input's gradient
    assert leaf.grad is not None and leaf.grad.any() and not calls


@pytest.mark.every(2)
@pytest.mark.parametrize("recipe", ["bitnet", "fqt_1bit"])
def test_a_graph_holds_the_operator_itself(recipe: str) -> None:
    """So that no Python runs between it and the next; with a number of rows that varies the graph serves all of them."""
    model, seen = nn.Sequential(frozen(recipe, 40, 24), nn.Tanh(), frozen(recipe, 24, 8, bias=False)), []

    def backend(graph: torch.fx.GraphModule, example: list) -> object:
        from torch._dynamo.backends.common import aot_autograd

        def look(inner: torch.fx.GraphModule, _: list) -> object:
            seen.extend(str(node.target) for node in inner.graph.nodes if "fqt" in str(node.target))
            return inner.forward

        return aot_autograd(fw_compiler=look)(graph, example)

    torch._dynamo.reset()
    fast = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for rows in (3, 3, 30, 4, 40):  # the second size makes the number of rows a variable
            x = torch.randn(rows, 40)
            assert torch.equal(fast(x), model(x))
            if rows == 3:
                assert seen == ["fqt_cpu.evaluate.default"] * 2
    assert seen[2:] == ["fqt.quantize.default", "fqt.output.default"] * 2, "one graph more"
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=1, max=99)},))
        assert not any("evaluate" in str(node.target) for node in program.graph.nodes)
        assert torch.equal(program.module()(x[:5]), model(x[:5]))


def test_where_the_kernels_do_not_serve_a_graph_holds_the_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "KERNELS", [row for row in ops.KERNELS if row.backend == "reference"])
    w = coded(Format("int", 8, "O"), (5, 1, 12), random.Random(0), torch.Generator().manual_seed(0))
    x, bias = torch.randn(2, 3, 12), torch.randn(5)
    given = (x, "int8:NP", "absmax", (-1.0, 1.0), w.codes, w.scale, None, "int8:O", bias)
    q, _ = reference.quantize(x, Format.parse("int8:NP"), calibrate="absmax")
    assert torch.equal(torch.ops.fqt.evaluate(*given), reference.output(q, w, bias, None))
