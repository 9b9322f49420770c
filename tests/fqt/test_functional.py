"""The three products of a layer against graphs written out here: the papers' formulas in float64, and torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fqt
from fqt import functional
from fqt.operand import STREAM
from fqt.quantizers import quantize
from fqt.recipe import Product, Recipe
from tests.fqt.helpers import fits_convolutions
from tests.fqt.layer_cases import (
    LAYERS,
    Layer,
    assert_close,
    dorefa_w,
    float_gradient_recipe,
    gradients_of,
    layers,
    quantizer,
    sign,
    symmetric,
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny shapes: more threads only wait for each other


# --- ablations: each product in float or in low bits -----------------------------------------------------------------

FIXED = {letter: quantizer(letter, "uniform", bits=5) for letter in "xwg"}


def coded(t: Tensor, on: bool) -> Tensor:
    return symmetric(5)(t) if on else t


@layers
@pytest.mark.parametrize("low_w", [False, True], ids=["dx_float", "dx_low"])
@pytest.mark.parametrize("low_x", [False, True], ids=["dw_float", "dw_low"])
@pytest.mark.parametrize("low_y", [False, True], ids=["y_float", "y_low"])
def test_each_product_runs_as_the_recipe_says_alone(layer: Layer, low_y: bool, low_x: bool, low_w: bool) -> None:
    f = "float"
    recipe = Recipe(
        "ablation",
        Product(FIXED["x"], FIXED["w"]) if low_y else Product(f, f),
        Product(FIXED["g"], FIXED["w"]) if low_w else Product(f, f),
        Product(FIXED["g"], FIXED["x"]) if low_x else Product(f, f),
    )
    assert [recipe.low_bit(p) for p in ("output", "grad_input", "grad_weight")] == [low_y, low_w, low_x]
    x, w, b = (t.requires_grad_() for t in layer.tensors())
    y = layer.run(x, w, b, recipe)
    g = torch.randn_like(y)
    actual = gradients_of(y, g, x, w, b)
    x, w, b, g = (t.detach().double() for t in (x, w, b, g))
    expected = [
        layer.float_run(coded(x, low_y), coded(w, low_y), b),
        layer.grad_input(coded(g, low_w), coded(w, low_w)),
        layer.grad_weight(coded(g, low_x), coded(x, low_x)),
        layer.canonical(g).sum((0, 1)),
    ]
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other)


def test_the_transform_of_grad_inputs_weight_stays_out_of_a_float_output() -> None:
    tanh = quantizer("w", "dorefa_weight", bits=8)
    recipe = Recipe("ablation", Product("float", "float"), Product(FIXED["g"], tanh), Product("float", "float"))
    x, w = torch.randn(4, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    y = functional.linear(x, w, None, recipe)
    assert_close(y, F.linear(x, w).detach())
    g = torch.randn_like(y)
    grad_x, grad_w = torch.autograd.grad(y, (x, w), g)
    with torch.no_grad():
        assert_close(grad_x, symmetric(5)(g) @ dorefa_w(8)(w.double()).float(), 1e-5)
        assert_close(grad_w, g.T @ x)


# --- built-in recipes: outputs and gradients from decoded codes ------------------------------------------------------

LOW_BIT = [name for name in fqt.recipes() if name != "fp32"]


def followed(layer: Layer, name: str) -> fqt.Recipe:
    recipe = fqt.load_recipe(name).everywhere()
    if layer.conv and not fits_convolutions(recipe):
        pytest.skip("for linear layers")
    return recipe


@pytest.mark.every(3)
@layers
@pytest.mark.parametrize("name", LOW_BIT)
def test_recipes_equal_products_of_decoded_codes(layer: Layer, name: str) -> None:
    recipe = followed(layer, name)
    x, w, b = (t.requires_grad_() for t in layer.tensors())
    torch.manual_seed(7)
    key = torch.ops.fqt.draw_key(x) if recipe.random else None
    torch.manual_seed(7)
    y = layer.run(x, w, b, recipe)
    g = torch.randn(y.shape) * torch.rand(y.shape[0], *[1] * (y.dim() - 1)) * 3
    grad_x, grad_w, grad_b = torch.autograd.grad(y, (x, w, b), g)

    x_quantizer, w_quantizer = recipe.quantizer("output", "x"), recipe.quantizer("output", "w")
    assert x_quantizer is not None
    assert w_quantizer is not None
    w_transformed = w.detach()
    if w_quantizer.transform:
        w_transformed = torch.tanh(w_transformed) / torch.tanh(w_transformed).abs().max()
    x_codes, _ = quantize(layer.canonical(x.detach()), x_quantizer, "x", key=key, stream=STREAM["output_x"])
    w_codes, _ = quantize(layer.canonical(w_transformed), w_quantizer, "w", key=key, stream=STREAM["output_w"])
    x_value = layer.plain(x_codes.decode(), x).double()
    w_value = layer.plain(w_codes.decode(), w).double()
    assert_close(y.detach(), layer.float_run(x_value, w_value, b.detach().double()))
    assert_close(grad_b, layer.canonical(g).sum((0, 1)))

    kind = "conv" if layer.conv else "linear"
    for product, letter, codes in (("grad_input", "w", w_codes), ("grad_weight", "x", x_codes)):
        g_quantizer = recipe.quantizer(product, "g")
        if g_quantizer is None:
            g_value, other = g.double(), codes.decode()
        else:
            fold, other = None, codes.decode()
            if recipe.place(product, letter, kind) == "folded":  # codes without a scale, and it in the gradient instead
                groups = codes.format.axes
                scale = codes.scale.view(codes.shape[0], -1, 1)
                fold = codes.scale.view(1, 1, -1) if groups == "O" else scale
                other = torch.where(scale > 0, codes.decode() / scale, 0).round()
            g_codes, _ = quantize(layer.canonical(g), g_quantizer, "g", key=key, stream=STREAM[f"{product}_g"], fold=fold)
            g_value = layer.plain(g_codes.decode(), g).double()
        if product == "grad_input":
            expected = layer.grad_input(g_value, layer.plain(other, w).double())
            if x_quantizer.pass_range:
                low, high = x_quantizer.pass_range
                expected = expected * ((x >= low) & (x <= high))
            assert_close(grad_x, expected, 2e-5)  # with two offsets, four partial sums larger than their total
        else:
            expected = layer.grad_weight(g_value, layer.plain(other, x).double())
            if w_quantizer.transform:
                source = w.detach().double().requires_grad_()
                squashed = torch.tanh(source) / torch.tanh(source).abs().max()
                (expected,) = torch.autograd.grad(squashed, source, expected)
            assert_close(grad_w, expected, 2e-5)


@layers
def test_eight_bit_gradients_stay_within_their_step(layer: Layer) -> None:
    """psq_b8: an element of g is off by less than one step R/255, hence a sum by less than the steps of its terms."""
    x, w, _ = (t.requires_grad_() for t in layer.tensors())
    y = layer.run(x, w, None, fqt.load_recipe("psq_b8").everywhere())
    g = torch.randn_like(y)
    grad_x, grad_w = torch.autograd.grad(y, (x, w), g)
    x64, w64, g64 = (t.detach().double() for t in (x, w, g))
    alpha = w64.abs().flatten(1).mean(1)
    alpha_g = alpha.view(1, -1, 1, 1) if layer.conv else alpha
    per_sample = [-1] + [1] * (g.dim() - 1)

    def steps(folded: Tensor) -> Tensor:
        rows = folded.flatten(1)
        return ((rows.amax(1) - rows.amin(1)) / 255).view(per_sample).expand_as(folded)

    exact_x = layer.grad_input(g64 * alpha_g, sign(w64)) * (x64.abs() <= 1)
    bound_x = layer.grad_input(steps(g64 * alpha_g), torch.ones_like(w64))
    exact_w = layer.grad_weight(g64, sign(x64))
    bound_w = layer.grad_weight(steps(g64), torch.ones_like(x64))
    for actual, exact, bound in ((grad_x, exact_x, bound_x), (grad_w, exact_w, bound_w)):
        error = (actual - exact).abs()
        assert bool((error <= bound * (1 + 1e-5)).all())
        assert float(error.max()) > 1e-3 * float(bound.max())  # the bound is of the right size, and g was quantized at all


@layers
@pytest.mark.parametrize("name", ["int8", "fqt_1bit", "fqt_w1a1g4", "dorefa_w8a8g8"])
def test_an_expanded_gradient_is_as_good_as_a_stored_one(layer: Layer, name: str) -> None:
    """`.sum().backward()` hands a gradient with strides of 0."""
    recipe = fqt.load_recipe(name).everywhere()
    x, w, b = (t.requires_grad_() for t in layer.tensors())
    found = []
    for stored in (False, True):
        torch.manual_seed(0)
        y = layer.run(x, w, b, recipe)
        g = torch.tensor(0.7).expand(y.shape)
        found.append(torch.autograd.grad(y, (x, w, b), g.contiguous() if stored else g))
    for one, other in zip(found[0][:2], found[1][:2], strict=True):
        assert torch.equal(one, other)
    assert_close(found[0][2], found[1][2])  # a float sum


@pytest.mark.parametrize("name", [n for n in LOW_BIT if n != "xnor"])
def test_a_gradient_that_is_not_finite_stays_visible(name: str) -> None:
    """A gradient scaler must see an overflow, and a NaN must not be rounded to a number."""
    recipe = fqt.load_recipe(name).everywhere()
    for bad in (math.inf, -math.inf, math.nan):
        x, w, b = (t.requires_grad_() for t in LAYERS["linear"].tensors())
        y = functional.linear(x * 0.1, w, b, recipe)
        g = torch.randn_like(y)
        g[1, 2] = bad
        grad_x, grad_w, grad_b = torch.autograd.grad(y, (x, w, b), g)
        for grad in (grad_x, grad_w, grad_b):
            assert not bool(grad.isfinite().all()), (bad, grad)


@pytest.mark.parametrize("name", ["int8", "xnor", "fqt_1bit", "dorefa_w8a8g8"])
def test_zero_gradients_give_zero_gradients(name: str) -> None:
    recipe = fqt.load_recipe(name).everywhere()
    for layer in LAYERS.values():
        x, w, b = (t.requires_grad_() for t in layer.tensors())
        y = layer.run(x, w, b, recipe)
        for grad in torch.autograd.grad(y, (x, w, b), torch.zeros_like(y)):
            assert not bool(grad.any())


@pytest.mark.parametrize("name", fqt.recipes())
@pytest.mark.parametrize(
    "layer",
    [Layer((0, 4), (3, 4)), Layer((2, 0, 4), (3, 4)), Layer((0, 4, 5, 5), (6, 2, 3, 3), {"groups": 2})],
    ids=str,
)
def test_an_empty_batch_gives_empty_outputs_and_zero_gradients(layer: Layer, name: str) -> None:
    recipe = followed(layer, name)
    x, w, b = (t.requires_grad_() for t in layer.tensors())
    run = functional.linear if layer.conv is None else functional.conv2d
    y = run(x, w, b, recipe, **(layer.conv or {}))
    assert y.shape == layer.float_run(x, w, b).shape
    grad_x, grad_w, grad_b = torch.autograd.grad(y, (x, w, b), torch.ones_like(y))
    assert grad_x.shape == x.shape
    assert not bool(grad_w.any())
    assert not bool(grad_b.any())


def test_gradients_have_their_tensors_dtypes() -> None:
    recipe = fqt.load_recipe("int8").everywhere()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        x, w, b = (t.to(dtype).requires_grad_() for t in LAYERS["linear"].tensors())
        y = functional.linear(x, w, b, recipe)
        assert y.dtype == dtype
        assert [t.dtype for t in torch.autograd.grad(y.sum(), (x, w, b))] == [dtype] * 3


@layers
def test_float64_stays_float64_where_the_recipe_is_float(layer: Layer) -> None:
    x, w, b = (t.double().requires_grad_() for t in layer.tensors())
    y = layer.run(x, w, b, fqt.load_recipe("fp32"))
    expected = layer.float_run(x, w, b)
    g = torch.randn_like(expected)
    for one, other in zip(gradients_of(y, g, x, w, b), gradients_of(expected, g, x, w, b), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@layers
def test_bias_is_added_to_the_product_and_optional(layer: Layer) -> None:
    recipe = fqt.load_recipe("fqt_1bit").everywhere()
    x, w, b = layer.tensors()
    with torch.no_grad():
        without, with_bias = layer.run(x, w, None, recipe), layer.run(x, w, b, recipe)
    assert torch.equal(with_bias, without + (b.view(-1, 1, 1) if layer.conv else b))


@pytest.mark.parametrize("affine_codes", [False, True], ids=["sign", "offset"])
def test_zero_padding_is_the_value_zero(affine_codes: bool) -> None:
    """Not the code 0, which an offset turns into a number, and not one of the two signs."""
    x_quantizer = quantizer("x", "affine", bits=8) if affine_codes else quantizer("x", "xnor_activation")
    recipe = float_gradient_recipe(x_quantizer, quantizer("w", "xnor_weight"))
    x, w = torch.rand(1, 1, 2, 2) + 5, torch.ones(1, 1, 3, 3)
    y = functional.conv2d(x, w, None, recipe, padding=(3, 0, 0, 3))
    value = quantize(x.flatten(2).transpose(1, 2), x_quantizer, "x")[0].decode().view(1, 1, 2, 2)
    assert_close(y, F.conv2d(F.pad(value, (0, 3, 3, 0)), w), 1e-6)
    assert y[0, 0, 0, -1].item() == 0  # a window over padding alone


# --- what is kept for the backward -----------------------------------------------------------------------------------


def saved_tensors(run: Callable[[], object]) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run()
    return kept


def nbytes(tensors: list[Tensor], dtype: torch.dtype) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t.dtype == dtype)


@layers
@pytest.mark.parametrize("name", LOW_BIT)
def test_no_float_activation_is_saved(layer: Layer, name: str) -> None:
    x, w, b = (t.requires_grad_() for t in layer.tensors())
    recipe = followed(layer, name)
    kept = saved_tensors(lambda: layer.run(x, w, b, recipe))
    size = min(x.numel(), layer.float_run(x, w).numel())
    large = [t for t in kept if t.is_floating_point() and t.numel() >= size and t.numel() != w.numel()]
    assert not large, [(t.shape, t.dtype) for t in large]
    weight = recipe.quantizer("output", "w")
    if weight is not None and not weight.transform:  # tanh keeps the weight for its derivative
        n, p, _ = layer.canonical(x).shape
        tokens = n * p if weight is not None and "P" in recipe.format("output", "x").axes else n
        assert nbytes(kept, torch.float32) <= 4 * (tokens + w.shape[0] + 4), "more floats than scales"


def test_a_one_bit_activation_costs_one_bit_and_a_mask_bit() -> None:
    x, w = torch.randn(6, 72, requires_grad=True), torch.randn(24, 72, requires_grad=True)
    kept = saved_tensors(lambda: functional.linear(x, w, None, fqt.load_recipe("fqt_1bit").everywhere()))
    activation, mask, weight = 6 * 72 // 8, 6 * 72 // 8, 24 * 72 // 8
    assert nbytes(kept, torch.uint8) == activation + mask + weight
    assert nbytes(kept, torch.float32) == 4 * (1 + 24)  # one scale of x, alpha of w
    assert nbytes(kept, torch.int64) == 8  # the key
    assert sum(t.numel() * t.element_size() for t in kept) == activation + mask + weight + 4 * 25 + 8


def test_a_one_bit_image_costs_one_bit_and_a_mask_bit() -> None:
    x, w = torch.randn(2, 16, 5, 5, requires_grad=True), torch.randn(8, 16, 3, 3, requires_grad=True)
    kept = saved_tensors(lambda: functional.conv2d(x, w, None, fqt.load_recipe("xnor").everywhere()))
    assert nbytes(kept, torch.uint8) == 2 * (2 * 25 * 16 // 8) + 8 * 9 * 16 // 8
    assert sum(t.numel() * t.element_size() for t in kept) == 2 * (2 * 25 * 2) + 8 * 9 * 2 + 4 * (1 + 8)


@pytest.mark.parametrize("name", LOW_BIT)
def test_a_frozen_weight_keeps_nothing_of_x_and_the_other_way_round(name: str) -> None:
    recipe = fqt.load_recipe(name).everywhere()
    x, w, b = torch.randn(64, 96), torch.randn(8, 96), torch.randn(8)
    scales = 8 + 4 * (1 + w.shape[0]) + 4  # key, alpha, offset
    bits = {letter: recipe.format("output", letter) for letter in "xw"}

    def codes(letter: str, t: Tensor) -> int:
        format = bits[letter]
        assert format is not None
        return t.shape[0] * math.ceil(t.shape[1] * format.storage_bits / 8)

    mask = x.shape[0] * math.ceil(x.shape[1] / 8)
    weight = recipe.quantizer("output", "w")
    assert weight is not None
    for x_needs, w_needs in ((True, False), (False, True), (False, False)):
        x, w = x.detach().requires_grad_(x_needs), w.detach().requires_grad_(w_needs)
        kept = saved_tensors(lambda: functional.linear(x, w, b.requires_grad_(), recipe))  # noqa: B023
        if weight.transform and w_needs:
            continue  # tanh keeps the weight for its derivative
        total = sum(t.numel() * t.element_size() for t in kept)
        allowed = scales + (codes("w", w) + mask if x_needs else 0) + (codes("x", x) + 4 * x.shape[0] if w_needs else 0)
        assert total <= allowed, (x_needs, w_needs, [(t.shape, t.dtype) for t in kept])
        scales_of_a_tensor = max(w.shape[0], x.shape[0] if w_needs else 0)
        assert not any(t.is_floating_point() and t.numel() > scales_of_a_tensor for t in kept)


def test_a_float_product_keeps_the_input_itself_and_no_copy() -> None:
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    kept = saved_tensors(lambda: functional.linear(x, w, None, fqt.load_recipe("fp32")))
    addresses = {t.data_ptr() for t in kept if t.numel()}
    assert addresses == {x.data_ptr(), w.data_ptr()}


# --- errors ----------------------------------------------------------------------------------------------------------

INT8 = fqt.load_recipe("int8").everywhere()
ones = torch.ones


def linear(x: Tensor, w: Tensor) -> Tensor:
    return functional.linear(x, w, None, INT8)


def conv(x: Tensor, w: Tensor, **options: object) -> Tensor:
    return functional.conv2d(x, w, None, INT8, **options)  # type: ignore[arg-type]


ERRORS = [
    (lambda: linear(ones(2, 5), ones(3, 4)), ValueError, ["(2, 5)", "(3, 4)", "last axis must be 4"]),
    (lambda: linear(ones(()), ones(3, 4)), ValueError, ["shape ()"]),
    (lambda: linear(ones(2, 4), ones(3, 4, 1, 1)), ValueError, ["(3, 4, 1, 1)"]),
    (lambda: linear(ones(2, 4).long(), ones(3, 4)), TypeError, ["input", "torch.int64", ".float()"]),
    (lambda: linear(ones(2, 4) > 0, ones(3, 4)), TypeError, ["torch.bool"]),
    (lambda: linear(ones(2, 4) + 1j, ones(3, 4)), TypeError, ["torch.complex64"]),
    (lambda: linear(ones(2, 4), ones(3, 4).int()), TypeError, ["weight", "torch.int32"]),
    (lambda: linear(ones(2, 4, device="meta"), ones(3, 4)), ValueError, ["input is on meta", "weight on cpu", "move"]),
    (lambda: conv(ones(2, 3, 5, 5), ones(4, 2, 3, 3)), ValueError, ["(2, 3, 5, 5)", "(4, 2, 3, 3)", "(N, 2, H, W)"]),
    (lambda: conv(ones(2, 3, 5, 5), ones(4, 2, 3, 3), groups=2), ValueError, ["groups=2", "(N, 4, H, W)"]),
    (lambda: conv(ones(2, 4, 5, 5), ones(3, 2, 3, 3), groups=2), ValueError, ["(3, 2, 3, 3)", "multiple of groups"]),
    (lambda: conv(ones(2, 4, 5, 5), ones(3, 4)), ValueError, ["(3, 4)", "(O, I/groups, kh, kw)"]),
    (lambda: conv(ones(5, 5), ones(4, 5, 3, 3)), ValueError, ["(5, 5)", "(N, 5, H, W)"]),
    (lambda: conv(ones(1, 1, 2, 5, 5), ones(4, 2, 3, 3)), ValueError, ["(1, 1, 2, 5, 5)"]),
    (lambda: conv(ones(1, 2, 4, 4), ones(4, 2, 5, 3)), ValueError, ["5x3 window", "4x4 input", "padding"]),
    (lambda: conv(ones(1, 2, 4, 4), ones(4, 2, 3, 3), dilation=(2, 2)), ValueError, ["3x3", "(2, 2)", "4x4"]),
]


@pytest.mark.parametrize(("call", "kind", "words"), ERRORS)
def test_a_misfit_is_named(call: Callable[[], object], kind: type[Exception], words: list[str]) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


@pytest.mark.parametrize("name", ["int8", "fqt_1bit", "fp32"])
def test_a_second_derivative_raises_and_is_never_dropped(name: str) -> None:
    """Where the gradient that arrives is a constant (y.sum()), torch's own once_differentiable says nothing."""
    x, w = ones(2, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    recipe = fqt.load_recipe(name).everywhere()
    for loss in (lambda y: y.sum(), lambda y: y.square().sum()):
        (grad,) = torch.autograd.grad(loss(functional.linear(x, w, None, recipe)), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"cannot be differentiated again.*keep the layers float"):
            (grad.square().sum() + functional.linear(x, w, None, recipe).sum()).backward()
