"""What a converted model promises its training loop: recomputation, accumulation, reproducibility, state, precision."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fqt
from fqt.operand import STREAM
from fqt.recipe import Recipe
from tests.fqt.contract_cases import (
    RANDOM,
    RECIPES,
    batch,
    gradients,
    net,
    recipes,
    same,
)
from tests.fqt.helpers import pickled, torch_saved

INT8 = fqt.load_recipe("int8").everywhere()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# --- recomputation -----------------------------------------------------------------------------------------------------


@recipes
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.every(3)
def test_checkpointing_is_bit_identical(recipe: Recipe, reentrant: bool) -> None:
    model = net(recipe)

    def run(x: Tensor) -> Tensor:
        for segment in model.segments():
            x = checkpoint(segment, x, use_reentrant=reentrant)
        return x

    expected, actual = gradients(model), gradients(model, run)
    assert same(expected, actual), [bool(torch.equal(a, b)) for a, b in zip(expected, actual, strict=True)]


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_checkpointing_one_segment_in_the_middle(reentrant: bool) -> None:
    model = net(RECIPES["fqt_1bit"])
    first, middle, last = model.segments()
    run = lambda x: last(checkpoint(middle, first(x), use_reentrant=reentrant))  # noqa: E731
    assert same(gradients(model), gradients(model, run))


def test_checkpoint_sequential_of_many_segments() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.Tanh())])
    fqt.convert(model, RECIPES["stochastic_forward"])
    run = lambda x: checkpoint_sequential(model, 4, x, use_reentrant=False).mean((2, 3))  # noqa: E731
    target = lambda x: model(x).mean((2, 3))  # noqa: E731
    found = []
    for forward in (run, target):
        model.zero_grad()
        torch.manual_seed(1)
        forward(batch()[0].requires_grad_()).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert same(*found)


def test_checkpointing_without_the_generators_state_would_be_seen() -> None:
    """The test above can fail: without preserve_rng_state the codes differ."""
    model = net(RECIPES["stochastic_forward"])
    run = lambda x: checkpoint(model, x, use_reentrant=True, preserve_rng_state=False)  # noqa: E731
    assert not same(gradients(model), gradients(model, run))


# --- accumulation, and a module used twice ------------------------------------------------------------------------------


@recipes
@pytest.mark.every(2)
def test_micro_batches_add_their_gradients(recipe: Recipe) -> None:
    model, (x, target) = net(recipe).eval(), batch(6)

    def step(part: slice, seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        nn.functional.cross_entropy(model(x[part]), target[part], reduction="sum").backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    alone = []
    for i in range(3):
        model.zero_grad()
        alone.append(step(slice(2 * i, 2 * i + 2), i))
    model.zero_grad()
    for i in range(3):
        together = step(slice(2 * i, 2 * i + 2), i)
    for k, total in enumerate(together):
        assert torch.equal(total, alone[0][k] + alone[1][k] + alone[2][k])


@pytest.mark.parametrize("name", ["xnor", "int8"])
def test_micro_batches_equal_the_batch_where_scales_are_by_sample(name: str) -> None:
    """Nothing but float sums and the draws then depend on how a batch is cut."""
    recipe = RECIPES[name]
    model, (x, target) = net(recipe).eval(), batch(6)
    found = []
    for size in (6, 2):
        model.zero_grad()
        for first in range(0, 6, size):
            part = slice(first, first + size)
            nn.functional.cross_entropy(model(x[part]), target[part], reduction="sum").backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        tolerance = 1e-6 if name == "xnor" else 0.05  # int8: one step of 127 and its accumulation over layers
        assert (one - other).norm() <= tolerance * one.norm()


@pytest.mark.parametrize("name", RANDOM)
def test_a_module_called_twice_draws_twice(name: str) -> None:
    torch.manual_seed(0)
    layer = fqt.convert(nn.Linear(40, 30), RANDOM[name])
    x = torch.randn(8, 5, 40, requires_grad=True)  # with positions: a block of (sample, channel) alone would be one number
    g = torch.randn(8, 5, 30) * torch.rand(8, 1, 1)
    one, two = layer(x), layer(x)
    grads = [torch.autograd.grad(y, (x, layer.weight), g) for y in (one, two)]
    assert not torch.equal(grads[0][0], grads[1][0])
    assert not torch.equal(grads[0][1], grads[1][1])


def test_every_draw_of_a_call_has_a_stream_of_its_own() -> None:
    used = [stream + extra for stream in STREAM.values() for extra in (0, 1)]  # rounding, and pruning one further
    assert len(set(used)) == len(used) == 2 * (6 + 3)  # of operands, and of transforms of a product


# --- state ---------------------------------------------------------------------------------------------------------------


@recipes
def test_evaluation_without_gradients_changes_nothing(recipe: Recipe) -> None:
    model = net(recipe).eval()
    x, _ = batch()
    state, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    versions = [t._version for t in model.state_dict().values()]
    with torch.no_grad():
        first, second = model(x), model(x)
    with torch.inference_mode():
        third = model(x)
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [t._version for t in model.state_dict().values()] == versions
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert list(model.state_dict()) == list(state)


@recipes
def test_evaluation_is_the_same_with_gradients(recipe: Recipe) -> None:
    model, (x, _) = net(recipe).eval(), batch()
    with torch.no_grad():
        expected = model(x)
    assert torch.equal(model(x), expected)


@recipes
def test_a_seed_reproduces_and_another_does_not(recipe: Recipe) -> None:
    model = net(recipe)
    model.drop.p = 0.0
    first, second = gradients(model), gradients(model)
    assert same(first, second)
    x, target = batch()
    torch.manual_seed(12)
    model.zero_grad()
    nn.functional.cross_entropy(model(x), target).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert same(grads, first[2:-1]) is not recipe.random


@recipes
def test_the_generators_state_moves_only_where_the_recipe_is_random(recipe: Recipe) -> None:
    model, (x, _) = net(recipe), batch()
    model.drop.p = 0.0
    state = torch.get_rng_state()
    model(x)
    assert torch.equal(torch.get_rng_state(), state) is not recipe.random


def train(recipe: Recipe, threads: int, steps: int = 3) -> dict[str, Tensor]:
    torch.set_num_threads(threads)
    model = net(recipe)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    x, target = batch(16)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()
    return {k: v.clone() for k, v in model.state_dict().items()}


LOW_BIT_THROUGHOUT = {
    name: recipe for name, recipe in RECIPES.items() if all(map(recipe.low_bit, ("output", "grad_input", "grad_weight")))
}  # a float product's order of summation is torch's, and changes with its threads


@pytest.mark.parametrize("recipe", LOW_BIT_THROUGHOUT.values(), ids=LOW_BIT_THROUGHOUT)
@pytest.mark.every(3)
def test_two_runs_and_two_threads_give_identical_weights(recipe: Recipe) -> None:
    one, again, two = train(recipe, 1), train(recipe, 1), train(recipe, 2)
    for name, value in one.items():
        assert torch.equal(value, again[name]), name
        assert torch.equal(value, two[name]), name


def test_only_float_gradients_are_left_out_above() -> None:
    assert set(RECIPES) - set(LOW_BIT_THROUGHOUT) == {"xnor"}


@pytest.mark.parametrize("name", ["fqt_1bit", "int8", "dorefa_w8a8g8", "fqt_w1a1g4"])
def test_threads_change_no_bit_of_a_step_that_is_large_enough_to_be_split(name: str) -> None:
    layer = fqt.convert(nn.Conv2d(24, 40, 3, padding=1), RECIPES[name])
    x, found = torch.randn(16, 24, 15, 15, requires_grad=True), []
    g = torch.randn(16, 40, 15, 15)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        y = layer(x)
        found.append([y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), g)])
    assert same(found[0], found[1])
    assert same(found[0], found[2])


@recipes
def test_no_uninitialized_memory_is_read(recipe: Recipe, request: pytest.FixtureRequest) -> None:
    model = net(recipe)
    expected = gradients(model)
    request.getfixturevalue("poisoned_memory")
    assert bool(torch.empty(3).isnan().all())
    assert same(expected, gradients(model))


# --- weights are never stale ---------------------------------------------------------------------------------------------


def _step(layer: nn.Module) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), 10.0)
    layer(torch.randn(4, 7)).square().sum().backward()
    optimizer.step()


def _load(layer: nn.Module) -> None:
    layer.load_state_dict({k: torch.randn_like(v) for k, v in layer.state_dict().items()})


def _assign(layer: nn.Module) -> None:
    layer.load_state_dict({k: torch.randn_like(v) for k, v in layer.state_dict().items()}, assign=True)


def _data(layer: nn.Module) -> None:
    layer.weight.data.neg_()  # type: ignore[operator]


def _new_data(layer: nn.Module) -> None:
    layer.weight.data = torch.randn_like(layer.weight)  # type: ignore[arg-type]


def _parameter(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))  # type: ignore[arg-type]


def _set(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.weight[0, 0] = 1000.0  # type: ignore[index]


@recipes
@pytest.mark.parametrize("change", [_step, _load, _assign, _data, _new_data, _parameter, _set], ids=lambda f: f.__name__)
@pytest.mark.every(5)
def test_the_forward_sees_every_change_of_the_weight(recipe: Recipe, change: Callable[[nn.Module], None]) -> None:
    layer = fqt.convert(nn.Linear(7, 5), recipe)
    x = torch.eye(7)  # odd: no sum of signs is zero
    with torch.no_grad():
        before = layer.eval()(x)
    change(layer)
    fresh = nn.Linear(7, 5)
    fresh.load_state_dict(layer.state_dict())
    fqt.convert(fresh, recipe).eval()
    with torch.no_grad():
        after = layer.eval()(x)
        assert not torch.equal(after, before)
        assert torch.equal(after, fresh(x))


# --- copies --------------------------------------------------------------------------------------------------------------


@recipes
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, torch_saved], ids=lambda f: f.__name__)
@pytest.mark.every(4)
def test_a_copy_trains_the_same_and_apart(recipe: Recipe, copied: Callable[[nn.Module], nn.Module]) -> None:
    model = net(recipe)
    twin = copied(model)
    assert [layer.recipe for _, layer in fqt.quantized_layers(twin)] == [
        layer.recipe for _, layer in fqt.quantized_layers(model)
    ]
    assert same(gradients(model), gradients(twin, twin))
    with torch.no_grad():
        twin.head.weight.zero_()  # type: ignore[union-attr]
    assert bool(model.head.weight.any())
    fqt.revert(twin)
    assert type(model.first) is fqt.QuantConv2d
    assert not any(m._forward_hooks for m in twin.modules())


def test_a_copy_made_with_activations_replaced_reverts() -> None:
    model = fqt.convert(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), "xnor")
    twin = torch_saved(model)
    fqt.revert(twin)
    assert [type(m) for m in twin] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]


# --- precision -----------------------------------------------------------------------------------------------------------


@recipes
def test_autocast_rounds_only_what_leaves_the_operator(recipe: Recipe) -> None:
    """Within, a product in bfloat16 would not be the sum of its codes."""
    torch.manual_seed(0)
    linear, conv = nn.Linear(300, 5), nn.Conv2d(40, 5, 3, padding=1)
    for layer, x in ((linear, torch.randn(4, 300)), (conv, torch.randn(2, 40, 5, 5))):
        fqt.convert(layer, recipe).eval()
        with torch.no_grad():
            expected = layer(x).bfloat16()
            with torch.autocast("cpu", torch.bfloat16):
                actual = layer(x)
        assert actual.dtype == torch.bfloat16
        assert torch.equal(actual, expected)


@recipes
@pytest.mark.parametrize("within", [True, False], ids=["backward_within", "backward_after"])
def test_a_step_under_autocast_is_near_the_one_without(recipe: Recipe, within: bool) -> None:
    layer, x = fqt.convert(nn.Linear(64, 8), recipe), torch.randn(16, 64).requires_grad_()
    g = torch.randn(16, 8).bfloat16()
    torch.manual_seed(1)
    layer(x).backward(g.float())
    expected = [t.grad.clone() for t in (x, layer.weight, layer.bias)]
    x.grad, layer.weight.grad, layer.bias.grad = None, None, None
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        if within:
            y.backward(g)
    if not within:
        y.backward(g)
    for tensor, wanted in zip((x, layer.weight, layer.bias), expected, strict=True):
        assert tensor.grad.dtype == torch.float32
        if recipe.low_bit("grad_weight") or not within:
            assert torch.equal(tensor.grad, wanted), "the same codes: nothing but g went through bfloat16"
        else:  # a float product is autocast's own
            torch.testing.assert_close(tensor.grad, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))


def test_autocast_leaves_float64_alone_as_torch_does() -> None:
    layer = fqt.convert(nn.Linear(4, 3), INT8).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 4).double()).dtype == torch.float64
        assert nn.Linear(4, 3).double()(torch.randn(2, 4).double()).dtype == torch.float64


@recipes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_models_of_another_dtype_train(recipe: Recipe, dtype: torch.dtype) -> None:
    model = fqt.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 9, 5)), recipe).to(dtype)
    y = model(batch()[0].to(dtype))
    assert y.dtype == dtype
    y.square().sum().backward()
    for p in model.parameters():
        assert p.grad is not None
        assert p.grad.dtype == p.dtype == dtype
        assert bool(p.grad.isfinite().all())


# --- torch.func ------------------------------------------------------------------------------------------------------------


@recipes
def test_functional_call_computes_with_the_given_parameters(recipe: Recipe) -> None:
    model, other, (x, _) = net(recipe), net(recipe, seed=4), batch()
    expected = gradients(other)
    torch.manual_seed(11)
    y = torch.func.functional_call(model, dict(other.named_parameters()), (x,))
    assert torch.equal(nn.functional.cross_entropy(y, batch()[1]).detach(), expected[0])
    assert not torch.equal(gradients(model)[0], expected[0])


@pytest.mark.parametrize("name", ["fqt_1bit", "int8", "dorefa_w1a2g6", "dorefa_w8a8g8", "xnor", "fqt_w1a1g4"])
def test_func_grad_equals_backward(name: str) -> None:
    model, (x, target) = net(RECIPES[name]), batch()
    parameters = {k: p.detach() for k, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(model, parameters, (x,)), target)

    torch.manual_seed(11)
    actual, value = torch.func.grad_and_value(loss)(parameters)
    expected = gradients(model)
    assert torch.equal(value, expected[0])
    for (key, p), grad in zip(model.named_parameters(), expected[2:-1], strict=True):
        assert torch.equal(actual[key], grad), key
        assert p.grad is not None


def test_per_sample_gradients_by_vmap_are_refused_clearly() -> None:
    layer = fqt.convert(nn.Linear(4, 3), INT8)
    parameters = {k: p.detach() for k, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).sum()

    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(torch.func.grad(loss), (None, 0), randomness="different")(parameters, torch.randn(5, 4))


# --- second derivatives ----------------------------------------------------------------------------------------------------


def test_a_gradient_penalty_on_a_converted_critic_raises() -> None:
    critic = fqt.convert(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), INT8)
    x = torch.randn(5, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        (critic(x).mean() + (grad.norm(dim=1) - 1).square().mean()).backward()


def test_create_graph_without_a_second_derivative_is_harmless() -> None:
    layer, x = fqt.convert(nn.Linear(4, 3), INT8), torch.randn(5, 4)
    torch.manual_seed(0)
    layer(x).sum().backward()
    expected = layer.weight.grad.clone()
    torch.manual_seed(0)
    (grad,) = torch.autograd.grad(layer(x).sum(), layer.weight, create_graph=True)
    assert torch.equal(grad.detach(), expected)


# --- memory ----------------------------------------------------------------------------------------------------------------


def test_backward_twice_through_a_kept_graph_gives_the_same_codes() -> None:
    layer, x = fqt.convert(nn.Linear(30, 20), RECIPES["fqt_1bit"]), torch.randn(16, 30)
    y, g = layer(x), torch.randn(16, 20)
    first = torch.autograd.grad(y, layer.weight, g, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y, layer.weight, g)[0])


def test_an_input_changed_in_place_after_the_forward_does_not_reach_the_backward() -> None:
    """Codes are kept, not the input: nn.ReLU(inplace=True) before and after is safe where no operand is float."""
    layer, x = fqt.convert(nn.Linear(6, 5), RECIPES["xnor"]), torch.randn(4, 6)
    g, twin = torch.randn(4, 5), x.clone()
    expected = torch.autograd.grad(layer(twin), layer.weight, g)[0]
    y = layer(x)
    x.zero_()
    assert torch.equal(torch.autograd.grad(y, layer.weight, g)[0], expected)
