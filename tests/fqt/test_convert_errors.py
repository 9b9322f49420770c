"""Conversions that are refused: a sentence that says why, and the model as it was."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import fqt
from fqt.quantizers import build
from fqt.recipe import Product, Recipe, Rule
from tests.fqt.helpers import fingerprint, small

INT8 = fqt.load_recipe("int8").everywhere()
ONE_BIT = fqt.load_recipe("fqt_1bit").everywhere()


class MyLinear(nn.Linear):
    """May compute anything."""


def yaml_recipe(text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "bad.yaml"
        path.write_text(text)
        return path

    return write


def token(letter: str) -> object:
    return build("uniform", letter, granularity="token")


def output(text: str) -> Callable[[Path], Path]:
    return yaml_recipe(f"output: {text}\ngrad_input: float\ngrad_weight: float\n")


PLAIN = "output: float\ngrad_input: float\ngrad_weight: float\n"
ERRORS: list[tuple[object, dict[str, object], type[Exception], list[str]]] = [
    ("fqt_1bitt", {}, ValueError, ["unknown recipe 'fqt_1bitt'", "did you mean 'fqt_1bit'?", "built-in recipes:", "int8"]),
    ("dorefa_w2a2", {}, ValueError, ["dorefa_w2a2", "did you mean", "built-in"]),
    ("fqt_1bit_b99", {}, ValueError, ["fqt_1bit_b99", "1 to 16 bits, not 99"]),
    ("dorefa_w0a1g1", {}, ValueError, ["dorefa_w0a1g1", "output.w", "0"]),
    ("nowhere.yaml", {}, ValueError, ["'nowhere.yaml' does not exist", "built-in recipes:"]),
    (Path("nowhere"), {}, ValueError, ["'nowhere' does not exist"]),
    ("no/such", {}, ValueError, ["'no/such' does not exist"]),
    (8, {}, TypeError, ["a recipe is a name, a path or a fqt.Recipe, not int"]),
    (None, {}, TypeError, ["not NoneType"]),
    (yaml_recipe(": ["), {}, ValueError, ["'bad' is not valid YAML"]),
    (yaml_recipe("int8"), {}, ValueError, ["'bad' is a YAML str, not a mapping"]),
    (yaml_recipe(""), {}, ValueError, ["'bad' is a YAML NoneType"]),
    (yaml_recipe("output: float\ngrad_input: float\n"), {}, ValueError, ["lacks the product 'grad_weight'", "write grad"]),
    (yaml_recipe(PLAIN + "rule: []\n"), {}, ValueError, ["no key 'rule'", "did you mean 'rules'?"]),
    (output("8"), {}, ValueError, ["output is 8", "'float' or a mapping of x and w"]),
    (output("{x: float}"), {}, ValueError, ["output lacks its operand 'w'"]),
    (output("{x: float, w: saved}"), {}, ValueError, ["output.w cannot be 'saved'"]),
    (output("{x: float, w: float, g: float}"), {}, ValueError, ["no key 'g'"]),
    (
        output("{x: {quantizer: unifrom}, w: float}"),
        {}, ValueError, ["output.x", "unknown quantizer 'unifrom'", "did you mean 'uniform'?"],
    ),
    (
        output("{x: {quantizer: uniform, bit: 4}, w: float}"),
        {}, ValueError, ["output.x", "no option 'bit'", "did you mean 'bits'?"],
    ),
    (
        output("{x: {quantizer: psq, bits: 4}, w: float}"),
        {}, ValueError, ["output.x", "'psq' is for g (gradient), not for x (activation)"],
    ),
    (yaml_recipe(PLAIN + "rules: {match: a}\n"), {}, ValueError, ["rules is {'match': 'a'}, not a list"]),
    (yaml_recipe(PLAIN + "rules: [{match: a}]\n"), {}, ValueError, ["a rule is {match: pattern, recipe: name or float}"]),
    (yaml_recipe(PLAIN + "rules: [{match: <frist>, recipe: float}]\n"), {}, ValueError, ["'<frist>'", "mean '<first>'?"]),
    (yaml_recipe(PLAIN + "rules: [{match: '8', recipe: int9}]\n"), {}, ValueError, ["unknown recipe 'int9'", "'int8'"]),
    (yaml_recipe(PLAIN + "replace: [ReLU]\n"), {}, ValueError, ["replace is ['ReLU']", "{ReLU: Identity}"]),
    ("int8", {"skip": "layer9"}, ValueError, ["skip pattern 'layer9' matches no layer", "layers: 0, 3, 5, 8, 10"]),
    ("int8", {"skip": ["8", "fc"]}, ValueError, ["skip pattern 'fc'"]),
    ("int8", {"skip": "1"}, ValueError, ["skip pattern '1'", "did you mean '10'?"]),
    ("int8", {"skip": ""}, ValueError, ["skip pattern '' matches no layer"]),
    ("int8", {"skip": 3}, TypeError, ["skip", "not 3"]),
    ("int8", {"skip": [3]}, TypeError, ["skip", "not [3]"]),
    ("int8", {"skip": "*"}, ValueError, ["'int8' converts nothing in this Sequential", "all 5 layers (0, 3, 5, 8)", "skip"]),
    (ONE_BIT, {"skip": ["[035]", "8", "10"]}, ValueError, ["all 5 layers", "everywhere()"]),
    (replace(INT8, rules=(Rule("fc", None),)), {}, ValueError, ["rule 'fc' matches no layer", "layers: 0, 3"]),
    (replace(INT8, rules=(Rule("*", None),)), {}, ValueError, ["all 5 layers", "stay float by the rule '*'"]),
    (replace(INT8, replace=(("ReLu", "Identity"),)), {}, ValueError, ["'ReLu'", "did you mean 'ReLU'?"]),
    (replace(INT8, replace=(("ReLU", "functional"),)), {}, ValueError, ["'functional'", "no module of torch.nn"]),
    (replace(INT8, replace=(("ReLU", "Parameter"),)), {}, ValueError, ["'Parameter'", "no module of torch.nn"]),
    (replace(INT8, replace=(("ReLU", "PReLU"),)), {}, ValueError, ["'PReLU'", "has parameters"]),
    (replace(INT8, replace=(("ReLU", "Linear"),)), {}, ValueError, ["cannot make a Linear", "in_features"]),
    (
        Recipe("tokens", Product(token("x"), build("uniform", "w")), Product("float", "saved"), Product("float", "saved")),  # type: ignore[arg-type]
        {}, ValueError, ["layer '0'", "'tokens'", "x in output", "each token", "conv", "use granularity tensor or sample"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "options", "kind", "words"), ERRORS)
def test_a_refused_conversion_says_why_and_leaves_the_model_whole(
    recipe: object, options: dict[str, object], kind: type[Exception], words: list[str], tmp_path: Path
) -> None:
    model = small()
    before = fingerprint(model)
    with pytest.raises(kind) as caught:
        fqt.convert(model, recipe(tmp_path) if callable(recipe) else recipe, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert not [word for word in words if word not in message], message
    assert "\n" not in message, "one paragraph"
    assert fingerprint(model) == before


MODEL_ERRORS: list[tuple[Callable[[], object], type[Exception], list[str]]] = [
    (lambda: fqt.convert("model", "int8"), TypeError, ["convert takes a torch.nn.Module, not str"]),  # type: ignore[arg-type]
    (lambda: fqt.convert(nn.Linear, "int8"), TypeError, ["class Linear", "make an instance"]),  # type: ignore[arg-type]
    (lambda: fqt.convert([nn.Linear(2, 2)], "int8"), TypeError, ["not list"]),  # type: ignore[arg-type]
    (lambda: fqt.convert(nn.ReLU(), "int8"), ValueError, ["no layer of a kind that fqt converts (nn.Linear, ", "ReLU"]),
    (lambda: fqt.convert(nn.Sequential(), ONE_BIT), ValueError, ["converts nothing", "check that this is the model"]),
    (lambda: fqt.convert(nn.Sequential(nn.LazyLinear(3)), INT8), ValueError, ["held by 1 LazyLinear, none of a kind"]),
    (
        lambda: fqt.convert(nn.ModuleDict({"a": MyLinear(3, 3), "b": nn.LSTM(3, 3)}), INT8),
        ValueError, ["held by 1 MyLinear, 1 LSTM, none of a kind", "fqt.summary(model)", "fqt.register_layer"],
    ),
    (lambda: fqt.convert(fqt.convert(small(), "int8"), "int8"), ValueError, ["already (3 layers", "'3'", "fqt.revert(model)"]),
    (lambda: fqt.convert(fqt.convert(small(), "int8"), "fp32"), ValueError, ["already"]),
    (lambda: fqt.convert(nn.Sequential(fqt.convert(nn.Linear(3, 3), INT8)), INT8), ValueError, ["(1 layers", "'0'"]),
    (lambda: fqt.revert(small()), ValueError, ["nothing in this Sequential is converted"]),
    (lambda: fqt.revert(fqt.convert(small(), "fp32")), ValueError, ["nothing in this Sequential"]),
    (lambda: fqt.revert(fqt.revert(fqt.convert(small(), "int8"))), ValueError, ["nothing to revert"]),
    (lambda: fqt.convert(small(), INT8)(torch.ones(2, 4, 8, 8)), ValueError, ["(2, 4, 8, 8)", "(N, 3, H, W)"]),
    (lambda: fqt.convert(small(), INT8)[8](torch.ones(2, 23)), ValueError, ["(2, 23)", "last axis must be 24"]),
    (lambda: fqt.convert(small(), INT8)[5](torch.ones(2, 6, 2, 9)), ValueError, ["3x3 window", "2x9 input"]),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "words"), MODEL_ERRORS)
def test_a_wrong_model_or_input_is_named(call: Callable[[], object], kind: type[Exception], words: list[str]) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


def test_a_second_conversion_leaves_the_first_whole() -> None:
    model = fqt.convert(small(), "fqt_1bit")
    before = fingerprint(model)
    with pytest.raises(ValueError, match="already"):
        fqt.convert(model, "int8")
    assert fingerprint(model) == before


def test_the_log_says_once_what_was_converted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fqt"):
        fqt.convert(small(), "fqt_1bit")
    (record,) = caplog.records
    assert (
        "fqt_1bit: 2 of 5 layers converted, 2 activations replaced (4, 6); 1 kept for float readers (2); "
        "<first> is (0); <last> is (10)" in record.getMessage()
    )
    reference = {row.backend for row in fqt.summary(fqt.convert(small(), "fqt_1bit")).rows if row.bits["output"] < 32}
    assert ("fqt.summary(model)" in record.getMessage()) == any("reference" in name for name in reference)


def test_a_rule_whose_recipe_needs_a_replacement_is_refused_until_the_recipe_gives_it():
    rule = fqt.Rule("*", fqt.load_recipe("xnor"))
    with pytest.raises(
        ValueError, match=r"follows a recipe that replaces ReLU by Identity.* give it replace: {ReLU: Identity}"
    ):
        replace(fqt.load_recipe("int8"), rules=(rule,))
    replaced = (("ReLU", "Identity"), ("ReLU6", "Identity"))
    recipe = replace(fqt.load_recipe("int8"), rules=(rule,), replace=replaced)
    model = fqt.convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), recipe)
    assert type(model[1]) is nn.Identity
