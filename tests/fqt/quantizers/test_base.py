import re

import pytest
import torch

import fqt
from fqt.formats import Format
from fqt.quantizers import QUANTIZERS, Quantizer, build, quantize, register
from fqt.quantizers.base import transformed


@pytest.fixture
def own_quantizers(monkeypatch):
    """A registry of the test's own."""
    monkeypatch.setattr("fqt.quantizers.base.QUANTIZERS", dict(QUANTIZERS))


def refused(message: str):
    return pytest.raises(ValueError, match=re.escape(message))


def test_the_registered_quantizers_and_their_operands():
    assert {name: operands for name, (_, operands) in QUANTIZERS.items()} == {
        "affine": "xwg",
        "agp": "g",
        "dorefa_activation": "x",
        "dorefa_gradient": "g",
        "dorefa_weight": "w",
        "fixed_point": "xwg",
        "float8": "xwg",
        "lsq": "xw",
        "mx": "xwg",
        "nvfp4": "xwg",
        "pact": "x",
        "pams": "x",
        "psq": "g",
        "ternary_weight": "w",
        "uniform": "xwg",
        "xnor_activation": "x",
        "xnor_weight": "w",
    }


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("unifrom", "x"), {}, "unknown quantizer 'unifrom' (did you mean 'uniform'?); known: affine, agp, "),
        (("None", "x"), {}, "unknown quantizer 'None'"),
        (("uniform", "q"), {}, "operand 'q' is not one of x (activation), w (weight) and g (gradient)"),
        (("uniform", "xw"), {}, "operand 'xw' is not one of"),
        (("uniform", ""), {}, "operand '' is not one of"),
        (("psq", "x"), {"bits": 4}, "quantizer 'psq' is for g (gradient), not for x (activation)"),
        (("xnor_weight", "x"), {}, "quantizer 'xnor_weight' is for w (weight), not for x (activation)"),
        (("dorefa_activation", "g"), {"bits": 4}, "quantizer 'dorefa_activation' is for x (activation), not for g"),
        (("uniform", "x"), {"bit": 4}, "quantizer 'uniform' has no option 'bit' (did you mean 'bits'?); it takes bits, "),
        (("xnor_weight", "w"), {"bits": 1}, "quantizer 'xnor_weight' has no option 'bits'; it takes none"),
        (("uniform", "x"), {"name": 1}, "quantizer 'uniform' has no option 'name'"),
        (("uniform", "x"), {"operand": 1}, "quantizer 'uniform' has no option 'operand'"),
        (("psq", "g"), {}, "quantizer 'psq' with no options: "),
        (("psq", "g"), {}, "'bits'"),
        (("uniform", "x"), {"bits": 1}, "quantizer 'uniform' with {'bits': 1}: grid 'int' has 2 to 16 bits, not 1; for 1"),
        (("uniform", "x"), {"bits": 17}, "grid 'int' has 2 to 16 bits, not 17"),
        (("uniform", "x"), {"bits": 4.0}, "bits are an integer, not 4.0"),
        (("uniform", "x"), {"bits": "8"}, "bits are an integer, not '8'"),
        (("affine", "x"), {"bits": True}, "bits are an integer, not True"),
        (("uniform", "x"), {"stochastic": "no"}, "stochastic is 'no', not true or false"),
        (("uniform", "x"), {"granularity": "row"}, "granularity 'row' is not one of 'tensor', 'sample', 'token', 'channel'"),
        (("uniform", "x"), {"granularity": ["sample"]}, "granularity ['sample'] is not one of"),
        (("float8", "x"), {"grid": "int"}, "quantizer 'float8' with {'grid': 'int'}: grid 'int' is not one of 'e4m3', "),
        (("fixed_point", "w"), {"word_length": 33, "fraction_length": 1}, "word_length 33 is not an integer from 1 to 32"),
        (("fixed_point", "w"), {"word_length": 2000, "fraction_length": 1}, "word_length 2000 is not an integer"),
        (("fixed_point", "w"), {"word_length": 8, "fraction_length": 1.5}, "fraction_length 1.5 is not an integer from -64"),
        (("fixed_point", "w"), {"word_length": 8, "fraction_length": 65}, "fraction_length 65 is not an integer from -64"),
        (("dorefa_weight", "w"), {"bits": 0}, "grid 'uint' has 1 to 16 bits, not 0"),
        (("dorefa_activation", "x"), {"bits": 31}, "grid 'uint' has 1 to 16 bits, not 31"),
        (("agp", "g"), {"mode": "top"}, "mode 'top' is not 'bernoulli', 'systematic' or 'topk'"),
    ],
)
def test_build_refuses_what_is_not_there(arguments, options, message):
    with refused(message):
        build(*arguments, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": "log"}, "unknown grid 'log'"),
        ({"bits": 99}, "grid 'int' has 2 to 16 bits, not 99"),
        ({"offset": True}, "an offset belongs to the grid 'uint', not to 'int'"),
        ({"granularity": "group"}, "granularity 'group' is not one of"),
        ({"calibrate": "max"}, "unknown calibration 'max' (did you mean 'minmax'?); known: absmax, minmax, absmean, none"),
        ({"prune": "random"}, "prune 'random' is not one of '', 'bernoulli', 'systematic', 'topk'"),
        ({"transform": "sigmoid"}, "unknown transform 'sigmoid'; known: tanh"),
        ({"calibrate": "minmax"}, "calibrate 'minmax' needs an offset: use grid 'uint' with offset=True, or 'absmax'"),
        ({"calibrate": "absmean"}, "calibrate 'absmean' is for the grids sign and ternary, not 'int': use 'absmax'"),
        ({"grid": "uint"}, "grid 'uint' without an offset has no negative codes: set offset=True or calibrate='none'"),
        ({"grid": "fixed"}, "a fixed-point scale is 2^-fraction_length, not calibrated: use calibrate='none'"),
        ({"calibrate": "none", "limits": (1.0, 1.0)}, "limits (1.0, 1.0) are empty: the first must be below the second"),
        ({"calibrate": "none", "limits": (1.0, -1.0)}, "limits (1.0, -1.0) are empty"),
        ({"calibrate": "none", "limits": (-float("inf"), float("inf"))}, "limits (-inf, inf) are empty"),
        ({"calibrate": "none", "limits": (float("nan"), 1.0)}, "limits (nan, 1.0) are empty"),
        ({"limits": (-2.0, 2.0)}, "limits (-2.0, 2.0) have no effect with calibrate 'absmax': use calibrate='none'"),
        ({"calibrate": "none", "limits": (-1.0, 2.0)}, "limits (-1.0, 2.0): grid 'int' is symmetric"),
        ({"calibrate": "none", "grid": "uint"}, "limits (-1.0, 1.0): the smallest code of grid 'uint' is 0: begin at 0"),
        ({"calibrate": "none", "grid": "fixed", "limits": (0.0, 1.0)}, "the smallest code of grid 'fixed' is negative"),
        ({"grid": "sign", "bits": 1, "stochastic": True}, "the grid 'sign' has no stochastic rounding"),
        ({"keep_one_in": 4}, "keep_one_in=4 needs prune='bernoulli', 'systematic' or 'topk' and a value of at least 1"),
        ({"prune": "topk", "keep_one_in": 0}, "keep_one_in=0 needs"),
        ({"prune": "topk", "keep_one_in": 2.5}, "keep_one_in is 2.5, not an integer"),
        ({"stochastic": 1}, "stochastic is 1, not true or false"),
        ({"pass_range": (1.0, -1.0)}, "pass_range (1.0, -1.0) is empty: the first must be below the second"),
    ],
)
def test_combinations_that_mean_nothing_are_refused(options, message):
    with refused(message):
        Quantizer(**({"grid": "int", "bits": 8} | options))


