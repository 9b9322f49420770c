"""Every kind of Linear and Conv2d, at 16 bits against torch's float layer and at 1 bit against its decoded codes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fqt
from fqt.quantizers import Quantizer, build
from fqt.recipe import Product, Recipe


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def quantizer(letter: str, name: str, **options: object) -> Quantizer:
    built = build(name, letter, **options)
    assert built is not None
    return built


FINE = {letter: quantizer(letter, "uniform", bits=16) for letter in "xwg"}
SIXTEEN = Recipe(
    "sixteen", Product(FINE["x"], FINE["w"]), Product(FINE["g"], "saved"), Product(FINE["g"], "saved")
)  # every product in integers, so fine that it must look like float
ONE_BIT = fqt.load_recipe("fqt_1bit").everywhere()
INT8 = fqt.load_recipe("int8").everywhere()

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear_no_bias": (lambda: nn.Linear(6, 5, bias=False), (4, 6)),
    "linear_1d": (lambda: nn.Linear(6, 5), (6,)),
    "linear_3d": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "linear_4d": (lambda: nn.Linear(6, 5), (2, 3, 2, 6)),
    "linear_one_output": (lambda: nn.Linear(9, 1), (4, 9)),
    "linear_one_input": (lambda: nn.Linear(1, 3), (4, 1)),
    "conv": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 6, 7)),
    "conv_no_bias": (lambda: nn.Conv2d(3, 4, 3, bias=False), (2, 3, 6, 7)),
    "conv_1x1": (lambda: nn.Conv2d(3, 4, 1), (2, 3, 4, 4)),
    "conv_1x1_strided": (lambda: nn.Conv2d(3, 4, 1, stride=2), (2, 3, 5, 4)),
    "conv_unbatched": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 6, 7)),
    "conv_unbatched_reflect": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (3, 6, 7)),
    "conv_stride": (lambda: nn.Conv2d(3, 4, 3, stride=(2, 3)), (2, 3, 8, 9)),
    "conv_stride_larger_than_kernel": (lambda: nn.Conv2d(3, 4, 2, stride=4), (2, 3, 11, 9)),
    "conv_padding": (lambda: nn.Conv2d(3, 4, 3, padding=(2, 1)), (2, 3, 4, 5)),
    "conv_padding_larger_than_kernel": (lambda: nn.Conv2d(3, 4, 2, padding=3), (2, 3, 2, 3)),
    "conv_valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 6, 5)),
    "conv_same": (lambda: nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 6, 5)),
    "conv_same_even_kernel": (lambda: nn.Conv2d(3, 4, (4, 2), padding="same"), (2, 3, 6, 5)),
    "conv_same_dilated": (lambda: nn.Conv2d(3, 4, (3, 2), padding="same", dilation=(2, 3)), (2, 3, 7, 6)),
    "conv_reflect": (lambda: nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="reflect"), (2, 3, 6, 5)),
    "conv_replicate": (lambda: nn.Conv2d(3, 4, 3, padding=(1, 3), padding_mode="replicate"), (2, 3, 4, 5)),
    "conv_circular": (lambda: nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="circular"), (2, 3, 4, 5)),
    "conv_reflect_same_even": (lambda: nn.Conv2d(3, 4, 4, padding="same", padding_mode="reflect"), (2, 3, 6, 5)),
    "conv_circular_same_even": (lambda: nn.Conv2d(3, 4, (2, 4), padding="same", padding_mode="circular"), (2, 3, 6, 5)),
    "conv_replicate_valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid", padding_mode="replicate"), (2, 3, 6, 5)),
    "conv_dilation": (lambda: nn.Conv2d(3, 4, 3, dilation=(2, 1), padding=1), (2, 3, 7, 6)),
    "conv_groups": (lambda: nn.Conv2d(6, 4, 3, groups=2, padding=1), (2, 6, 5, 4)),
    "conv_depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), (2, 4, 5, 4)),
    "conv_depthwise_multiplier": (lambda: nn.Conv2d(3, 6, (3, 1), groups=3, stride=2), (2, 3, 7, 6)),
    "conv_everything": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1), groups=2, padding_mode="reflect"),
        (3, 4, 6, 5),
    ),
    "conv_whole_image": (lambda: nn.Conv2d(3, 4, (5, 4)), (2, 3, 5, 4)),
    "conv_one_sample_one_pixel": (lambda: nn.Conv2d(3, 4, 1), (1, 3, 1, 1)),
}
cases = pytest.mark.parametrize(("make", "shape"), CASES.values(), ids=CASES)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")  # torch's layer


def run(layer: nn.Module, x: Tensor, g: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    x = x.detach().requires_grad_()
    y = layer(x)
    inputs = [x, *layer.parameters()]
    g = torch.ones_like(y) if g is None else g
    return y.detach(), list(torch.autograd.grad(y, inputs, g))


@cases
def test_sixteen_bits_look_like_torchs_layer(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    """Values within 2^-15 of the largest an operand, and outputs within the sum of those errors over their terms."""
    plain = make()
    layer = fqt.convert(copy.deepcopy(plain), SIXTEEN)
    x = torch.randn(shape)
    g = torch.randn(plain(x).shape)
    (y, grads), (expected, expected_grads) = run(layer, x, g), run(plain, x, g)
    assert y.shape == expected.shape
    for actual, wanted in zip([y, *grads], [expected, *expected_grads], strict=True):
        assert actual.shape == wanted.shape
        terms = max(x.numel(), g.numel())
        torch.testing.assert_close(actual, wanted, rtol=0, atol=2**-15 * 4 * terms**0.5 * max(1.0, float(x.abs().max())))


@cases
def test_one_bit_output_is_torchs_layer_of_the_signs(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    plain = make()
    layer = fqt.convert(copy.deepcopy(plain), ONE_BIT)
    x = torch.randn(shape)
    alpha = plain.weight.detach().abs().flatten(1).mean(1)
    with torch.no_grad():
        plain.weight.copy_(torch.where(plain.weight >= 0, 1.0, -1.0))
        bias, plain.bias = plain.bias, None
        total = plain(torch.where(x >= 0, 1.0, -1.0))  # integers: exact
        per_channel = (lambda v: v.view(-1, 1, 1)) if isinstance(plain, nn.Conv2d) else (lambda v: v)
        expected = total * per_channel(alpha)
        expected = expected if bias is None else expected + per_channel(bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)


@cases
@pytest.mark.parametrize("recipe", [INT8, ONE_BIT], ids=["int8", "fqt_1bit"])
def test_a_step_has_the_float_layers_shapes_and_no_nan(
    make: Callable[[], nn.Module], shape: tuple[int, ...], recipe: Recipe
) -> None:
    plain = make()
    layer = fqt.convert(copy.deepcopy(plain), recipe)
    y, grads = run(layer, torch.randn(shape))
    expected, expected_grads = run(plain, torch.randn(shape))
    assert y.shape == expected.shape
    assert [g.shape for g in grads] == [g.shape for g in expected_grads]
    assert all(bool(t.isfinite().all()) for t in [y, *grads])


# --- memory format ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("out", [1, 4])
@pytest.mark.parametrize("size", [(6, 5), (1, 5), (5, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("recipe", [INT8, Recipe("f", *[Product("float", "float")] * 3)], ids=["int8", "float"])
def test_output_memory_format_follows_the_input_as_torchs_does(
    recipe: Recipe, memory_format: torch.memory_format, batch: int, size: tuple[int, int], out: int, channels: int
) -> None:
    plain = nn.Conv2d(channels, out, 3, padding=1)
    x = torch.randn(batch, channels, *size).to(memory_format=memory_format)
    layer = copy.deepcopy(plain)
    layer.__class__ = fqt.QuantConv2d
    layer.recipe = recipe
    assert layer(x).stride() == plain(x).stride()


def test_an_input_with_other_strides_gives_what_torch_gives() -> None:
    plain = nn.Conv2d(3, 4, 3)
    layer = fqt.convert(copy.deepcopy(plain), INT8)
    image = torch.randn(2, 6, 16, 8)
    views = [image[:, ::2], image[:, :3, ::2], image.transpose(2, 3)[:, 1:4], image[:1, :3].expand(2, 3, 16, 8)]
    for x in views:
        assert layer(x).stride() == plain(x).stride()
        assert torch.equal(layer.eval()(x), layer(x.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("recipe", [INT8, ONE_BIT], ids=["int8", "fqt_1bit"])
def test_the_weights_memory_format_changes_no_number(recipe: Recipe, memory_format: torch.memory_format) -> None:
    layer = fqt.convert(nn.Conv2d(3, 4, 3, padding=1), recipe)
    x, found = torch.randn(2, 3, 5, 6), []
    for each in (layer, copy.deepcopy(layer).to(memory_format=memory_format)):
        torch.manual_seed(0)
        y = each(x.to(memory_format=memory_format))
        y.square().sum().backward()
        assert each.weight.grad is not None
        assert each.weight.grad.stride() == each.weight.stride()
        found.append((y, each.weight.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular", "zeros"])
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (16, 8, 8)], ids=["batch", "unbatched"])
def test_no_padding_mode_keeps_a_float_image(mode: str, shape: tuple[int, ...]) -> None:
    """torch's own reflect and replicate padding keep their whole input for the backward."""
    layer = fqt.convert(nn.Conv2d(16, 8, 3, padding=1, padding_mode=mode), ONE_BIT)
    with fqt.count_saved_bytes() as saved:
        layer(torch.randn(shape, requires_grad=True))
    assert saved.by_dtype["float32"] == 4 * (1 + 8)  # scales alone


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_the_gradient_of_padding_is_torchs(mode: str) -> None:
    recipe = Recipe("f", *[Product("float", "float")] * 3)
    plain = nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode=mode).double()
    layer = copy.deepcopy(plain)
    layer.__class__ = fqt.QuantConv2d
    layer.recipe = recipe
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    for actual, wanted in zip(run(layer, x)[1], run(plain, x)[1], strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


# --- the module's own face -------------------------------------------------------------------------------------------


def test_repr_names_the_recipe() -> None:
    assert "QuantLinear(in_features=4, out_features=3, bias=True, recipe=int8)" in repr(fqt.convert(nn.Linear(4, 3), INT8))
    conv = repr(fqt.convert(nn.Conv2d(4, 3, 3, padding="same", groups=1), ONE_BIT))
    assert "padding=same" in conv
    assert "recipe=fqt_1bit" in conv


@pytest.mark.parametrize("name", [n for n in fqt.recipes() if n != "fp32"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_quantized_weight_is_what_the_forward_multiplies_with(name: str, kind: str) -> None:
    """Probed through the layer in evaluation: an identity of inputs, whose output columns are the weight's values."""
    recipe = fqt.load_recipe(name).everywhere()
    recipe = Recipe("probe", Product("float", recipe.output.right), Product("float", "saved"), Product("float", "float"))
    layer = fqt.convert(nn.Linear(6, 5, bias=False) if kind == "linear" else nn.Conv2d(6, 5, 1, bias=False), recipe).eval()
    with torch.no_grad():
        if kind == "linear":
            probed = layer(torch.eye(6)).T
        else:
            probed = layer(torch.eye(6).view(6, 6, 1, 1)).flatten(1).T
    q = layer.quantized_weight()
    assert q is not None
    assert torch.equal(q.decode().squeeze(1), probed)


def test_quantized_weight_of_a_float_operand_is_none() -> None:
    recipe = Recipe("x_only", Product(FINE["x"], "float"), Product("float", "float"), Product("float", "saved"))
    assert fqt.convert(nn.Linear(4, 3), recipe).quantized_weight() is None


def test_a_stochastic_weight_is_rounded_to_nearest_where_it_is_looked_at_and_in_evaluation() -> None:
    stochastic = quantizer("w", "fixed_point", word_length=4, fraction_length=2)
    recipe = Recipe("sr", Product("float", stochastic), Product("float", "saved"), Product("float", "float"))
    layer = fqt.convert(nn.Linear(6, 5, bias=False), recipe)
    nearest = (layer.weight.detach() * 4).round().clip(-8, 7) / 4
    state = torch.get_rng_state()
    assert torch.equal(layer.quantized_weight().decode().squeeze(1), nearest)
    with torch.no_grad():
        assert torch.equal(layer.eval()(torch.eye(6)).T, nearest)
        assert torch.equal(torch.get_rng_state(), state), "neither draws"
        drawn = layer.train()(torch.eye(6)).T
    assert not torch.equal(drawn, nearest)
    assert bool(((drawn - layer.weight).abs() < 0.25).all())


def test_a_recipe_is_checked_when_a_layer_gets_it() -> None:
    token = quantizer("x", "uniform", granularity="token")
    recipe = Recipe("tokens", Product(token, FINE["w"]), Product("float", "saved"), Product("float", "saved"))
    linear, conv = fqt.convert(nn.Linear(4, 3), recipe), fqt.convert(nn.Conv2d(4, 3, 3), INT8)
    linear.recipe = INT8
    assert linear.recipe is INT8
    with pytest.raises(ValueError, match=r"'tokens'.*scale of x in output is one for each token.*use granularity"):
        conv.recipe = recipe
    with pytest.raises(TypeError, match=r"a fqt.Recipe, not 'int8'.*load_recipe"):
        conv.recipe = "int8"
    assert conv.recipe is INT8


def test_a_layer_without_a_recipe_says_so() -> None:
    layer = fqt.QuantLinear(4, 3)
    assert "recipe=None" in repr(layer)
    with pytest.raises(RuntimeError, match=r"QuantLinear has no recipe yet: assign its `recipe`, or make it by fqt.convert"):
        layer(torch.ones(1, 4))
    layer.recipe = INT8
    assert layer(torch.ones(1, 4)).shape == (1, 3)


def test_quantized_layers_lists_each_converted_module_once() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(4, 4), "d": nn.ReLU()})
    assert list(fqt.quantized_layers(model)) == []
    fqt.convert(model, INT8)
    assert [(name, type(layer)) for name, layer in fqt.quantized_layers(model)] == [
        ("a", fqt.QuantLinear),
        ("c", fqt.QuantLinear),
    ]


@pytest.mark.parametrize("recipe", ["fqt_1bit", "int8", "adapt"])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_alters_nothing(recipe: str, default: torch.dtype) -> None:
    """Users set it to build a model, and leave it so."""
    model = nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 1)
    )
    model, x = fqt.convert(model, fqt.load_recipe(recipe).everywhere()), torch.randn(4, 16, 8, 8)
    results = []
    try:
        for dtype in (torch.float32, default):
            torch.set_default_dtype(dtype)
            torch.manual_seed(1)
            model.zero_grad()
            model(x).square().sum().backward()
            results.append([parameter.grad for parameter in model.parameters()])
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(*results, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)
