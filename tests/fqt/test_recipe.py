"""What recipes say, where they put scales, and what they refuse."""

import re
from dataclasses import replace

import pytest

from fqt.formats import Format
from fqt.quantizers import Quantizer, build
from fqt.recipe import LEFT_RIGHT, Product, Recipe, Rule
from fqt.recipe_yaml import load_recipe, recipes

# --- the built-in recipes, so that a changed YAML is noticed -----------------------------------------------------------

XNOR = "sign/tensor x sign/channel"
FOLDED = " x sign/channel (folded)"
FORWARD_FLOAT_ENDS = (("<first>", None), ("<last>", None), ("<depthwise>", None))
LINEAR_FLOAT_ENDS = (("<first>", None), ("<last>", None), ("<conv>", None))
FLOAT_ENDS = (("<first>", None), ("<last>", None), ("<downsample>", None), ("<depthwise>", None))
IDENTITY = (("ReLU", "Identity"), ("ReLU6", "Identity"))


def agp(bits: int, mode: str = "bernoulli") -> tuple[str, str]:
    kept = f" keep 1/{bits} {mode}" if bits > 1 else ""
    return f"uint{bits}/sample{kept}{FOLDED}", f"uint{bits}/channel{kept} x sign/tensor"


def psq(bits: int) -> tuple[str, str]:
    return f"uint{bits}/sample{FOLDED}", f"uint{bits}/sample (by block) x sign/tensor"


def integers(bits):
    """Symmetric integers everywhere, x by sample."""
    x, w, g = f"int{bits}/sample", f"int{bits}/channel", f"int{bits}"
    return (f"{x} x {w}", f"{g}/sample x {w} (folded)", f"{g}/channel x {x} (folded)", (bits,) * 3, 1.0, FORWARD_FLOAT_ENDS, ())


def ternary(bits):
    """Ternary weights, 8-bit x by token, gradients of `bits`."""
    x, w, g = "int8/token", "ternary/tensor", f"int{bits}"
    return f"{x} x {w}", f"{g}/sample x {w}", f"{g}/channel x {x} (folded)", (8, bits, 8), 1.0, LINEAR_FLOAT_ENDS, ()


