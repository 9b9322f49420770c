"""The controller: it moves bits both ways, touches no weight, survives bad gradients, and goes on where it stopped."""

from __future__ import annotations

import copy
import io
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import fqt
from fqt.cpu import library
from fqt.precision import Precision, push_down, push_up
from fqt.precision.formats import from_plain, to_plain
from fqt.precision.push_up import gradient_diversity, raise_by
from tests.fqt.precision.small_run import Run, batch, network

QUICK = {"resolution": (20, 60), "lookback": (3, 9)}


def test_bits_move_up_and_down_on_a_real_run(train: Run) -> None:
    """From the recipe's 16 bits: up at once, because FL asks for it; with a buffer of 2, down."""
    model = network()
    decisions = train(model, fqt.AdaPT(model, buffer=2, **QUICK), 40)
    words = [(d.before.bits("output"), d.after.bits("output")) for d in decisions]
    assert any(after < before for before, after in words)
    assert any(after > before for before, after in words)
    assert {d.layer for d in decisions} == {"0", "5", "7"}


def test_a_decision_is_the_composition_of_the_pure_functions(train: Run) -> None:
    """The first decision of each layer, computed again from the gradients and weights that a hook saw."""
    model = network()
    seen: dict[str, list[torch.Tensor]] = {}

    class Spy(fqt.AdaPT):
        def decide(self, loss, epoch):
            for name, layer in self.layers.items():
                assert layer.weight.grad is not None
                seen.setdefault(name, []).append(layer.weight.grad.clone())
            return super().decide(loss, epoch)

    controller = Spy(model, resolution=(30, 40), lookback=(4, 8), buffer=3)
    decisions = train(model, controller, 4)
    assert [d.layer for d in decisions] == ["0", "5", "7"]
    for decision in decisions:
        gradients = seen[decision.layer]
        diversity = gradient_diversity(float(sum(g.norm() for g in gradients)), float(sum(gradients).norm()))
        down = push_down(model.get_submodule(decision.layer).weight, 30)
        bits = raise_by(diversity, down.fraction_length, str(decision.inputs["strategy"]))
        assert decision.inputs["diversity"] == pytest.approx(diversity, rel=1e-5)
        assert controller.precision(decision.layer) == push_up(down, bits, 3)
        assert decision.inputs["format"] == str(push_up(down, bits, 3))
        assert decision.inputs["push_down"] == str(down)


def test_a_switch_takes_effect_in_the_next_step_and_leaves_the_master_untouched(train: Run) -> None:
    model = network()
    controller = fqt.AdaPT(model, **QUICK)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    x, y = batch(0)
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    for _ in range(3):
        decisions = controller.step(loss)
    assert len(decisions) == 3
    assert all(p.dtype == torch.float32 and torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == addresses
    after = controller.precision("5")
    q = model[5].quantized_weight()
    assert q is not None
    assert (q.format.bits, float(q.scale)) == (after.word_length, 2.0**-after.fraction_length)
    expected = (model[5].weight.double() * 2.0**after.fraction_length).round() * 2.0**-after.fraction_length
    assert torch.equal(q.decode()[:, 0].double(), expected)


def test_a_switched_model_computes_as_one_converted_to_that_format() -> None:
    model, twin = network(), network(fqt.precision.at_precision(fqt.load_recipe("adapt"), Precision(7, 4)))
    for layer in fqt.AdaPT(model).layers.values():
        layer.recipe = fqt.precision.at_precision(layer.recipe, Precision(7, 4))
    x, _ = batch(0)
    torch.manual_seed(3)
    expected = twin(x)
    torch.manual_seed(3)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    ("word", "products"),
    [
        (8, {"served": {"cpu int8"}, "bits": 8}),
        (9, {"served": {"cpu int16"}, "bits": 9, "note": "9 to 16 bits: their codes are multiplied as 16-bit integers"}),
        (16, {"served": {"cpu int16"}, "bits": 16, "note": "which is exact"}),
        (17, {"served": set(), "bits": 32, "note": "words of more than 16 bits: their values are multiplied in float32"}),
    ],
)
def test_summary_says_what_a_word_length_runs_on(word: int, products: dict) -> None:
    if word <= 16 and not library.LIBRARY.exists():  # type: ignore[attr-defined]
        pytest.skip("the extension is not built")
    model = network(fqt.precision.at_precision(fqt.load_recipe("adapt"), Precision(word, 4)))
    for row in fqt.summary(model).rows:
        assert set(row.served.values()) == products["served"]
        assert row.bits["output"] == products["bits"]
        assert products.get("note", "") in row.note
        assert f"fixed<{word},4>" in row.output