def test_the_format_of_an_operand():
    assert Quantizer("int", 8, "channel").format("w") == Format("int", 8, "O")
    assert Quantizer("int", 8, "channel").format("x") == Format("int", 8, "C")
    assert Quantizer("int", 8, "sample").format("g") == Format("int", 8, "N")
    assert Quantizer("int", 8, "token").format("x") == Format("int", 8, "NP")
    assert Quantizer("int", 8, "sample_channel").format("g") == Format("int", 8, "NC")
    assert Quantizer("uint", 4, "tensor", "minmax", offset=True).format("w") == Format("uint", 4, "", True)
    with refused("a weight has no granularity 'sample': choose one of tensor, channel"):
        Quantizer("int", 8, "sample").format("w")
    with refused("operand 'y' is not one of x (activation), w (weight) and g (gradient)"):
        Quantizer("int", 8).format("y")


def test_what_draws_random_numbers():
    assert not Quantizer("int", 8).random
    assert Quantizer("int", 8, stochastic=True).random
    assert Quantizer("int", 8, prune="bernoulli", keep_one_in=2).random
    assert not Quantizer("int", 8, prune="topk", keep_one_in=2).random


def test_names_in_summaries():
    assert str(Quantizer("sign", 1, "channel", "absmean")) == "sign/channel"
    assert str(Quantizer("int", 8)) == "int8/tensor"
    assert str(build("agp", "g", bits=4, granularity="channel", mode="topk")) == "uint4/channel keep 1/4 topk"


