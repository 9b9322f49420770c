"""A mask of torch.nn.utils.prune stays a mask, or the conversion is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fqt
from fqt.quantizers import build
from tests.fqt.helpers import fingerprint

KEEPS = {"int8": True, "dorefa_w4a32g4": False, "dorefa_w1a1g4": False, "xnor": False, "fqt_1bit": False, "ternary": True}


def recipe(name: str) -> fqt.Recipe:
    if name != "ternary":
        return fqt.load_recipe(name).everywhere()
    product = fqt.Product(build("uniform", "x", bits=8), build("ternary_weight", "w"))
    return replace(fqt.load_recipe("int8").everywhere(), name=name, output=product)


def pruned(layer: nn.Module, amount: float = 0.75) -> nn.Sequential:
    prune.l1_unstructured(layer, "weight", amount)
    return nn.Sequential(nn.Linear(4, 4), layer)


@pytest.mark.parametrize("layer", [lambda: nn.Linear(16, 8), lambda: nn.Conv1d(4, 8, 3)], ids=["linear", "conv1d"])
@pytest.mark.parametrize("name", KEEPS)
def test_zeros_stay_zeros_or_conversion_names_the_layer(name: str, layer) -> None:
    model = pruned(layer())
    before = fingerprint(model)
    if not KEEPS[name]:
        with pytest.raises(ValueError, match=r"layer '1' is pruned, and as .* of its \d+ weights.*ternary.*skip='1'"):
            fqt.convert(model, recipe(name))
        assert fingerprint(model) == before
        return
    fqt.convert(model, recipe(name))
    assert bool((model[1].quantized_weight().decode()[model[1].weight_OKI() == 0] == 0).all())
    model[1](torch.randn(3, 16) if isinstance(model[1], nn.Linear) else torch.randn(3, 4, 9)).square().sum().backward()
    assert not model[1].weight_orig.grad[model[1].weight_mask == 0].any()
    fqt.revert(model)
    assert fingerprint(model)[: len(model.state_dict())] == before[: len(model.state_dict())]


def test_a_mask_that_holds_nothing_is_no_obstacle() -> None:
    assert len(list(fqt.quantized_layers(fqt.convert(pruned(nn.Linear(16, 8), 0.0), recipe("xnor"))))) == 2


def test_one_pruned_after_conversion_is_said_in_the_summary() -> None:
    model = fqt.convert(nn.Sequential(nn.Linear(16, 8)), recipe("fqt_1bit"))
    assert "pruned" not in fqt.summary(model).rows[0].note
    prune.l1_unstructured(model[0], "weight", 0.75)
    assert "96 pruned weights are not zero as codes" in fqt.summary(model).rows[0].note
