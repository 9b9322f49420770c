"""diff: what a layer's low bits change, layer by layer, by hand; bisect: the layers to blame, and no others."""

import copy
import math

import pytest
import torch
from torch import nn

import fqt
from fqt.inspect.bisect import bisect
from fqt.inspect.diff import Error, diff


def mlp(width=16, layers=6):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def test_error_by_hand():
    error = Error.of(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0]))
    assert error.decibel == pytest.approx(10 * math.log10(9 / 16))
    assert error.cosine == pytest.approx(3 / 5)
    assert Error.of(torch.ones(2), torch.ones(2)).decibel == math.inf
    assert math.isnan(Error.of(torch.zeros(2), torch.ones(2)).cosine)
    assert Error.of(torch.ones(2), torch.zeros(2)).decibel == -math.inf


def test_products_of_a_layer_by_hand():
    """The output and the weight's gradient of a middle layer, computed here from what reaches it."""
    model = fqt.convert(mlp(layers=3), "int8", skip=["0", "2"])
    x, seen = torch.randn(8, 16), {}
    hook = model[1].register_forward_hook(lambda _module, args, y: seen.update(x=args[0].detach(), y=y))
    y = model(x)
    (g,) = torch.autograd.grad(y.square().sum(), seen["y"])
    hook.remove()
    (row,) = diff(model, x).rows
    f = seen["x"] @ model[1].weight.T + model[1].bias
    by_hand = Error.of(seen["y"].detach(), f.detach())
    assert (row.layer, row.kind, row.recipe, row.calls) == ("1", "QuantLinear", "int8", 1)
    assert row.errors["output"].decibel == pytest.approx(by_hand.decibel, rel=1e-5)
    assert row.errors["grad_weight"].signal == pytest.approx((g.T @ seen["x"]).double().square().sum().item(), rel=1e-3)
    assert row.errors["grad_input"].signal == pytest.approx((g @ model[1].weight).double().square().sum().item(), rel=1e-3)


@pytest.mark.parametrize("recipe", ["int8", "dorefa_w1a2g6", "fqt_1bit"])
def test_all_kinds_in_a_network_with_fused_layers(recipe):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    layers += [nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Flatten()]
    model = fqt.convert(nn.Sequential(*layers, nn.Linear(16 * 16, 10)), recipe)
    images, labels = torch.randn(16, 3, 8, 8), torch.arange(16) % 10
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    found = diff(model, images, loss=lambda logits: nn.functional.cross_entropy(logits, labels))
    assert [row.layer for row in found.rows] == [name for name, _ in fqt.quantized_layers(model)]
    for row in found.rows:
        assert all(0.2 < error.cosine <= 1.0 + 1e-9 for error in row.errors.values()), row
        assert {"output", "grad_weight"} <= row.errors.keys()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    lines = str(found).splitlines()
    assert len(lines) == len(found.rows) + 3
    assert "grad_weight: dB, cosine" in lines[0]


def test_more_bits_are_nearer_and_the_worst_layer_is_named():
    model = mlp()
    rules = tuple(fqt.Rule(name, fqt.load_recipe("dorefa_w2a2g2")) for name in ["3"])
    base = fqt.load_recipe("int8").everywhere()
    recipe = fqt.Recipe("mixed", base.output, base.grad_input, base.grad_weight, rules=rules)
    found = diff(fqt.convert(model, recipe), torch.rand(32, 16))
    assert found.worst("output") == found.worst("grad_input") == "3"


def test_a_layer_called_twice_and_one_never_called():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.unused = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.b(self.a(self.a(x)))

    model = fqt.convert(Twice(), fqt.load_recipe("int8").everywhere())
    assert [(row.layer, row.calls) for row in diff(model, torch.randn(4, 8)).rows] == [("a", 2), ("b", 1)]


def test_a_frozen_first_layer_has_no_gradients():
    model = fqt.convert(mlp(layers=2), fqt.load_recipe("int8").everywhere())
    model[0].requires_grad_(False)
    first, second = diff(model, torch.randn(4, 16)).rows
    assert first.errors.keys() == {"output"}
    assert second.errors.keys() == {"output", "grad_weight"}


def test_an_unconverted_model_is_refused():
    with pytest.raises(ValueError, match="nothing in this Sequential is converted: call fqt.convert first"):
        diff(mlp(), torch.randn(2, 16))


@pytest.mark.parametrize("guilty", [[], ["1"], ["0", "5"], ["2", "3", "4"], ["0", "1", "2", "3", "4", "5"]])
def test_bisect_finds_the_layers_to_blame(guilty):
    model, trials = mlp(), []

    def works(trial):
        converted = {name for name, _ in fqt.quantized_layers(trial)}
        trials.append(converted)
        return not converted & set(guilty)

    assert sorted(bisect(model, fqt.load_recipe("int8").everywhere(), works)) == guilty
    assert not any(fqt.quantized_layers(model))
    if len(guilty) <= 1:
        assert len(trials) <= 8


def test_bisect_of_a_model_that_never_works_and_of_a_real_measurement():
    with pytest.raises(ValueError, match="this Sequential does not work unconverted either"):
        bisect(mlp(), fqt.load_recipe("int8").everywhere(), lambda _: False)
    model, x = mlp(layers=4), torch.randn(64, 16)
    with torch.no_grad():
        model[2].weight[0] *= 1e4  # one channel leaves the others no codes when all weights share a scale
        model[2].weight[0, 1:] = 0
    wanted = model(x).detach()[:, 1:]
    recipe = fqt.load_recipe("dorefa_w4a8g8").everywhere()

    def near(trial):
        with torch.no_grad():
            return torch.cosine_similarity(trial(x)[:, 1:].flatten(), wanted.flatten(), dim=0) > 0.5

    found = bisect(model, recipe, near)
    fqt.convert(model, recipe, skip=found)
    assert near(model) and 0 < len(found) < 4


def test_names_with_letters_of_patterns():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleDict({"a*": nn.Linear(4, 4), "ab": nn.Linear(4, 4)})

        def forward(self, x):
            return self.parts["ab"](self.parts["a*"](x))

    recipe = fqt.load_recipe("int8").everywhere()
    assert bisect(Odd(), recipe, lambda m: "parts.a*" not in dict(fqt.quantized_layers(m))) == ["parts.a*"]
