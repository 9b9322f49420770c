"""Recipes as YAML files: what they say, what they extend, and what is refused."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

import fqt
from fqt.quantizers import Quantizer, build
from fqt.recipe import Product, Recipe, Rule
from fqt.recipe_yaml import load_recipe, recipes

GOOD = """
description: mine
output:
  x: {quantizer: uniform, bits: 8}
  w: {quantizer: uniform, bits: 8}
grad_input: float
grad_weight:
  g: {quantizer: psq, bits: 4, granularity: channel}
  x: saved
rules:
  - {match: "head.*", recipe: float}
  - {match: "<first>", recipe: int8}
replace: {ReLU: Identity}
"""


@pytest.fixture
def parse(tmp_path: Path):
    def write_and_load(text: str) -> Recipe:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path)

    return write_and_load


def test_a_recipe_of_ones_own(parse, tmp_path):
    recipe = parse(GOOD)
    assert recipe.name == "mine"
    assert recipe.output == Product(Quantizer("int", 8), Quantizer("int", 8))
    assert recipe.grad_input == Product("float", "saved")
    assert recipe.grad_weight == Product(build("psq", "g", bits=4, granularity="channel"), "saved")
    assert recipe.rules == (Rule("head.*", None), Rule("<first>", load_recipe("int8")))
    assert recipe.replace == (("ReLU", "Identity"),)
    path = tmp_path / "mine.yaml"
    assert load_recipe(str(path)) == load_recipe(path) == recipe
    assert load_recipe(recipe) is recipe


def test_a_float_gradient_meets_a_float_operand_where_the_forward_has_one(parse):
    text = GOOD.replace("x: {quantizer: uniform, bits: 8}", "x: float").replace("  x: saved\n", "  x: float\n")
    text = text.replace("grad_weight:\n  g: {quantizer: psq, bits: 4, granularity: channel}\n  x: float", "grad_weight: float")
    recipe = parse(text)
    assert recipe.grad_weight == Product("float", "float")
    assert recipe.grad_input == Product("float", "saved")


FORWARD_X, FORWARD_W = "x: {quantizer: uniform, bits: 8}", "w: {quantizer: uniform, bits: 8}"
GRADIENT = "g: {quantizer: psq, bits: 4, granularity: channel}"
# what to change in GOOD, and what the error then says, after "recipe 'mine'"
MALFORMED = {
    "an unknown key": (("description", "descripton"), " has no key 'descripton' (did you mean 'description'?); keys: "),
    "a key of a family": (("description: mine", "instances: [{b: 1}]"), " has no key 'instances'"),
    "a key that is a number": (("description: mine", "8: mine"), " has no key 8; keys: description, "),
    "a key twice": (("grad_input: float", "grad_input: float\ngrad_input: float"), " is not valid YAML: key 'grad_input' "),
    "no grad_input": (("grad_input: float\n", ""), " lacks the product 'grad_input': give it operands, or write grad_input: "),
    "an empty product": (("grad_input: float", "grad_input:"), ": grad_input is None, not 'float' or a mapping of g and w"),
    "a product's word": (("grad_input: float", "grad_input: int8"), ": grad_input is 'int8', not 'float' or a mapping of g "),
    "a list for a product": (("grad_input: float", "grad_input: [float]"), ": grad_input is ['float'], not 'float' or"),
    "an unknown operand": ((FORWARD_W, "y: float"), ".output' has no key 'y'"),
    "a missing operand": ((f"  {FORWARD_W}\n", ""), ": output lacks its operand 'w' (a quantizer, 'saved' or 'float')"),
    "an operand's word": ((FORWARD_X, "x: Saved"), ": output.x is 'Saved', not 'saved', 'float' or {quantizer: name, ...opt"),
    "an operand without quantizer": ((FORWARD_X, "x: {bits: 8}"), ": output.x is {'bits': 8}, not 'saved', 'float' or "),
    "saved in the forward": ((FORWARD_X, "x: saved"), ": output.x cannot be 'saved', no earlier product made its codes"),
    "a saved gradient": ((GRADIENT, "g: saved"), ": grad_weight.g cannot be 'saved'"),
    "an unknown quantizer": ((FORWARD_X, "x: {quantizer: unifrom}"), ": output.x: unknown quantizer 'unifrom' (did you mean "),
    "no name": ((FORWARD_X, "x: {quantizer: }"), ": output.x: unknown quantizer 'None'"),
    "a quantizer of another operand": ((FORWARD_X, "x: {quantizer: psq, bits: 4}"), ": output.x: quantizer 'psq' is for g "),
    "an unknown option": ((FORWARD_X, "x: {quantizer: uniform, bit: 8}"), ": output.x: quantizer 'uniform' has no option 'b"),
    "an option called name": ((FORWARD_X, "x: {quantizer: uniform, name: 8}"), ": output.x: quantizer 'uniform' has no option"),
    "a missing option": ((GRADIENT, "g: {quantizer: psq}"), ": grad_weight.g: quantizer 'psq' with no options: "),
    "too many bits": ((FORWARD_X, "x: {quantizer: uniform, bits: 99}"), ": output.x: quantizer 'uniform' with {'bits': 99}: "),
    "bits in quotes": ((FORWARD_X, "x: {quantizer: uniform, bits: '8'}"), ": output.x: quantizer 'uniform' with {'bits': '8'}"),
    "bits with a point": ((FORWARD_X, "x: {quantizer: uniform, bits: 8.0}"), "bits are an integer, not 8.0"),
    "a word for a truth": ((FORWARD_X, "x: {quantizer: uniform, stochastic: maybe}"), "stochastic is 'maybe', not true or fal"),
    "an unknown granularity": ((FORWARD_X, "x: {quantizer: uniform, granularity: row}"), "granularity 'row' is not one of"),
    "a sample of weights": ((FORWARD_W, "w: {quantizer: uniform, granularity: sample}"), "output.w: a weight has no granul"),
    "a scale that cannot leave": ((FORWARD_X, "x: {quantizer: uniform, granularity: channel}"), ": the scale of x in output "),
    "rules that are no list": (('  - {match: "head.*", recipe: float}\n  - {match: "<first>", recipe: int8}', "  head: float"),
                               ": rules is {'head': 'float'}, not a list"),
    "a rule without recipe": ((', recipe: int8}', "}"), ": a rule is {match: pattern, recipe: name or float}, not {'match'"),
    "a rule with more": ((', recipe: int8}', ", recipe: int8, bits: 1}"), ": a rule is {match: pattern, recipe: name or "),
    "an unknown place": (('"<first>"', '"<frist>"'), ": unknown place '<frist>' (did you mean '<first>'?); known: <first>, "),
    "replace that is no mapping": (("{ReLU: Identity}", "[ReLU]"), ": replace is ['ReLU'], not a mapping such as {ReLU: Ident"),
}  # fmt: skip


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_yaml_is_an_error_that_names_the_place(what, parse):
    (old, new), message = MALFORMED[what]
    assert old in GOOD
    with pytest.raises(ValueError, match="^" + re.escape("recipe 'mine")) as error:
        parse(GOOD.replace(old, new))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output: [", "recipe 'mine' is not valid YAML: "),
        ("a: b: c", "recipe 'mine' is not valid YAML: "),
        ("", "recipe 'mine' is a YAML NoneType, not a mapping with keys description, "),
        ("- output", "recipe 'mine' is a YAML list, not a mapping"),
        ("fqt_1bit", "recipe 'mine' is a YAML str, not a mapping"),
        ("output: !!python/object/apply:os.getcwd []", "recipe 'mine' is not valid YAML: could not determine a constructor"),
    ],
)
def test_what_is_no_mapping_is_an_error(text, message, parse):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(text)


def test_a_rule_that_names_an_unknown_recipe(parse):
    with pytest.raises(ValueError, match=re.escape("unknown recipe 'int9' (did you mean 'int8'?)")):
        parse(GOOD.replace("recipe: int8}", "recipe: int9}"))


def test_rules_that_lead_back_to_their_own_file(parse, tmp_path):
    path = tmp_path / "mine.yaml"
    with pytest.raises(ValueError, match=r"mine\.yaml': its rules or `extends` lead back to itself: name another recipe there"):
        parse(GOOD.replace("recipe: int8}", f'recipe: "{path}"}}'))
    assert parse(GOOD).name == "mine", "the error leaves nothing behind"


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "picture.yaml"
    path.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match=r"recipe file '.*picture\.yaml' is not UTF-8 text"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fqt_1bt", "unknown recipe 'fqt_1bt' (did you mean 'fqt_1bit'?); built-in recipes: adapt, "),
        ("", "unknown recipe ''; built-in recipes: "),
        ("FP32", "unknown recipe 'FP32'"),
        ("dorefa_w{w}a{a}g{g}", "unknown recipe 'dorefa_w{w}a{a}g{g}'"),
        ("dorefa_w1a2", "unknown recipe 'dorefa_w1a2' (did you mean 'dorefa_w1a"),
        ("psq_b", "unknown recipe 'psq_b'"),
        ("psq_b-1", "unknown recipe 'psq_b-1'"),
        ("psq_b04", "unknown recipe 'psq_b04' (did you mean 'psq_b4'?)"),
        ("psq_b010", "unknown recipe 'psq_b010'"),
        ("psq_b٤", "unknown recipe 'psq_b٤'"),
        ("psq_b0", "recipe 'psq_b0': grad_input.g: quantizer 'psq' with {'bits': 0}: grid 'uint' has 1 to 16 bits, not 0"),
        ("psq_b17", "recipe 'psq_b17': grad_input.g: quantizer 'psq' with {'bits': 17}: grid 'uint' has 1 to 16 bits, not 17"),
        ("dorefa_w1a2g40", "recipe 'dorefa_w1a2g40': grad_input.g: quantizer 'dorefa_gradient' with {'bits': 40}: "),
        ("nowhere.yaml", "recipe file 'nowhere.yaml' does not exist; built-in recipes: adapt, "),
        ("nowhere/fqt_1bit", "recipe file 'nowhere/fqt_1bit' does not exist"),
        (Path("nowhere"), "recipe file 'nowhere' does not exist"),
        (Path("/"), "recipe file '/' does not exist"),
    ],
)
def test_an_unknown_recipe_is_an_error_that_lists_what_there_is(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_recipe(name)


@pytest.mark.parametrize("source", [None, 8, ["int8"], {"output": "float"}])
def test_what_is_neither_name_nor_path_nor_recipe(source):
    with pytest.raises(TypeError, match=f"a recipe is a name, a path or a fqt.Recipe, not {type(source).__name__}"):
        load_recipe(source)


def test_the_public_face():
    assert fqt.load_recipe is load_recipe
    assert fqt.recipes is recipes
    assert (fqt.Recipe, fqt.Product, fqt.Rule) == (Recipe, Product, Rule)


# --- extends ---------------------------------------------------------------------------------------------------------------


def test_what_a_recipe_leaves_unsaid_is_that_of_the_one_it_extends(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("extends: fqt_1bit_b8\ngrad_weight: float\n")
    recipe, base = load_recipe(own), load_recipe("fqt_1bit_b8")
    assert (recipe.name, recipe.output, recipe.grad_input) == ("own", base.output, base.grad_input)
    assert (recipe.rules, recipe.replace) == (base.rules, base.replace)
    assert recipe.quantizer("grad_weight", "g") is None and recipe.saved("grad_weight", "x")
    further = tmp_path / "further.yaml"
    further.write_text(f"extends: {own}\nrules: []\n")
    assert load_recipe(further) == replace(recipe, name="further", rules=())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("extends: fqt_1bti", "unknown recipe 'fqt_1bti' (did you mean 'fqt_1bit'?)"),
        ("extends: [int8]", "extends is ['int8'], not the name of a recipe or the path of its file"),
        ("extends: none/there.yaml", "recipe file 'none/there.yaml' does not exist"),
        ("extends: int8\noutptu: float", "has no key 'outptu' (did you mean 'output'?)"),
        ("extends: {self}", "lead back to itself"),
    ],
)
def test_what_cannot_be_extended_is_named(tmp_path, text, words):
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("{self}", str(path)))
    with pytest.raises(ValueError, match=re.escape(words)):
        load_recipe(path)


# --- stages in YAML --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operand", "words"),
    [
        ("{quantizer: uniform, calibrate: percentil}", "unknown calibration 'percentil' (did you mean 'percentile'?)"),
        ("{quantizer: uniform, calibrate: {percentile: {percnt: 9}}}", "has no option 'percnt' (did you mean 'percent'?)"),
        ("{quantizer: uniform, calibrate: {percentile: 9}}", "its options are a mapping, not 9"),
        ("{quantizer: uniform, transform: hadamard}", "is for both operands of a product: give it to the product"),
        ("{quantizer: uniform, estimator: 7}", "the estimator is a name or {name: {option: value}}, not 7"),
        ("{quantizer: agp, calibrate: percentile}", "prune goes by the range of a group"),
    ],
)
def test_a_stage_that_cannot_be_is_named(tmp_path, operand, words):
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: int8\ngrad_input: {{g: {operand}, w: saved}}\n")
    with pytest.raises(ValueError, match=re.escape(words)):
        load_recipe(path)


def test_stages_are_words_of_the_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "extends: int8\n"
        "output: {x: {quantizer: uniform, calibrate: {percentile: {percent: 99}}}, w: {quantizer: lsq, bits: 8}}\n"
        "grad_weight: {g: {quantizer: uniform}, x: {quantizer: uniform}, transform: {hadamard: {size: 16}}}\n"
    )
    recipe = load_recipe(path)
    assert recipe.describe("output") == "int8/tensor percentile(percent=99) x int8/tensor lsq"
    assert recipe.describe("grad_weight") == "int8/tensor x int8/tensor by hadamard(size=16)"
