"""Output channels whose weights are all zero are left out of products on the integer kernels, and no bit shows it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fqt
from fqt import reference
from fqt.cpu import integers, library
from fqt.geometry import Geometry
from fqt.qtensor import QTensor
from fqt.quantizers import build, quantize
from fqt.testing import assert_same_values

pytestmark = pytest.mark.skipif(not library.LIBRARY.exists(), reason="the extension is not built")
WINDOW = Geometry(6, 5, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1)


@pytest.fixture(autouse=True)
def _small_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integers, "SMALL", 0)


def codes(shape: tuple[int, int, int], operand: str, name: str, zero: list[int] | None = None, **options: object) -> QTensor:
    values = torch.randn(shape)
    if zero is not None:
        values[zero] = 0.0
    quantizer = build(name, operand, **options)
    assert quantizer is not None
    return quantize(values, quantizer, operand, key=torch.tensor(7))[0]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("zero", [[0, 3, 4, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8], [8], [1]], ids=str)
@pytest.mark.parametrize("geometry", [None, WINDOW], ids=["linear", "conv"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_output_is_the_references(geometry: Geometry | None, zero: list[int], bias: bool, granularity: str) -> None:
    w = codes((9, 9 if geometry else 1, 7), "w", "uniform", zero, bits=8, granularity=granularity)
    x = codes((3, 30, 7), "x", "uniform", bits=8, granularity="sample")
    b = torch.randn(9) if bias else None
    assert_same_values(integers.output(x, w, b, geometry), reference.output(x, w, b, geometry).contiguous())


@pytest.mark.parametrize("zero", [[0, 3, 4, 8], list(range(9))], ids=str)
@pytest.mark.parametrize("geometry", [None, WINDOW], ids=["linear", "conv"])
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_the_inputs_gradient_is_the_references(geometry: Geometry | None, zero: list[int], bits: int) -> None:
    w = codes((9, 9 if geometry else 1, 7), "w", "fixed_point", zero, word_length=6, fraction_length=4)
    g = codes((3, 30, 9), "g", "uniform", bits=bits, granularity="sample", stochastic=True)
    actual = integers.grad_input(g, w, None, geometry, (3, 30, 7))
    assert_same_values(actual, reference.grad_input(g, w, None, geometry, (3, 30, 7)).contiguous())


def test_rows_are_really_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    w = codes((8, 1, 16), "w", "fixed_point", [1, 2, 5], word_length=8, fraction_length=6)
    x = codes((integers.FEW + 4, 1, 16), "x", "fixed_point", word_length=8, fraction_length=4)
    rows = []
    kernel = library.operators().integer_gather

    class Spy:
        def integer_gather(self, *args):
            rows.append(args[5].shape[0])
            return kernel(*args)

    monkeypatch.setattr(integers, "operators", Spy)
    integers.output(x, w, None, None)
    assert rows == [5]


@pytest.mark.parametrize(("zero", "left_out"), [([0], 0), ([0, 1], 2), (list(range(8)), 0)])
def test_few_zero_rows_are_not_worth_a_copy_and_all_are_no_product(zero: list[int], left_out: int) -> None:
    busy = integers.busy_rows(codes((8, 1, 5), "w", "uniform", zero, bits=8, granularity="tensor"), None)
    assert (0 if busy is None else 8 - busy.numel()) == left_out


def test_groups_and_grids_without_a_zero_are_left_alone() -> None:
    zero = [0, 1, 2]
    grouped = Geometry(6, 5, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 2)
    assert integers.busy_rows(codes((4, 1, 5), "w", "uniform", zero, bits=8, granularity="tensor"), grouped) is None
    assert integers.busy_rows(codes((4, 1, 5), "w", "xnor_weight", zero), None) is None


def test_an_input_that_is_not_finite_shows_in_the_channels_left_out_too() -> None:
    w = codes((4, 1, 5), "w", "uniform", [0, 1], bits=8, granularity="tensor")
    values = torch.randn(2, 3, 5)
    values[1, 0, 0] = torch.nan
    quantizer = build("uniform", "x", bits=8, granularity="sample")
    assert quantizer is not None
    x = quantize(values, quantizer, "x")[0]
    actual = integers.output(x, w, None, None)
    assert_same_values(actual, reference.output(x, w, None, None).contiguous())
    assert actual[1].isnan().all() and actual[0].isfinite().all()


def test_the_summary_says_so() -> None:
    model = nn.Sequential(nn.Linear(6, 8))
    fqt.convert(model, fqt.load_recipe("int8").everywhere())
    with torch.no_grad():
        model[0].weight[:3] = 0.0
    (row,) = fqt.summary(model).rows
    assert row.note.startswith("3 of 8 output channels are zero and left out")