def test_sixteen_bit_products_are_exact() -> None:
    """The largest codes, as many terms as fit: float64 holds every partial sum."""
    recipe = fqt.precision.at_precision(fqt.load_recipe("adapt"), Precision(16, 8))
    layer = fqt.convert(nn.Linear(4096, 2, bias=False), recipe).eval()
    x = torch.randint(-(2**15), 2**15, (3, 4096)) * 2.0**-8
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-(2**15), 2**15, (2, 4096)) * 2.0**-8)
        exact = (x.mul(256).long() @ layer.weight.mul(256).long().T).double() * 2.0**-16
        assert torch.equal(layer(x), exact.float())


@pytest.mark.parametrize("kind", ["zero", "nan", "none"])
def test_bad_gradients_do_not_break_a_decision(kind: str) -> None:
    model = network()
    controller = fqt.AdaPT(model, **QUICK)
    for _ in range(3):
        for layer in controller.layers.values():
            value = {"zero": 0.0, "nan": math.nan, "none": None}[kind]
            layer.weight.grad = None if value is None else torch.full_like(layer.weight, value)
        decisions = controller.step(math.nan if kind == "nan" else 1.0)
    assert len(decisions) == 3
    for decision in decisions:
        assert math.isnan(float(decision.inputs["diversity"]))
        assert decision.inputs["raise"] == 1
        assert decision.inputs["next_lookback"] == 9, "nothing happens: look rarely"


def test_one_bad_gradient_does_not_spoil_the_others() -> None:
    model = network()
    controller = fqt.AdaPT(model, resolution=(20, 60), lookback=(3, 9))
    for step in range(3):
        for layer in controller.layers.values():
            layer.weight.grad = torch.full_like(layer.weight, math.inf if step == 1 else 1.0)
        decisions = controller.step(1.0)
    assert [d.inputs["diversity"] for d in decisions] == pytest.approx([1.0] * 3)


def test_weights_that_are_not_finite_keep_their_format() -> None:
    model = network()
    controller = fqt.AdaPT(model, **QUICK)
    with torch.no_grad():
        model[5].weight[0, 0] = math.nan
    for _ in range(3):
        decisions = {d.layer: d for d in controller.step(1.0)}
    assert controller.precision("5") == Precision(16, 8)
    assert decisions["5"].inputs["raise"] == 0
    assert controller.precision("0") != Precision(16, 8)


def test_all_zero_weights_keep_two_bits_to_come_back_with() -> None:
    model = network("adapt_calibrated")
    controller = fqt.AdaPT(model, **QUICK)
    with torch.no_grad():
        model[5].weight.zero_()
    for _ in range(3):
        controller.step(1.0)
    assert controller.precision("5").word_length >= 2
    assert controller.sparsity()["5"] == 1.0


def test_the_longest_word_keeps_every_product_on_eight_bits(train: Run) -> None:
    model = network("adapt_calibrated")
    decisions = train(model, fqt.AdaPT(model, max_word_length=8, **QUICK), 30)
    assert decisions
    assert all(d.after.bits(product) <= 8 for d in decisions for product in ("output", "grad_input", "grad_weight"))


