"""static, schedule, budget and variance: each moves bits up and down on a small real run, except the one that must not."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn

import fqt
from fqt.inspect.summary import summary
from fqt.precision import Budget, Policy, Schedule, Static, Variance, build_policy
from fqt.precision.policy import POLICIES
from fqt.precision.variance import keep_probabilities, quantization_variance, variances
from fqt.quantizers import build, quantize
from tests.fqt.precision.small_run import Run, batch, network


def bits(decisions, product: str = "output") -> list[tuple[int, int]]:
    return [(d.before.bits(product), d.after.bits(product)) for d in decisions]


# --- the protocol ------------------------------------------------------------------------------------------------------------


def test_the_built_in_policies_are_these() -> None:
    assert sorted(POLICIES) == ["adapt", "budget", "schedule", "static", "variance"]
    assert all(policy.name == name and policy.__doc__ for name, policy in POLICIES.items())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adpt", {}, "unknown precision policy 'adpt'.*adapt.*; known: adapt, budget, schedule, static, variance"),
        ("static", {"every": 3}, "precision policy 'static' has no option 'every'; it takes none"),
        (
            "variance",
            {"fracton": 0.1},
            "precision policy 'variance' has no option 'fracton'.*fraction.*it takes fraction, bits, every",
        ),
        ("budget", {}, "precision policy 'budget': .*missing.*'budget'"),
    ],
)
def test_an_unknown_policy_or_option_is_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_policy(name, network("int8"), **options)


def test_a_name_is_given_once_and_to_policies_only() -> None:
    with pytest.raises(ValueError, match="a precision policy named 'adapt' exists already"):
        fqt.register_policy("adapt")
    with pytest.raises(TypeError, match=r"register_policy\('mine'\) is for a subclass of fqt.Policy, not <class 'int'>"):
        fqt.register_policy("mine")(int)
    assert "mine" not in POLICIES


def test_a_policy_without_a_decision_says_so() -> None:
    with pytest.raises(NotImplementedError):
        Policy(network()).step(1.0)


def test_a_decision_is_a_row_of_plain_values(train: Run) -> None:
    model = network("int8")
    (row, *_) = [d.row() for d in train(model, Budget(model, budget=0.3), 1)]
    assert row["step"] == 1 and row["layer"] == "0"
    assert row["output_bits"] == f"8 -> {row['bits']}" and {"error", "madds", "budget", "before", "after"} <= row.keys()


# --- static ------------------------------------------------------------------------------------------------------------------


def test_static_changes_nothing_and_costs_no_bit(train: Run) -> None:
    plain, model = network("int8"), network("int8")
    recipes = [layer.recipe for _, layer in fqt.quantized_layers(model)]
    policy = Static(model)
    torch.manual_seed(1)
    assert train(model, policy, 4) == []
    assert [layer.recipe for _, layer in fqt.quantized_layers(model)] == recipes
    optimizer = torch.optim.SGD(plain.parameters(), 0.05, momentum=0.9)
    torch.manual_seed(1)
    for step in range(4):
        x, y = batch(step)
        nn.functional.cross_entropy(plain(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


# --- schedule ----------------------------------------------------------------------------------------------------------------


def test_schedule_goes_down_and_up_at_its_epochs(train: Run) -> None:
    model = network("int8")
    phases = [{"epoch": 1, "recipe": "dorefa_w4a4g4"}, {"epoch": 2.5, "recipe": "fp32"}]
    decisions = train(model, Schedule(model, phases=phases), 30, steps_per_epoch=10)
    assert [d.step for d in decisions] == [10] * 3 + [25] * 3, "the last step of an epoch: the next begins in the new format"
    assert bits(decisions) == [(8, 4)] * 3 + [(4, 32)] * 3
    assert decisions[0].inputs == {"epoch": 1.0, "phase": 1}


def test_a_resumed_schedule_does_not_repeat_a_phase() -> None:
    phases = [{"epoch": 1, "recipe": "dorefa_w4a4g4"}]
    model = network("int8")
    policy = Schedule(model, phases=phases)
    assert len(policy.step(1.0, epoch=1.2)) == 3
    again = Schedule(network("int8"), phases=phases)
    again.load_state_dict(policy.state_dict())
    assert again.layers["5"].recipe.bits("output") == 4
    assert again.step(1.0, epoch=1.3) == []


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], r"phases is \[\], not a list such as"),
        ([{"epoch": 1}], r"a phase is \{epoch: number, recipe: name\}, not \{'epoch': 1\}"),
        ([{"epoch": "x", "recipe": "int8"}], "phases: epoch is 'x', not a number"),
        (
            [{"epoch": 2, "recipe": "int8"}, {"epoch": 1, "recipe": "int8"}],
            r"phases begin at the epochs \[2, 1\], which do not rise",
        ),
        ([{"epoch": 1, "recipe": "int9"}], "unknown recipe 'int9'"),
        ([{"epoch": 1, "recipe": "fqt_1bit"}], "recipe 'fqt_1bit' exchanges activations, which only a conversion can"),
    ],
)
def test_bad_phases_are_refused(phases: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(network("int8"), phases=phases)


# --- budget ------------------------------------------------------------------------------------------------------------------


def two_values(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.weight.copy_(0.25 * layer.weight.sign())  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("recipe", ["int8", "adapt", "dorefa_w8a8g8"])
def test_budget_stays_within_it_and_spends_where_the_error_is(train: Run, recipe: str) -> None:
    """Weights of +-0.25 in layer 0 need two bits: what they free goes to layer 5."""
    chosen = []
    for exact in (False, True):
        model = network(recipe)
        if exact:
            two_values(model[0])
        decisions = train(model, Budget(model, budget=0.2), 1)
        chosen.append({d.layer: d.inputs["bits"] for d in decisions})
    if recipe == "int8":
        assert chosen[1]["5"] > chosen[0]["5"] and chosen[1]["0"] == 2 < chosen[0]["0"]
    decisions = train(model, Budget(model, budget=0.2, bits=(2, 8)), 1)
    spent = sum(d.inputs["madds"] * d.inputs["bits"] ** 2 for d in decisions)
    most = sum(d.inputs["madds"] * 64 for d in decisions)
    assert spent <= 0.2 * most
    for d in decisions:
        assert d.after.bits("output") == d.inputs["bits"]


def test_budget_is_a_brute_force_optimum_of_its_rule(train: Run) -> None:
    """No layer can be raised further: either it has the most bits, or the next costs more than is left."""
    model = network("int8")
    decisions = train(model, Budget(model, budget=0.3), 1)
    left = sum(d.inputs["madds"] * (0.3 * 64 - d.inputs["bits"] ** 2) for d in decisions)
    for d in decisions:
        price = d.inputs["madds"] * (2 * d.inputs["bits"] + 1)
        assert d.inputs["bits"] == 8 or price > left


def test_budget_moves_bits_down_and_up_as_the_weights_change(train: Run) -> None:
    model = network("int8")
    policy = Budget(model, budget=0.2, every=3)  # after steps 1 and 4
    moved = bits(train(model, policy, 3))
    assert any(after < before for before, after in moved)
    two_values(model[0])
    again = train(model, policy, 1, first=3)
    assert any(after > before for before, after in bits(again))
    assert any(after < before for before, after in bits(again))


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("int8", {"budget": 0.01}, "budget is 0.01, but 2 bits everywhere already are 0.0625 of 8 bits: raise the budget"),
        ("int8", {"budget": 2}, "budget is 2, not a number from 0 to 1"),
        ("int8", {"budget": 0.5, "bits": (8, 2)}, "its minimum 8 is above its maximum 2"),
        ("int8", {"budget": 0.5, "every": 0}, "every is 0, not an integer from 1"),
        ("xnor", {"budget": 0.5}, "recipe 'xnor' has no operand whose word length a budget could set"),
    ],
)
def test_bad_budgets_are_refused(recipe: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(network(recipe), **options)


def test_budget_needs_multiply_adds() -> None:
    with pytest.raises(ValueError, match="the multiply-adds of layer '0' are unknown: run one forward"):
        Budget(network("int8"), budget=0.5).step(1.0)


# --- variance ----------------------------------------------------------------------------------------------------------------

GRADIENTS = {
    "psq": {"bits": 2},
    "uniform": {"bits": 3, "granularity": "sample", "stochastic": True},
    "agp": {"bits": 4, "granularity": "sample", "mode": "bernoulli"},
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_the_predicted_variance_bounds_the_measured_one(name: str) -> None:
    """400 draws. A uniform fraction between steps has a third of the bound less, so the bound is never far off either."""
    g = torch.randn(24, 3, 10) * torch.rand(24, 1, 1).add(0.05)
    quantizer = build(name, "g", **GRADIENTS[name])
    assert quantizer is not None
    errors = []
    for draw in range(400):
        q, _ = quantize(g, quantizer, "g", key=torch.tensor(draw))
        errors.append(float((q.decode().double() - g).square().sum()))
    measured, predicted = sum(errors) / len(errors), float(quantization_variance(g, quantizer))
    assert 0.5 * predicted < measured < 1.02 * predicted


def test_variance_falls_by_four_a_bit_as_the_formula_says() -> None:
    g = torch.randn(8, 1, 50)
    low, high = g.flatten(1).aminmax(dim=1)
    for bits_ in (1, 2, 4, 8):
        quantizer = build("psq", "g", bits=bits_)
        assert quantizer is not None
        expected = float(((high - low).double() ** 2).sum()) * 50 / (4 * (2**bits_ - 1) ** 2)
        assert float(quantization_variance(g, quantizer)) == pytest.approx(expected, rel=1e-6)


def test_keep_probabilities_by_hand() -> None:
    """Ranges 8, 1, 1, 0 with two kept: 8 is sure, the ones share the other; with one kept: 0.8, 0.1, 0.1."""
    ranges = torch.tensor([1.0, 8.0, 0.0, 1.0], dtype=torch.float64)
    assert keep_probabilities(ranges, 2.0).tolist() == pytest.approx([0.5, 1.0, 0.0, 0.5])
    assert keep_probabilities(ranges, 1.0).tolist() == pytest.approx([0.1, 0.8, 0.0, 0.1])


def test_the_minibatchs_own_variance_by_hand() -> None:
    g = torch.tensor([[[1.0, 0.0]], [[3.0, 4.0]]])
    found = variances(g, {})
    assert found == {"power": 26.0, "own": pytest.approx(1 + 4 + 1 + 4)}


def test_variance_moves_gradient_bits_up_and_down(train: Run) -> None:
    """A small fraction wants more bits than the recipe's 4, a large one fewer."""
    moved = []
    for fraction in (1e-3, 100.0):
        model = network("psq_b4")
        decisions = train(model, Variance(model, fraction=fraction, every=3), 4)
        assert [d.layer for d in decisions] == ["0", "5", "7"] and {d.step for d in decisions} == {3}
        moved += bits(decisions, "grad_input")
        for d in decisions:
            chosen = d.inputs[f"variance_at_{d.inputs['bits']}"]
            assert chosen <= d.inputs["bound"] or d.inputs["bits"] == 8
            fewer = [b for b in (1, 2, 4) if b < d.inputs["bits"]]
            assert all(d.inputs[f"variance_at_{b}"] > d.inputs["bound"] for b in fewer)
            assert d.inputs["bound"] == pytest.approx(min(fraction * d.inputs["own_variance"], d.inputs["power"] / 3))
    assert any(after > before for before, after in moved)
    assert any(after < before for before, after in moved)