def test_a_registered_quantizer_is_a_word_of_recipes(own_quantizers):
    @register("xg")
    def my_quantizer(bits: int = 3, wide: bool = False) -> Quantizer:
        return Quantizer("int", bits + wide, "sample")

    assert build("my_quantizer", "x") == Quantizer("int", 3, "sample")
    assert build("my_quantizer", "g", bits=5, wide=True) == Quantizer("int", 6, "sample")
    assert my_quantizer(bits=2) == Quantizer("int", 2, "sample"), "the function stays what it was"
    with refused("quantizer 'my_quantizer' is for x (activation) and g (gradient), not for w (weight)"):
        build("my_quantizer", "w")
    with refused("a quantizer named 'my_quantizer' exists already: choose another name"):
        register("w")(my_quantizer)


@pytest.mark.parametrize("operands", ["", "y", "xz", "weight"])
def test_registering_for_unknown_operands_is_refused(operands, own_quantizers):
    with refused(f"operands {operands!r} are not letters of 'xwg'"):

        @register(operands)
        def nobodys(bits: int) -> Quantizer:
            return Quantizer("int", bits)


def test_a_quantizer_that_makes_something_else_is_refused(own_quantizers):
    @register("x")
    def confused() -> str:
        return "int8"

    with refused("quantizer 'confused' made a str, not a Quantizer or None (float)"):
        build("confused", "x")


def test_a_quantizer_may_say_that_its_operand_stays_float(own_quantizers):
    @register("x")
    def nothing() -> None:
        return None

    assert build("nothing", "x") is None
    assert build("dorefa_weight", "w", bits=32) is None


def test_quantize_needs_three_axes_and_a_key_where_it_draws():
    with refused("quantize takes three axes, (N, P, C) or (O, K, I), not shape (3, 4)"):
        quantize(torch.ones(3, 4), Quantizer("int", 8), "x")
    for quantizer in (build("psq", "g", bits=4), Quantizer("int", 8, prune="bernoulli", keep_one_in=2)):
        with refused(f"{quantizer} draws random numbers: give it a key, such as torch.ops.fqt.draw_key(x)"):
            quantize(torch.ones(1, 3, 4), quantizer, "g")
    with refused("a weight has no granularity 'sample'"):
        quantize(torch.ones(1, 3, 4), Quantizer("int", 8, "sample"), "w")


def test_a_key_comes_from_torchs_generator_and_governs_the_codes():
    x = torch.linspace(-1, 1, 60).view(3, 4, 5)
    psq = build("psq", "g", bits=2)
    assert psq is not None

    def codes(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return quantize(x, psq, "g", key=torch.ops.fqt.draw_key(x))[0].codes

    assert torch.equal(codes(1), codes(1))
    assert not torch.equal(codes(1), codes(2))


def test_the_public_function_is_this_one():
    assert fqt.quantize is quantize
    assert fqt.register is register
    assert fqt.Quantizer is Quantizer


def test_the_mask_comes_with_the_codes():
    x = torch.tensor([[[-2.0, -1.0, 0.5, 3.0]]])
    _, mask = quantize(x, Quantizer("sign", 1, calibrate="none", pass_range=(-1.0, 1.0)), "x")
    assert mask.tolist() == [[[0b0110]]]
    _, mask = quantize(x, Quantizer("sign", 1, calibrate="none"), "x")
    assert mask.numel() == 0


def test_tanh_is_scaled_to_its_largest_and_differentiable():
    quantizer = Quantizer("uint", 4, "tensor", "none", offset=True, transform="tanh")
    w = torch.tensor([[[-2.0, 0.5], [0.0, 1.0]]], dtype=torch.float64, requires_grad=True)
    widest = torch.tanh(torch.tensor(2.0))
    assert torch.equal(transformed(w, quantizer), torch.tanh(w.float()) / widest)
    assert torch.equal(transformed(torch.zeros(1, 2, 2), quantizer), torch.zeros(1, 2, 2))
    assert torch.autograd.gradcheck(lambda v: torch.tanh(v) / torch.tanh(v).abs().amax(), w)  # the float64 formula
    (gradient,) = torch.autograd.grad(transformed(w, quantizer).sum(), w)
    (expected,) = torch.autograd.grad((torch.tanh(w) / torch.tanh(w).abs().amax()).sum(), w)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    plain = torch.ones(1, 1, 1)
    assert transformed(plain, Quantizer("int", 8)) is plain