def test_calibrated_activations_follow_the_word_length_and_leave_the_codes_above_sixteen_bits() -> None:
    recipe = fqt.load_recipe("adapt_calibrated")
    at = fqt.precision.at_precision
    bits = [at(recipe, Precision(word, 4)).format("output", "x") for word in (1, 6, 16, 17)]
    assert [format and format.bits for format in bits] == [2, 6, 16, None]


def test_a_resumed_controller_decides_bit_for_bit_alike(train: Run) -> None:
    """Stopped after 13 steps, in the middle of a lookback; the state goes through torch.save with weights_only."""

    def start() -> tuple[nn.Sequential, fqt.AdaPT, torch.optim.Optimizer]:
        model = network()
        return model, fqt.AdaPT(model, **QUICK), torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

    model, controller, optimizer = start()
    torch.manual_seed(5)
    whole = train(model, controller, 30, optimizer=optimizer)

    model, controller, optimizer = start()
    torch.manual_seed(5)
    first = train(model, controller, 13, optimizer=optimizer)
    file = io.BytesIO()
    torch.save([model.state_dict(), controller.state_dict(), optimizer.state_dict(), torch.get_rng_state()], file)
    file.seek(0)
    model, controller, optimizer = start()
    state = torch.load(file, weights_only=True)
    model.load_state_dict(state[0])
    controller.load_state_dict(state[1])
    optimizer.load_state_dict(state[2])
    torch.set_rng_state(state[3])
    rest = train(model, controller, 17, first=13, optimizer=optimizer)
    assert [d.row() for d in first + rest] == [d.row() for d in whole]
    assert len(whole) > 6


def test_the_state_of_another_policy_or_model_is_refused() -> None:
    state = fqt.AdaPT(network()).state_dict()
    with pytest.raises(ValueError, match="state of the policy AdaPT, not of Static: use that policy"):
        fqt.build_policy("static", network()).load_state_dict(state)
    other = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="the state's layers are not the model's, 0 for one|the state's layers are not"):
        fqt.AdaPT(fqt.convert(other, "adapt")).load_state_dict(state)


def test_recipes_survive_a_checkpoint() -> None:
    for name in fqt.recipes():
        recipe = fqt.load_recipe(name)
        again = from_plain(to_plain(recipe))
        assert (again.output, again.grad_input, again.grad_weight) == (recipe.output, recipe.grad_input, recipe.grad_weight)


def test_recipes_with_registered_stages_survive_it_too(tmp_path) -> None:
    path = tmp_path / "staged.yaml"
    path.write_text(
        "extends: int8\n"
        "output: {x: {quantizer: pact, decay: 0.1}, w: {quantizer: lsq, bits: 3}}\n"
        "grad_input: {g: {quantizer: nvfp4}, w: {quantizer: mx}}\n"
        "grad_weight: {g: {quantizer: uniform}, x: {quantizer: uniform}, transform: {hadamard: {size: 16}}}\n"
    )
    recipe = fqt.load_recipe(path)
    torch.save(to_plain(recipe), tmp_path / "recipe.pt")
    again = from_plain(torch.load(tmp_path / "recipe.pt", weights_only=True))
    assert (again.output, again.grad_input, again.grad_weight) == (recipe.output, recipe.grad_input, recipe.grad_weight)


def test_the_penalty_and_its_gradient() -> None:
    model = network()
    controller = fqt.AdaPT(model, l1=0.5, l2=0.25, word_length_penalty=2.0)
    penalty = controller.penalty()
    weights = [layer.weight for layer in controller.layers.values()]
    expected = sum(float(0.5 * w.detach().abs().sum() + 0.125 * w.detach().square().sum()) for w in weights) + 2.0 * 3 * 16 / 32
    assert float(penalty.detach()) == pytest.approx(expected, rel=1e-6)
    penalty.backward()
    for w in weights:
        torch.testing.assert_close(w.grad, 0.5 * w.sign() + 0.25 * w)