# name: output, grad_input, grad_weight, their bits, what is kept of the gradients, rules, replace
BUILT_IN = {
    "adapt": ("fixed<16,8>/tensor x fixed<16,8>/tensor", "int8/sample x fixed<16,8>/tensor",
              "int8/channel x fixed<16,8>/tensor",
              (16, 16, 16), 1.0, (), ()),
    "adapt_calibrated": ("int8/sample x fixed<8,7>/tensor", "int8/sample x fixed<8,7>/tensor",
                         "int8/channel x int8/sample (folded)", (8, 8, 8), 1.0, (), ()),
    "bitnet": ternary(8),
    "bitnet_g4": ternary(4),
    "bitnet_g6": ternary(6),
    "dorefa_w1a1g4": ("uint1/tensor x sign/tensor", "uint4/sample x sign/tensor", "uint4/sample (by block) x uint1/tensor",
                      (1, 4, 4), 1.0, FORWARD_FLOAT_ENDS, ()),
    "dorefa_w1a2g6": ("uint2/tensor x sign/tensor", "uint6/sample x sign/tensor", "uint6/sample (by block) x uint2/tensor",
                      (2, 6, 6), 1.0, FORWARD_FLOAT_ENDS, ()),
    "dorefa_w8a8g8": ("uint8/tensor x uint8/tensor", "uint8/sample x uint8/tensor", "uint8/sample (by block) x uint8/tensor",
                      (8, 8, 8), 1.0, FORWARD_FLOAT_ENDS, ()),
    "fp32": ("float x float", "float x float", "float x float", (32, 32, 32), 1.0, (), ()),
    "fqt_1bit": (XNOR, *agp(4), (1, 4, 4), 0.25, FLOAT_ENDS, IDENTITY),
    "fqt_1bit_b1": (XNOR, *agp(1), (1, 1, 1), 1.0, FLOAT_ENDS, IDENTITY),
    "fqt_1bit_b2": (XNOR, *agp(2), (1, 2, 2), 0.5, FLOAT_ENDS, IDENTITY),
    "fqt_1bit_b8": (XNOR, *agp(8), (1, 8, 8), 0.125, FLOAT_ENDS, IDENTITY),
    "fqt_1bit_topk": (XNOR, *agp(4, "topk"), (1, 4, 4), 0.25, FLOAT_ENDS, IDENTITY),
    "fqt_w1a1g4": (XNOR, "uint4/sample" + FOLDED, "uint4/sample_channel (by block) x sign/tensor", (1, 4, 4), 1.0, FLOAT_ENDS,
                   IDENTITY),
    "fqt_w1a1g6": (XNOR, "uint6/sample" + FOLDED, "uint6/channel x sign/tensor", (1, 6, 6), 1.0, FLOAT_ENDS, IDENTITY),
    "int4": integers(4),
    "int6": integers(6),
    "int8": integers(8),
    "int8_token": ("int8/token x int8/channel", "int8/sample x int8/channel (folded)", "int8/channel x int8/token (folded)",
                   (8, 8, 8), 1.0, (*FORWARD_FLOAT_ENDS, ("<conv>", load_recipe("int8"))), ()),
    "psq_b1": (XNOR, *psq(1), (1, 1, 1), 1.0, FLOAT_ENDS, IDENTITY),
    "psq_b2": (XNOR, *psq(2), (1, 2, 2), 1.0, FLOAT_ENDS, IDENTITY),
    "psq_b4": (XNOR, *psq(4), (1, 4, 4), 1.0, FLOAT_ENDS, IDENTITY),
    "psq_b8": (XNOR, *psq(8), (1, 8, 8), 1.0, FLOAT_ENDS, IDENTITY),
    "xnor": (XNOR, "float x sign/channel", "float x sign/tensor", (1, 32, 32), 1.0, FLOAT_ENDS, IDENTITY),
}  # fmt: skip
PRODUCTS = tuple(LEFT_RIGHT)


def test_the_list_of_recipes():
    assert recipes() == sorted(BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_recipe_is_what_the_table_says(name):
    *described, bits, kept, rules, replaced = BUILT_IN[name]
    recipe = load_recipe(name)
    assert recipe.name == name
    assert [recipe.describe(product) for product in PRODUCTS] == described
    assert tuple(recipe.bits(product) for product in PRODUCTS) == bits
    assert tuple(recipe.low_bit(product) for product in PRODUCTS) == tuple(b < 32 for b in bits)
    assert [recipe.kept(product) for product in PRODUCTS] == [1.0, kept, kept]
    assert tuple((rule.match, rule.recipe) for rule in recipe.rules) == rules
    assert recipe.replace == replaced
    assert recipe.is_float == (name == "fp32")
    assert recipe.random == (name not in ("fp32", "xnor"))


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_recipe_fits_linear_layers_and_convolutions(name):
    recipe = load_recipe(name)
    rule = next((rule for rule in recipe.rules if rule.match == "<conv>"), None)
    recipe.check("linear")
    if rule is None or rule.recipe is not None:
        (recipe if rule is None else rule.recipe).check("conv")


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name not in ("fp32", "xnor")])
def test_what_is_kept_for_the_backward_is_the_codes_of_the_forward(name):
    recipe = load_recipe(name)
    for product, letter in (("grad_input", "w"), ("grad_weight", "x")):
        assert recipe.saved(product, letter)
        assert recipe.quantizer(product, letter) == recipe.quantizer("output", letter)
    assert not recipe.saved("grad_input", "g")
    assert not recipe.saved("output", "x")


def test_float_gradients_meet_the_codes_of_the_forward():
    recipe = load_recipe("xnor")
    assert recipe.grad_input == Product("float", "saved")
    assert recipe.quantizer("grad_input", "g") is None
    assert recipe.format("grad_weight", "x") == Format("sign", 1)


