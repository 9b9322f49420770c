"""recommend: what is tried, what the table says, and that the model is not touched. No time is asserted."""

import copy

import pytest
import torch
from torch import nn

import fqt
from fqt.inspect.recommend import Recommendation, Row
from tests.fqt.helpers import fingerprint


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Dropout(0.5), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))


X = torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(0))


def test_every_recipe_has_a_row_and_the_model_is_as_it_was():
    model = small().eval()
    before = fingerprint(model)
    state = torch.get_rng_state()
    found = fqt.recommend(model, X, recipes=["int8", "int4", fqt.load_recipe("bitnet")], seconds=0)
    assert {row.recipe for row in found.rows} == {"fp32", "int8", "int4", "bitnet"}
    assert [row.ms for row in found.rows] == sorted(row.ms for row in found.rows)
    assert fingerprint(model) == before and torch.equal(torch.get_rng_state(), state) and not model.training


def test_errors_are_of_gradients_alone_and_grow_as_bits_shrink():
    rows = {row.recipe: row for row in fqt.recommend(small(), X, recipes=["int8", "int6", "int4"], seconds=0).rows}
    assert rows["fp32"].error == 0
    assert 0 < rows["int8"].error < rows["int6"].error < rows["int4"].error < 1


def test_the_error_is_that_of_the_gradients():
    torch.manual_seed(3)
    plain = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    converted = fqt.convert(copy.deepcopy(plain), "int4")
    sides = []
    for model in (plain, converted):
        torch.manual_seed(5)
        model(X).square().mean().backward()
        sides.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    expected = float((sides[1] - sides[0]).norm() / sides[0].norm())
    plain.zero_grad()
    seen = next(row for row in fqt.recommend(plain, X, recipes=["int4"], seconds=0).rows if row.recipe == "int4")
    assert seen.error == pytest.approx(expected, rel=0.2)  # of other draws of the gradients' rounding


def test_what_cannot_be_followed_is_said():
    convolutions = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)))
    images = torch.randn(2, 4, 6, 6)
    found = fqt.recommend(convolutions, images, recipes=["int8", "bitnet"], seconds=0)
    assert "bitnet" in found.left_out and "not tried: bitnet: " in str(found)
    with pytest.raises(ValueError, match="none of the recipes can be followed: bitnet: "):
        fqt.recommend(convolutions, images, recipes=["bitnet"], seconds=0)
    with pytest.raises(ValueError, match="is converted: recommend compares recipes on a float model, revert it first"):
        fqt.recommend(fqt.convert(convolutions, "int8"), images)


def test_the_best_is_the_most_exact_of_those_that_are_fast_enough():
    rows = (
        Row("a", 1.0, 4.0, 0.9, 0),
        Row("b", 2.0, 2.0, 0.1, 0),
        Row("c", 3.9, 1.02, 0.01, 0),
        Row("fp32", 4, 1, 0, 0),
    )
    assert Recommendation(rows, 1.0, {}).best == "c"
    assert Recommendation(rows, 1.5, {}).best == "b"
    assert Recommendation(rows, 3.0, {}).best == "a"
    assert Recommendation(rows, 5.0, {}).best == "fp32"
    assert "no recipe is 5 times as fast as float32 here: stay with fp32" in str(Recommendation(rows, 5.0, {}))
    assert "smallest error at 1.5 times float32's speed or more: b" in str(Recommendation(rows, 1.5, {}))