def test_gradient_normalization_weighs_every_gradient_alike() -> None:
    found = {}
    for normalize in (False, True):
        model = network()
        controller = fqt.AdaPT(model, lookback=(2, 4), resolution=(20, 60), gradient_normalization=normalize)
        for row, length in enumerate((1.0, 100.0)):
            for layer in controller.layers.values():
                layer.weight.grad = torch.zeros_like(layer.weight)
                layer.weight.grad.view(layer.weight.shape[0], -1)[row, 0] = length
            decisions = controller.step(1.0)
        found[normalize] = decisions[0].inputs["diversity"]
    assert found[True] == pytest.approx(2 / math.sqrt(2))
    assert found[False] == pytest.approx(101 / math.sqrt(10001))


def test_layers_have_settings_of_their_own() -> None:
    model = network()
    controller = fqt.AdaPT(
        model, layers={"7": {"buffer": 2, "lookback": (1, 1)}, "*": {"max_word_length": 12}}, lookback=(2, 4)
    )
    controller.step(1.0)
    assert controller.precision("7").word_length - controller.precision("7").fraction_length < 8
    controller.step(1.0)
    assert controller.precision("5").word_length == 12


def test_the_initializer_scales_by_fan_in() -> None:
    model = network(seed=1)
    before = model[5].weight.detach().clone()
    fqt.AdaPT(model, initializer="tnvs", initializer_scale=0.5)
    weight = model[5].weight.detach()
    assert not torch.equal(weight, before)
    assert float(weight.abs().max()) <= math.sqrt(3 * 0.5 / 54) + 1e-6
    assert 0.6 * math.sqrt(0.5 / 54) < float(weight.std()) < math.sqrt(0.5 / 54)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": (150, 50)}, r"resolution is \[150, 50\]: its minimum 150 is above its maximum 50; exchange them"),
        ({"lookback": (100, 25)}, r"lookback is \[100, 25\]: its minimum 100 is above its maximum 25"),
        ({"lookback": (0, 25)}, "lookback's minimum is 0, not an integer from 1"),
        ({"resolution": 50}, r"resolution is 50, not two integers \[min, max\]"),
        ({"resolution": (1.5, 50)}, "resolution's minimum is 1.5, not an integer"),
        ({"lookback_momentum": 1.5}, "lookback_momentum is 1.5, not a number from 0 to 1"),
        ({"strategy": "median"}, "strategy 'median' is not one of 'min', 'mean', 'max'"),
        ({"buffer": 40}, "buffer is 40, not an integer from 0 to 31"),
        (
            {"buffer": 8, "max_word_length": 8},
            "buffer is 8: it leaves no fraction in words of max_word_length=8 bits; lower it",
        ),
        ({"max_word_length": 33}, "max_word_length is 33, not an integer from 2 to 32"),
        ({"l1": -1.0}, "l1 is -1.0, not a number from 0"),
        ({"l2": "much"}, "l2 is 'much', not a number"),
        ({"word_length_penalty": True}, "word_length_penalty is True, not a number"),
        ({"epsilon": -1}, "epsilon is -1, not a number"),
        ({"initializer": "xavier"}, "initializer 'xavier' is not one of '', 'tnvs'"),
        ({"layers": {"fc*": {"buffer": 4}}}, r"layers: the pattern 'fc\*' matches no converted layer"),
        ({"layers": {"5": {"bufer": 4}}}, "layers: '5' has no option 'bufer', did you mean 'buffer'?; a layer's options are"),
        ({"layers": {"5": {"lookback": (9, 3)}}}, "its minimum 9 is above its maximum 3"),
    ],
)
def test_bad_settings_are_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(", did you mean 'buffer'?;", ".*buffer.*;")):
        fqt.AdaPT(network(), **options)