def test_every_option_of_the_paper_recipes_reaches_its_quantizer():
    recipe = load_recipe("fqt_1bit")
    assert recipe.quantizer("grad_input", "g") == build("agp", "g", bits=4, granularity="sample", mode="bernoulli")
    assert recipe.quantizer("grad_weight", "g") == build("agp", "g", bits=4, granularity="channel", mode="bernoulli")
    int8 = load_recipe("int8")
    assert int8.quantizer("output", "x") == build("uniform", "x", bits=8, granularity="sample")
    assert int8.quantizer("grad_weight", "g") == build("uniform", "g", bits=8, granularity="channel", stochastic=True)
    dorefa = load_recipe("dorefa_w1a2g6")
    for product in ("grad_input", "grad_weight"):
        assert dorefa.quantizer(product, "g") == build("dorefa_gradient", "g", bits=6)
    assert dorefa.quantizer("output", "w") == build("dorefa_weight", "w", bits=1)
    assert dorefa.quantizer("output", "x") == build("dorefa_activation", "x", bits=2)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("dorefa_w2a3g5", (3, 5, 5)),
        ("dorefa_w16a4g16", (16, 16, 16)),
        ("dorefa_w32a2g6", (32, 32, 6)),
        ("dorefa_w1a32g6", (32, 6, 32)),
        ("dorefa_w1a2g32", (2, 32, 32)),
        ("psq_b3", (1, 3, 3)),
        ("fqt_1bit_b16", (1, 16, 16)),
    ],
)
def test_any_member_of_a_family_is_a_recipe(name, bits):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert tuple(recipe.bits(product) for product in PRODUCTS) == bits


def test_a_family_with_nothing_but_float_is_float():
    assert load_recipe("dorefa_w32a32g32").is_float


def test_a_product_of_more_than_16_bits_is_float():
    wide = build("fixed_point", "x", word_length=17, fraction_length=8)
    narrow = build("fixed_point", "w", word_length=16, fraction_length=8)
    recipe = made(output=Product(wide, narrow))
    assert not recipe.low_bit("output")
    assert recipe.bits("output") == 32
    assert not recipe.is_float
    assert made(output=Product(narrow, narrow)).bits("output") == 16


# --- where scales go ---------------------------------------------------------------------------------------------------


def made(**products: Product) -> Recipe:
    float_ = Product("float", "float")
    return Recipe("mine", **({"output": float_, "grad_input": float_, "grad_weight": float_} | products))


def with_operand(product: str, letter: str, quantizer: Quantizer) -> Recipe:
    """The product with this operand, its other one a tensor-wide int8."""
    other = Quantizer("int", 8)
    pair = [quantizer if letter == side else other for side in LEFT_RIGHT[product]]
    return made(**{product: Product(*pair)})


OF = {"grad_input": "output channels", "grad_weight": "samples and positions", "output": "input channels"}
# (product, operand, granularity): in a linear layer, in a convolution; None: refused
PLACES = {
    ("output", "x", "tensor"): ("leaves", "leaves"),
    ("output", "x", "sample"): ("leaves", "leaves"),
    ("output", "x", "token"): ("leaves", None),
    ("output", "x", "channel"): (None, None),
    ("output", "x", "sample_channel"): (None, None),
    ("output", "w", "tensor"): ("leaves", "leaves"),
    ("output", "w", "channel"): ("leaves", "leaves"),
    ("grad_input", "g", "tensor"): ("leaves", "leaves"),
    ("grad_input", "g", "sample"): ("leaves", "leaves"),
    ("grad_input", "g", "token"): ("leaves", None),
    ("grad_input", "g", "channel"): (None, None),
    ("grad_input", "g", "sample_channel"): (None, None),
    ("grad_input", "w", "tensor"): ("leaves", "leaves"),
    ("grad_input", "w", "channel"): ("folded", "folded"),
    ("grad_weight", "g", "tensor"): ("leaves", "leaves"),
    ("grad_weight", "g", "sample"): ("by block", "by block"),
    ("grad_weight", "g", "token"): (None, None),
    ("grad_weight", "g", "channel"): ("leaves", "leaves"),
    ("grad_weight", "g", "sample_channel"): ("by block", "by block"),
    ("grad_weight", "x", "tensor"): ("leaves", "leaves"),
    ("grad_weight", "x", "sample"): ("folded", "folded"),
    ("grad_weight", "x", "token"): ("folded", None),
    ("grad_weight", "x", "channel"): (None, None),
    ("grad_weight", "x", "sample_channel"): (None, None),
}


