"""observe_gradients and count_saved_bytes against direct computations, and that looking disturbs nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fqt
from fqt.quantizers import quantize
from fqt.recipe import Recipe, Rule

INT8 = fqt.load_recipe("int8").everywhere()
ONE_BIT = fqt.load_recipe("fqt_1bit").everywhere()
RECIPES = {
    name: recipe.everywhere()
    for name, recipe in ((name, fqt.load_recipe(name)) for name in fqt.recipes())
    if name != "fp32" and Rule("<conv>", None) not in recipe.rules
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def direct(layer: nn.Module, g: Tensor) -> dict[str, float]:
    """||Q(g) - g||^2 / ||g||^2 with the observer's key."""
    if isinstance(layer, nn.Conv2d):
        g_NPO = (g if g.dim() == 4 else g[None]).flatten(2).transpose(1, 2)
    else:
        g_NPO = g.reshape(g.shape[0] if g.dim() > 1 else 1, -1, g.shape[-1])
    found = {}
    for product in ("grad_input", "grad_weight"):
        quantizer = layer.recipe.quantizer(product, "g")  # type: ignore[union-attr]
        if quantizer is not None:
            q, _ = quantize(g_NPO, quantizer, "g", key=torch.zeros((), dtype=torch.int64))
            found[product] = float((q.decode() - g_NPO).double().square().sum() / g_NPO.double().square().sum())
    return found


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (8, 6)),
    "linear_1d": (lambda: nn.Linear(6, 5), (6,)),
    "linear_tokens": (lambda: nn.Linear(6, 5), (4, 3, 6)),
    "linear_4d": (lambda: nn.Linear(6, 5), (4, 3, 2, 6)),
    "conv": (lambda: nn.Conv2d(3, 5, 3, stride=2), (4, 3, 7, 6)),
    "conv_unbatched": (lambda: nn.Conv2d(3, 5, 3), (3, 5, 6)),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_error_is_that_of_the_layers_own_quantizers(kind: str, recipe: Recipe) -> None:
    make, shape = LAYERS[kind]
    layer = fqt.convert(make(), recipe)
    with fqt.observe_gradients(layer) as seen:
        y = layer(torch.randn(shape))
        g = torch.randn_like(y)
        y.backward(g)
    expected = direct(layer, g)
    assert seen.get("", {}) == pytest.approx(expected, rel=1e-6)
    if kind == "linear_tokens" and recipe.name in ("fqt_1bit", "psq_b2", "int8"):
        low, high = {"fqt_1bit": (0.3, 20), "psq_b2": (0.01, 1), "int8": (1e-7, 1e-3)}[recipe.name]
        assert low < expected["grad_input"] < high, "of the size that so many bits give"


def net(recipe: Recipe | str) -> nn.Sequential:
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(96, 4),
    )
    return fqt.convert(model, recipe)  # type: ignore[return-value]


def run(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(9)
    x = torch.randn(5, 3, 6, 6, requires_grad=True)
    y = model(x)
    y.square().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None), torch.get_rng_state()]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_observing_changes_no_bit(recipe: Recipe) -> None:
    """Gradients, the generator, and what runs afterwards."""
    model = net(recipe)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    expected = run(model)
    with fqt.observe_gradients(model) as seen:
        observed = run(model)
    assert [torch.equal(a, b) for a, b in zip(expected, observed, strict=True)] == [True] * len(expected)
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(torch.equal(a, b) for a, b in zip(expected, run(model), strict=True))
    if not recipe.name.startswith("fqt_1bit"):  # where a layer further down may have pruned all samples
        assert set(seen) == (set() if recipe.name == "xnor" else {"0", "2", "5"})


def test_an_activation_in_place_hides_no_layer() -> None:
    model = fqt.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(inplace=True)), INT8)
    with fqt.observe_gradients(model) as seen:
        model(torch.randn(2, 3, 6, 6)).sum().backward()
    assert set(seen) == {"0", "2"}


def test_float_layers_and_float_gradients_have_no_entry() -> None:
    model = net("int8")
    with fqt.observe_gradients(model) as seen:
        run(model)
    assert set(seen) == {"2"}
    assert set(seen["2"]) == {"grad_input", "grad_weight"}
    model = fqt.convert(nn.Linear(4, 3), fqt.load_recipe("xnor").everywhere())
    with fqt.observe_gradients(model) as seen:
        model(torch.randn(2, 4)).sum().backward()
    assert seen == {}