def test_pruning_follows_the_bits_as_in_agp(train: Run) -> None:
    model = network("fqt_1bit")
    (decision, *_) = train(model, Variance(model, fraction=100.0, every=1), 1)
    quantizer = decision.after.quantizer("grad_input", "g")
    assert quantizer is not None and quantizer.prune == "bernoulli"
    assert quantizer.keep_one_in == quantizer.bits == decision.inputs["bits"]


def test_looking_at_gradients_changes_none_and_stops(train: Run) -> None:
    model, twin = network("psq_b4"), network("psq_b4")
    policy = Variance(model, every=2, bits=(4,))
    torch.manual_seed(2)
    train(model, policy, 3)
    torch.manual_seed(2)
    train(twin, Static(twin), 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    watched = [layer.watcher is not None for layer in policy.layers.values()]
    assert watched == [True] * 3, "the fourth step is looked at"
    train(model, policy, 1, first=3)
    assert [layer.watcher for layer in policy.layers.values()] == [None] * 3


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_gradients_that_say_nothing_change_nothing(value: float) -> None:
    model = network("psq_b4")
    policy = Variance(model, every=1)
    x, _ = batch(0)
    (model(x) * value).sum().backward()
    assert policy.step(1.0) == []
    assert policy.layers["5"].recipe.bits("grad_input") == 4


def test_a_grid_without_one_bit_is_offered_the_others() -> None:
    model = network("int8")
    policy = Variance(model, every=1, fraction=1e9)
    x, y = batch(0)
    nn.functional.cross_entropy(model(x), y).backward()
    assert {d.inputs["bits"] for d in policy.step(1.0)} <= {2, 4, 8}


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("psq_b4", {"fraction": -1}, "fraction is -1, not a number"),
        ("psq_b4", {"bits": []}, r"bits is \[\], not a rising list such as \[1, 2, 4, 8\]"),
        ("psq_b4", {"bits": [4, 2]}, r"bits is \[4, 2\], not a rising list"),
        ("psq_b4", {"bits": [17]}, "bits is 17, not an integer from 1 to 16"),
        ("int8", {"bits": [1]}, r"the gradients of recipe 'int8' have none of the bits \[1\]"),
        ("xnor", {}, "recipe 'xnor' leaves the gradients float"),
    ],
)
def test_bad_settings_of_variance_are_refused(recipe: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Variance(network(recipe), **options)


def test_every_policy_resumes_as_if_nothing_had_happened(train: Run) -> None:
    """After 7 of 14 steps; adapt has a test of its own."""
    cases = {
        "static": ("int8", {}),
        "schedule": ("int8", {"phases": [{"epoch": 0.5, "recipe": "dorefa_w4a4g4"}, {"epoch": 1.1, "recipe": "int8"}]}),
        "budget": ("int8", {"budget": 0.3, "every": 4}),
        "variance": ("psq_b4", {"every": 4}),
    }
    for name, (recipe, options) in cases.items():
        model = network(recipe)
        policy, optimizer = build_policy(name, model, **options), torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        torch.manual_seed(4)
        first = train(model, policy, 7, optimizer=optimizer)
        state = copy.deepcopy([model.state_dict(), policy.state_dict(), optimizer.state_dict()])
        generator = torch.get_rng_state()
        whole = first + train(model, policy, 7, first=7, optimizer=optimizer)
        model = network(recipe)
        policy, optimizer = build_policy(name, model, **options), torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        model(batch(0)[0])  # counts the multiply-adds
        model.load_state_dict(state[0])
        policy.load_state_dict(state[1])
        optimizer.load_state_dict(state[2])
        torch.set_rng_state(generator)
        resumed = first + train(model, policy, 7, first=7, optimizer=optimizer)
        assert [d.row() for d in resumed] == [d.row() for d in whole], name
        assert whole or name == "static"


# --- the performance model ---------------------------------------------------------------------------------------------------


def test_the_cost_by_hand() -> None:
    """Two linear layers, 10 x 6 and 6 x 4: 60 and 24 multiply-adds a sample; <8, 4> with 8-bit gradients, then <12, 4>."""
    model = nn.Sequential(nn.Linear(10, 6, bias=False), nn.Linear(6, 4, bias=False))
    at = fqt.precision.at_precision
    fqt.convert(model, "adapt")
    model[0].recipe = at(model[0].recipe, fqt.Precision(8, 4))
    model[1].recipe = at(model[1].recipe, fqt.Precision(12, 4))
    model(torch.randn(2, 10))
    cost = fqt.precision.training_cost(model, batch=5, sparsity={"0": 0.25}, switching=1000.0)
    assert cost.float_step == 5 * 3 * 32 * 84
    assert cost.low_step == 5 * (60 * (0.75 * 8 + 0.75 * 8 + 8) + 24 * 3 * 12)
    assert cost.float_forward == 5 * 32 * 84
    assert cost.low_forward == 5 * (0.75 * 8 * 60 + 12 * 24)
    assert cost.size == pytest.approx((0.75 * 8 * 60 + 12 * 24) / (32 * 84))
    assert cost.training_speedup == cost.float_step / (cost.low_step + 1000)
    assert cost.paper_training_speedup == 2 * cost.float_forward / (cost.low_forward + cost.float_forward + 1000)
    assert cost.inference_speedup == cost.float_forward / cost.low_forward
    assert cost.switching_share == 1000 / (cost.low_step + 1000)


def test_words_beyond_sixteen_bits_cost_float32_but_keep_their_size() -> None:
    model = fqt.convert(nn.Sequential(nn.Linear(10, 6, bias=False)), "adapt")
    model[0].recipe = fqt.precision.at_precision(model[0].recipe, fqt.Precision(20, 4))
    model(torch.randn(2, 10))
    cost = fqt.precision.training_cost(model)
    assert cost.training_speedup == 1.0
    assert cost.size == 20 / 32 == 1 / cost.inference_speedup


def test_switching_by_hand() -> None:
    """100 weights, <24, .>: 3 x 100 x 2 log2(16) x 50 x 0.5 for push down, 26 x 100 + 1 for push up, every 25 steps."""
    from fqt.precision.cost import switching_cost

    assert switching_cost(100, 24, 50, 25, 0.5) == 32 * (3 * 100 * 8 * 50 * 0.5 + 26 * 100 + 1) / 25
    assert switching_cost(100, 8, 50, 25, 1.0) == 32 * (3 * 100 * 50 + 2601) / 25


def test_the_cost_needs_multiply_adds() -> None:
    with pytest.raises(ValueError, match="the multiply-adds of layer '0' are unknown: run one eager forward"):
        fqt.precision.training_cost(network())


def test_float_layers_count_in_the_cost() -> None:
    model = nn.Sequential(nn.Linear(10, 6, bias=False), nn.Linear(6, 4, bias=False), nn.Linear(4, 2, bias=False))
    fqt.convert(model, "int8")
    model(torch.randn(2, 10))
    assert [row.madds for row in summary(model).rows] == [60, 24, 8]
    cost = fqt.precision.training_cost(model)
    assert cost.low_step == 3 * (32 * 68 + 8 * 24)


def test_at_word_length_keeps_a_fixed_points_range() -> None:
    recipe = fqt.precision.at_precision(fqt.load_recipe("adapt"), fqt.Precision(12, 5))
    for wanted, other in itertools.product((2, 7, 16), ("x", "w")):
        quantizer = fqt.precision.at_word_length(recipe, wanted).quantizer("output", other)
        assert quantizer == build("fixed_point", other, word_length=wanted, fraction_length=wanted - 7)