def test_the_table_of_places_is_whole():
    x_or_g = ("tensor", "sample", "token", "channel", "sample_channel")
    granularities = {"x": x_or_g, "g": x_or_g, "w": ("tensor", "channel")}
    assert set(PLACES) == {(p, o, g) for p, operands in LEFT_RIGHT.items() for o in operands for g in granularities[o]}


@pytest.mark.parametrize("case", PLACES, ids=" ".join)
@pytest.mark.parametrize("offset", [False, True], ids=["symmetric", "affine"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_where_a_scale_goes(case, kind, offset):
    product, letter, granularity = case
    place = PLACES[case][kind == "conv"]
    quantizer = Quantizer("uint", 4, granularity, "minmax", offset=True) if offset else Quantizer("int", 4, granularity)
    if place == "folded" and offset:
        place = None
    fits_linear = PLACES[case][0] is not None and not (PLACES[case][0] == "folded" and offset)
    if not fits_linear:  # a recipe is refused when it is built
        with pytest.raises(ValueError, match=re.escape(f"recipe 'mine': the scale of {letter} in {product} is one for each")):
            with_operand(product, letter, quantizer)
        return
    recipe = with_operand(product, letter, quantizer)
    if place is None:  # or, if it fits linear layers alone, when a convolution is to follow it
        with pytest.raises(ValueError, match=re.escape(f"recipe 'mine': the scale of {letter} in {product}")):
            recipe.check(kind)
    else:
        assert recipe.place(product, letter, kind) == place
        recipe.check(kind)


@pytest.mark.parametrize(
    ("product", "letter", "granularity", "offset", "kind", "sentence"),
    [
        ("output", "x", "channel", False, "linear",
         "the scale of x in output is one for each channel, but output of a linear layer sums over channels, so it cannot "
         "leave the sum: use granularity tensor or sample"),
        ("output", "x", "sample_channel", False, "linear",
         "the scale of x in output is one for each sample, channel, but output of a linear layer sums over channels, so it "
         "cannot leave the sum: use granularity tensor or sample"),
        ("output", "x", "token", False, "conv",
         "the scale of x in output is one for each token, but output of a conv layer sums over positions, so it cannot leave "
         "the sum: use granularity tensor or sample"),
        ("grad_input", "g", "channel", False, "linear",
         "the scale of g in grad_input is one for each channel, but grad_input of a linear layer sums over channels, so it "
         "cannot leave the sum: use granularity tensor or sample"),
        ("grad_input", "g", "token", False, "conv",
         "the scale of g in grad_input is one for each token, but grad_input of a conv layer sums over positions, so it "
         "cannot leave the sum: use granularity tensor or sample"),
        ("grad_input", "w", "channel", True, "linear",
         "the scale of w in grad_input is one for each channel, but grad_input of a linear layer sums over output channels, "
         "so it cannot leave the sum: use granularity tensor, or a symmetric quantizer: an offset cannot be folded into the "
         "gradient"),
        ("grad_weight", "g", "token", False, "linear",
         "the scale of g in grad_weight is one for each token, but grad_weight of a linear layer sums over samples and "
         "positions, so it cannot leave the sum: use granularity tensor, channel, sample or sample_channel"),
        ("grad_weight", "x", "sample", True, "linear",
         "the scale of x in grad_weight is one for each sample, but grad_weight of a linear layer sums over samples, so it "
         "cannot leave the sum: use granularity tensor, or a symmetric quantizer: an offset cannot be folded into the "
         "gradient"),
        ("grad_weight", "x", "token", False, "conv",
         "the scale of x in grad_weight is one for each token, but grad_weight of a conv layer sums over samples and "
         "positions, so it cannot leave the sum: use granularity tensor or sample"),
        ("grad_weight", "x", "channel", False, "linear",
         "the scale of x in grad_weight is one for each channel, and no kernel multiplies by it there: use granularity tensor "
         "or sample"),
    ],
)  # fmt: skip
def test_a_scale_that_cannot_leave_is_refused_with_the_whole_sentence(product, letter, granularity, offset, kind, sentence):
    quantizer = Quantizer("uint", 4, granularity, "minmax", offset=True) if offset else Quantizer("int", 4, granularity)
    with pytest.raises(ValueError) as error:  # noqa: PT011 the whole text is compared
        with_operand(product, letter, quantizer).check(kind)
    assert str(error.value) == f"recipe 'mine': {sentence}"


def test_scales_of_products_that_decode_have_no_place_to_find():
    """A product with a float operand multiplies values: any granularity will do, but it must exist."""
    by_channel = Quantizer("int", 4, "channel")
    recipe = made(grad_input=Product(by_channel, "float"), output=Product(by_channel, "float"))
    assert recipe.describe("grad_input") == "int4/channel x float"
    with pytest.raises(ValueError, match="a weight has no granularity 'sample'"):
        made(output=Product("float", Quantizer("int", 4, "sample")))


# --- Python recipes that are refused -------------------------------------------------------------------------------------

SIGN = Quantizer("sign", 1, calibrate="none")


@pytest.mark.parametrize(
    ("products", "message"),
    [
        ({"output": Product("saved", SIGN)}, "output.x cannot be 'saved', no earlier product made its codes: give it a quan"),
        ({"output": Product(SIGN, "saved")}, "recipe 'mine': output.w cannot be 'saved'"),
        ({"grad_input": Product("saved", SIGN)}, "recipe 'mine': grad_input.g cannot be 'saved'"),
        ({"grad_weight": Product("saved", SIGN)}, "recipe 'mine': grad_weight.g cannot be 'saved'"),
        ({"output": Product("int8", SIGN)}, "recipe 'mine': output.x is 'int8', not a quantizer, 'saved' or 'float'"),
        ({"output": Product(None, SIGN)}, "recipe 'mine': output.x is None, not a quantizer, 'saved' or 'float'"),
        ({"output": "float"}, "recipe 'mine': output is 'float', not a Product"),
        ({"grad_input": (SIGN, SIGN)}, "recipe 'mine': grad_input is (Quantizer("),
        ({"output": Product(SIGN, Quantizer("int", 8, "token"))}, "a weight has no granularity 'token'"),
        ({"output": Product(build("agp", "g"), SIGN)}, "recipe 'mine': prune='bernoulli' of output.x would have no effect"),
        ({"grad_input": Product(Quantizer("int", 8, pass_range=(-1.0, 1.0)), SIGN)}, "pass_range=(-1.0, 1.0) of grad_input.g"),
        ({"output": Product(replace(build("dorefa_weight", "w", bits=2)), SIGN)}, "transform='tanh' of output.x would have"),
    ],
)
def test_a_recipe_in_python_that_means_nothing_is_refused(products, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        made(**products)


def test_saved_codes_of_a_float_operand_are_float():
    recipe = made(output=Product("float", SIGN), grad_weight=Product(SIGN, "saved"), grad_input=Product(SIGN, "saved"))
    assert recipe.quantizer("grad_weight", "x") is None
    assert not recipe.low_bit("grad_weight")
    assert recipe.low_bit("grad_input")


def test_everywhere_keeps_the_rule_that_says_what_a_recipe_is_not_for():
    assert load_recipe("bitnet").everywhere().rules == (Rule("<conv>", None),)


def test_everywhere_drops_the_rules_and_nothing_else():
    recipe = load_recipe("fqt_1bit")
    assert recipe.everywhere() == replace(recipe, rules=())
    assert recipe.rules
    assert recipe.everywhere().replace == recipe.replace


def test_a_recipe_is_float_only_with_its_rules():
    assert made().is_float
    assert not replace(made(), rules=(Rule("*", load_recipe("int8")),)).is_float
    assert replace(made(), rules=(Rule("*", None), Rule("x", load_recipe("fp32")))).is_float
