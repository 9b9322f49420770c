"""torch.compile of converted models: whole graphs, the eager numbers, and no more graphs than needed."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fqt
from fqt.recipe import Recipe

INT8 = fqt.load_recipe("int8").everywhere()
ONE_BIT = fqt.load_recipe("fqt_1bit").everywhere()
RECIPES = {name: fqt.load_recipe(name).everywhere() for name in fqt.recipes() if name != "fp32"}


@pytest.fixture(autouse=True)
def _one_thread_and_a_fresh_compiler() -> Iterator[None]:
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def net(recipe: Recipe | str) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 5))
    return fqt.convert(model, recipe)


def compiled(model: nn.Module, backend: str = "aot_eager") -> tuple[nn.Module, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True), counter


def step(model: nn.Module, x: Tensor, seed: int = 0, autocast: bool = False) -> list[Tensor]:
    """[output, gradient of the input, gradients of the parameters, the generator's state after]"""
    x = x.detach().requires_grad_()
    model.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    y.float().square().sum().backward()
    assert x.grad is not None
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert len(grads) == len(list(model.parameters()))
    return [y.detach(), x.grad, *grads, torch.get_rng_state()]


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    assert [torch.equal(a, b) for a, b in zip(one, other, strict=True)] == [True] * len(one)


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 6, 6)


# One recipe for each way in which codes are made; the others differ from these in their numbers of bits.
@pytest.mark.parametrize(
    "name", ["adapt", "dorefa_w1a1g4", "dorefa_w8a8g8", "fqt_1bit", "fqt_1bit_topk", "int4", "psq_b2", "xnor"]
)
@pytest.mark.every(3)
def test_a_compiled_convolution_is_eager_bit_for_bit_in_one_graph(name: str) -> None:
    model = fqt.convert(nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), RECIPES[name])
    fast, counter = compiled(copy.deepcopy(model))
    for seed in (0, 1):
        x = torch.randn(4, 4, 6, 6)
        assert_same(step(model, x, seed), step(fast, x, seed))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["int8_token", "bitnet", "fqt_1bit"])
@pytest.mark.every(3)
def test_a_compiled_linear_layer_is_eager_bit_for_bit_in_one_graph(name: str) -> None:
    model = fqt.convert(nn.Linear(10, 7), RECIPES[name])
    fast, counter = compiled(copy.deepcopy(model))
    x = torch.randn(4, 3, 10)
    assert_same(step(model, x), step(fast, x))
    assert counter.frame_count == 1


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="inductor needs a C++ compiler")
def test_inductor_computes_the_same_codes() -> None:
    """Operators are opaque to inductor, so codes are the same; float code around them may be fused."""
    model = net(RECIPES["fqt_1bit"])
    fast = torch.compile(copy.deepcopy(model), fullgraph=True)
    x = images()
    for one, other in zip(step(model, x), step(fast, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_frozen_model_compiles_with_gradients_enabled() -> None:
    model = net(ONE_BIT).requires_grad_(False)
    fast, counter = compiled(model)
    x = images()
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    assert torch.equal(fast(x), expected)
    assert counter.frame_count == 1


def test_a_training_run_compiles_two_graphs_and_one_for_the_last_batch() -> None:
    model = net(RECIPES["fqt_w1a1g4"])
    fast, counter = compiled(copy.deepcopy(model))
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (model, fast)]
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in optimizers]

    def train(n: int) -> None:
        x = images(n)
        assert_same(step(model, x, n), step(fast, x, n))
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()

    def evaluate() -> None:
        x = images(6)
        model.eval(), fast.eval()
        with torch.no_grad():
            assert torch.equal(model(x), fast(x))
        model.train(), fast.train()

    for _ in range(3):
        train(6)  # three learning rates
    assert counter.frame_count == 1
    for _ in range(2):
        evaluate()
        train(6)
    assert counter.frame_count == 2
    train(5)
    train(6)
    train(4)
    assert counter.frame_count == 3, "a smaller last batch compiles once more, for any size"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.every(2)
def test_memory_format_survives(memory_format: torch.memory_format) -> None:
    layer = fqt.convert(nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect", groups=1), ONE_BIT)
    fast, _ = compiled(copy.deepcopy(layer))
    x = images().to(memory_format=memory_format)
    assert fast(x).stride() == layer(x).stride()
    assert_same(step(layer, x), step(fast, x))


def test_autocast_within_a_compiled_model() -> None:
    model = net(INT8)
    fast, counter = compiled(copy.deepcopy(model))
    x = images()
    eager = step(model, x, autocast=True)
    assert eager[0].dtype == torch.bfloat16
    assert_same(eager, step(fast, x, autocast=True))
    assert counter.frame_count == 1


def test_a_new_recipe_on_a_layer_is_seen_by_the_compiled_model() -> None:
    model = net(INT8)
    fast, counter = compiled(model)
    x = images()
    before = fast(x)
    model[3].recipe = ONE_BIT  # type: ignore[union-attr]
    after = fast(x)
    assert not torch.equal(before, after)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), fast.eval()(x))
    model.train()
    model[3].recipe = replace(INT8, name="int8_again")  # type: ignore[union-attr]
    assert torch.equal(fast(x), before)
    assert counter.frame_count <= 4


@pytest.mark.parametrize("wrapped", [True, False], ids=["compiled_module", "module"])
def test_converting_after_a_compiled_forward_leaves_no_float_graph(wrapped: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    fast, _ = compiled(model)
    x = torch.randn(4, 6)
    with torch.no_grad():
        as_float = fast(x)
        fqt.convert(fast if wrapped else model, ONE_BIT)
        as_bits = fast(x)
        assert torch.equal(as_bits, model(x))
        assert not torch.allclose(as_float, as_bits)
        fqt.revert(model)
        assert torch.equal(fast(x), as_float)


def test_weights_loaded_or_edited_reach_the_compiled_model() -> None:
    model = net(ONE_BIT).eval()
    fast, counter = compiled(model)
    x = images()
    with torch.no_grad():
        before = fast(x)
        model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()})
        loaded = fast(x)
        model[0].weight.data.neg_()  # type: ignore[union-attr, operator]
        edited = fast(x)
        assert torch.equal(edited, model(x))
    assert not torch.equal(before, loaded)
    assert not torch.equal(loaded, edited)
    assert counter.frame_count == 1


def test_export_keeps_the_operators() -> None:
    model = net(ONE_BIT).eval()
    program = torch.export.export(model, (images(),))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("fqt.output" in name for name in names), names
    x = images()
    with torch.no_grad():
        assert torch.equal(program.module()(x), model(x))