def test_a_zero_gradient_or_none_has_no_entry() -> None:
    model = fqt.convert(nn.Linear(4, 3), INT8)
    with fqt.observe_gradients(model) as seen:
        (model(torch.randn(2, 4)) * 0).sum().backward()
        with torch.no_grad():
            model(torch.randn(2, 4))
    assert seen == {}


def test_an_error_within_the_block_leaves_no_hooks() -> None:
    model = net(INT8)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(ZeroDivisionError), fqt.observe_gradients(model):
        raise ZeroDivisionError
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


def test_observing_under_autocast_and_in_bfloat16() -> None:
    model = fqt.convert(nn.Linear(8, 3), INT8)
    with fqt.observe_gradients(model) as seen:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(torch.randn(4, 8))
        y.float().square().sum().backward()
    assert 0 < seen[""]["grad_input"] < 1e-3
    model.bfloat16()
    with fqt.observe_gradients(model) as seen:
        model(torch.randn(4, 8).bfloat16()).square().sum().backward()
    assert 0 < seen[""]["grad_input"] < 1e-3


# --- bytes saved for the backward -----------------------------------------------------------------------------------------


def test_saved_bytes_of_a_float_linear_are_its_input() -> None:
    model, x = nn.Linear(6, 5), torch.randn(4, 6)
    with fqt.count_saved_bytes() as saved:
        y = model(x)
    assert (saved.bytes, saved.by_dtype) == (4 * 6 * 4, {"float32": 96})
    y.sum().backward()
    assert model.weight.grad is not None
    with fqt.count_saved_bytes(x) as saved:
        model(x)
    assert (saved.bytes, saved.by_dtype) == (0, {})


def test_saved_bytes_by_hand_along_a_chain() -> None:
    x, model = torch.randn(4, 6), nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3, dtype=torch.float32))
    with fqt.count_saved_bytes(x) as saved:
        model(x)
    assert saved.bytes == 4 * 8 * 4, "tanh's output, which the second layer keeps as well, once"
    with fqt.count_saved_bytes() as saved, torch.no_grad():
        model(x)
    assert saved.bytes == 0


def test_storages_are_counted_whole_and_once() -> None:
    x = torch.randn(10, 6, requires_grad=True)
    other = torch.randn(6)
    with fqt.count_saved_bytes() as saved:
        part = x[:2]
        (part * other).sum()
        (part * other).sum()
    assert saved.bytes == 10 * 6 * 4 * 0 + 6 * 4, "x is asked for no product's sake; other is kept once"
    with fqt.count_saved_bytes() as saved:
        (x[:2] * x[2:4]).sum()
    assert saved.bytes == 10 * 6 * 4, "two slices of one storage"


def test_views_of_parameters_are_not_counted() -> None:
    weight = nn.Parameter(torch.randn(6, 5))
    x = torch.randn(4, 5)
    with fqt.count_saved_bytes(x) as saved:
        (x @ weight.T).sum()
        (x @ weight[2:].T).sum()
    assert saved.bytes == 0


def test_saved_bytes_of_a_one_bit_layer_by_hand() -> None:
    x, layer = torch.randn(6, 72, requires_grad=True), fqt.convert(nn.Linear(72, 24), ONE_BIT)
    with fqt.count_saved_bytes() as saved:
        layer(x)
    codes_and_mask = 2 * 6 * 72 // 8
    assert saved.by_dtype == {"uint8": codes_and_mask + 24 * 72 // 8, "float32": 4 + 24 * 4, "int64": 8}
    assert saved.bytes == sum(saved.by_dtype.values())
    with fqt.count_saved_bytes() as plain:
        fqt.revert(copy.deepcopy(layer))(x)
    assert plain.bytes == 6 * 72 * 4


def test_a_convolution_saves_a_thirty_second() -> None:
    """Issue: the convolutions' share near 1/32, and as much again for the clip mask."""
    conv = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    x = torch.randn(8, 64, 16, 16, requires_grad=True)
    with fqt.count_saved_bytes() as plain:
        conv(x)
    with fqt.count_saved_bytes() as saved:
        fqt.convert(conv, ONE_BIT)(x)
    weight = 64 * 64 * 9 // 8 + 64 * 4
    assert saved.bytes - weight - 4 - 8 == plain.bytes / 16


def test_the_graph_still_works_after_counting() -> None:
    model = net(ONE_BIT)
    expected = run(model)
    with fqt.count_saved_bytes() as saved:
        observed = run(model)
    assert saved.bytes > 0
    assert all(torch.equal(a, b) for a, b in zip(expected, observed, strict=True))
