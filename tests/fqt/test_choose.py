"""Which layers follow which recipe: only, overrides, the ends of a network, adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fqt
from fqt import calls
from tests.fqt.helpers import fingerprint

INT8 = fqt.load_recipe("int8").everywhere()
ONE_BIT = fqt.load_recipe("fqt_1bit").everywhere()


def model() -> nn.Module:
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(3)]
    return nn.ModuleDict({"blocks": nn.ModuleList(blocks), "head": nn.Linear(8, 2)})


def recipes_of(model: nn.Module) -> dict[str, str]:
    return {name: layer.recipe.name for name, layer in fqt.quantized_layers(model)}


def notes(model: nn.Module) -> dict[str, str]:
    return {row.name: row.note for row in fqt.summary(model).rows if row.bits["output"] == 32}


# --- only, overrides --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("only", ["blocks.1.*", ["blocks.1.0", "blocks.1.1"]])
def test_only_converts_these(only) -> None:
    converted = fqt.convert(model(), INT8, only=only)
    assert list(recipes_of(converted)) == ["blocks.1.0", "blocks.1.1"]
    assert set(notes(converted).values()) == {"kept float by only, which leaves it out"}


def test_overrides_decide_before_rules_and_behind_skip_and_only() -> None:
    overrides = {
        "blocks.0.*": "xnor",
        lambda name, layer: layer.out_features == 2: INT8,
        "blocks.1.0": "float",
        "*.1": ONE_BIT,
    }
    converted = fqt.convert(model(), "fqt_w1a1g4", skip="blocks.2.1", only=["blocks.*", "head"], overrides=overrides)
    assert recipes_of(converted) == {
        "blocks.0.0": "xnor",
        "blocks.0.1": "xnor",
        "blocks.1.1": "fqt_1bit",
        "blocks.2.0": "fqt_w1a1g4",
        "head": "int8",
    }
    assert notes(converted) == {"blocks.1.0": "kept float by overrides 'blocks.1.0'", "blocks.2.1": "kept float by skip"}
    fqt.revert(converted)
    assert set(notes(converted).values()) == {"kept float"}


def test_an_override_may_name_a_place_and_a_float_recipe_may_be_overridden() -> None:
    assert recipes_of(fqt.convert(model(), "fp32", overrides={"<last>": "int8"})) == {"head": "int8"}


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        (
            {"only": "block.*"},
            ValueError,
            "only pattern 'block.*' matches no layer (did you mean 'blocks.2.1'?); layers: blocks.0.0",
        ),
        ({"only": 3}, TypeError, "only is a pattern of module names or a list of them, not 3"),
        ({"overrides": {"heat": "int8"}}, ValueError, "overrides pattern 'heat' matches no layer (did you mean 'head'?)"),
        ({"overrides": {lambda name, layer: False: "int8"}}, ValueError, "lambda> matches no layer"),
        ({"overrides": {"head": "int9"}}, ValueError, "unknown recipe 'int9'"),
        ({"overrides": ["head"]}, TypeError, "overrides is a mapping from patterns of module names, or predicates"),
        ({"only": "head", "skip": "head"}, ValueError, "stay float by only, which leaves it out and by skip; loosen skip"),
    ],
)
def test_what_has_no_effect_is_an_error(options, kind, words) -> None:
    whole = model()
    before = fingerprint(whole)
    with pytest.raises(kind) as caught:
        fqt.convert(whole, INT8, **options)
    assert words in str(caught.value)
    assert fingerprint(whole) == before


# --- the ends, by kind ------------------------------------------------------------------------------------------------


class Headed(nn.Linear):
    """Somebody's head, which is not converted."""


def test_an_embedding_in_front_and_a_head_that_is_not_converted_are_the_ends() -> None:
    text = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), Headed(8, 9))
    assert list(recipes_of(fqt.convert(text, "int8"))) == ["1", "2"]


# --- adapters, frozen weights -----------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A frozen layer with a pair of low rank beside it, under the names that LoRA's packages give."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(16, 16).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(16, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, 16, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_adapters_stay_float_and_take_no_end() -> None:
    adapted = fqt.convert(nn.Sequential(Adapted(), Adapted(), Adapted()), "fqt_1bit")
    assert list(recipes_of(adapted)) == ["1.base_layer"]
    assert notes(adapted)["0.base_layer"] == "kept float by the rule '<first>'"
    assert notes(adapted)["2.base_layer"] == "kept float by the rule '<last>'"
    assert notes(adapted)["1.lora_A.default"].startswith("kept float as an adapter beside a frozen layer")
    adapted = fqt.convert(nn.Sequential(Adapted()), INT8, overrides={"*lora_?.*": INT8})
    assert len(recipes_of(adapted)) == 3


def test_pefts_adapters_of_any_kind() -> None:
    peft = pytest.importorskip("peft")
    plain = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    for config in (peft.LoraConfig(target_modules=["0", "1", "2"], r=4), peft.LoHaConfig(target_modules=["1"], r=4)):
        wrapped = peft.get_peft_model(copy.deepcopy(plain), config)
        fqt.convert(wrapped, "fqt_1bit")
        assert [name.replace(".base_layer", "") for name in recipes_of(wrapped)] == ["base_model.model.1"]
        wrapped(torch.randn(3, 16)).sum().backward()


def test_a_frozen_weight_computes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    grad_weight = calls.grad_weight
    monkeypatch.setattr(calls, "grad_weight", lambda *args: asked.append(1) or grad_weight(*args))
    for recipe in (INT8, ONE_BIT):
        frozen = fqt.convert(nn.Sequential(nn.Linear(8, 8), nn.Conv1d(3, 3, 1), nn.Linear(8, 8)), recipe)
        for layer in frozen[:2]:
            layer.requires_grad_(False)
        with fqt.count_saved_bytes() as saved:
            y = frozen[0](torch.randn(5, 3, 8, requires_grad=True))
        assert sum(saved.by_dtype.values()) < 8 * 8 * 4 + 5 * 3 * 8, (
            "the weight's codes, scales, and the estimator's mask: no x"
        )
        frozen[1:](y).sum().backward()
        assert len(asked) == 1
        asked.clear()