def test_a_buffer_without_effect_is_refused() -> None:
    with pytest.raises(ValueError, match="buffer is 4: it has no effect on layer '0', whose activations do not share <WL, FL>"):
        fqt.AdaPT(network("adapt_calibrated"), buffer=4)


def test_a_recipe_without_a_fixed_point_is_refused() -> None:
    with pytest.raises(ValueError, match="has weights of int8/channel, which have no <WL, FL>: use the quantizer fixed_point"):
        fqt.AdaPT(network("int8"))


def test_a_model_that_is_not_converted_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing in this Linear is converted, so AdaPT has no layer to decide for"):
        fqt.AdaPT(nn.Linear(2, 2))


def test_no_change_of_format_compiles_anything() -> None:
    """Twenty formats a layer, forward and backward: the graphs of the first step serve them all."""
    from torch._dynamo.testing import CompileCounterWithBackend
    from torch._dynamo.utils import counters

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.b(torch.relu(self.a(x) * 2)).sigmoid()

    torch._dynamo.reset()
    model = fqt.convert(Net(), "adapt")
    controller = fqt.AdaPT(model, lookback=(1, 1), buffer=2)
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(model, backend=counter)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    frames, formats = [], set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(20):
            for layer in controller.layers.values():
                layer.recipe = fqt.precision.at_precision(fqt.load_recipe("adapt"), Precision(3 + step, step % 7))
            x = torch.randn(4, 8)
            torch.manual_seed(step)
            y = fast(x)
            torch.manual_seed(step)
            assert torch.equal(y, model(x))
            loss = y.sum()
            loss.backward()
            optimizer.step()
            controller.step(loss)
            optimizer.zero_grad()
            frames.append(counter.frame_count)
            formats.add(controller.precision("a"))
    assert frames[0] > 0
    assert frames == [frames[0]] * 20
    assert not counters["recompiles"]
    torch._dynamo.reset()


def test_fullgraph_is_refused_with_the_reason() -> None:
    torch._dynamo.reset()
    model = fqt.convert(nn.Sequential(nn.Linear(4, 4)), "adapt")
    fqt.AdaPT(model)
    with pytest.raises(Exception, match="a precision policy may give this layer another recipe at any step"):
        torch.compile(model, backend="eager", fullgraph=True)(torch.ones(2, 4))
    torch._dynamo.reset()


def test_copies_and_reverted_models_are_free_of_the_policy() -> None:
    model = network()
    controller = fqt.AdaPT(model, **QUICK)
    twin = copy.deepcopy(model)
    model[5].recipe = fqt.precision.at_precision(model[5].recipe, Precision(5, 3))
    assert twin[5].recipe != model[5].recipe
    x, _ = batch(0)
    torch.manual_seed(0)
    one = twin(x)
    twin[5].recipe = model[5].recipe
    torch.manual_seed(0)
    assert not torch.equal(one, twin(x)), "a copy computes by its own recipe"
    fqt.revert(model)
    assert "changing" not in model[5].__dict__
    assert controller.steps == 0


def test_the_step_says_what_it_cost(train: Run) -> None:
    model = network()
    controller = fqt.AdaPT(model, **QUICK)
    train(model, controller, 3)
    assert controller.milliseconds > 0
    assert controller.switching_cost() > 0
    shown = controller.scalars()
    assert {"strategy", "resolution/5", "lookback/5", "diversity/5", "sparsity/5"} <= shown.keys()


@pytest.mark.parametrize("kind", ["kdim", "weight_norm"])
def test_a_weight_that_is_no_parameter_is_refused(kind: str) -> None:
    layer = nn.MultiheadAttention(8, 2, kdim=4) if kind == "kdim" else weight_norm(nn.Linear(8, 8))
    model = fqt.convert(nn.ModuleDict({"odd": layer}), fqt.load_recipe("adapt").everywhere())
    with pytest.raises(ValueError, match=r"layer 'odd': its weight is computed .* skip='odd'"):
        fqt.AdaPT(model)
