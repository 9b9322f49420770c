"""convert and revert: what changes (the class, the recipe) and everything that must not."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fqt
from fqt.quantizers import build
from fqt.recipe import Product, Recipe, Rule
from tests.fqt.helpers import fingerprint

INT8 = fqt.load_recipe("int8").everywhere()
ONE_BIT = fqt.load_recipe("fqt_1bit").everywhere()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 1, stride=2, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, groups=2),
        nn.ReLU6(),
        nn.Flatten(),
        nn.Linear(24, 8),
        nn.Tanh(),
        nn.Linear(8, 5),
    )


def image() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def kinds(model: nn.Module) -> list[str]:
    return [type(m).__name__ for m in model.modules()]


def recipes_of(model: nn.Module) -> dict[str, str]:
    return {name: layer.recipe.name for name, layer in fqt.quantized_layers(model)}


# --- what stays ------------------------------------------------------------------------------------------------------


def test_convert_works_in_place_and_returns_the_model() -> None:
    model = small()
    before = dict(model.named_modules())
    assert fqt.convert(model, INT8) is model
    assert dict(model.named_modules()) == before, "the same module objects under the same names"
    assert type(model[0]) is fqt.QuantConv2d
    assert isinstance(model[0], nn.Conv2d)
    assert type(model[10]) is fqt.QuantLinear
    assert isinstance(model[10], nn.Linear)


def test_parameters_are_the_same_objects() -> None:
    model = small().double()
    model[3].weight.requires_grad_(False)
    before = {name: (id(p), p.data_ptr(), p.requires_grad, p.dtype, p.device) for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    fqt.convert(model, INT8)
    assert before == {n: (id(p), p.data_ptr(), p.requires_grad, p.dtype, p.device) for n, p in model.named_parameters()}
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True))
    model(image().double()).sum().backward()
    assert model[3].weight.grad is None
    assert model[0].weight.grad is not None


def test_meta_models_convert_and_tell_shapes() -> None:
    with torch.device("meta"):
        model = fqt.convert(small(), ONE_BIT)
        out = model(torch.empty(2, 3, 8, 8))
    assert out.shape == (2, 5)
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_stays_by_module(training: bool) -> None:
    model = small().train(training)
    model[3].train(not training)
    before = [m.training for m in model.modules()]
    assert [m.training for m in fqt.convert(model, INT8).modules()] == before


def test_hooks_stay_and_run_once_a_call() -> None:
    model, calls = small(), []
    layer = model[8]
    layer.register_forward_pre_hook(lambda m, args: calls.append("pre"))
    layer.register_forward_hook(lambda m, args, out: calls.append("forward"))
    layer.register_full_backward_pre_hook(lambda m, g: calls.append("backward_pre"))
    layer.register_full_backward_hook(lambda m, gi, go: calls.append("backward"))
    layer.weight.register_hook(lambda g: calls.append("weight"))
    layer._register_state_dict_hook(lambda m, state, prefix, meta: calls.append("state_dict"))
    layer.register_state_dict_pre_hook(lambda m, prefix, keep: calls.append("state_dict_pre"))
    layer.register_load_state_dict_post_hook(lambda m, keys: calls.append("load"))
    expected = ["pre", "forward", "backward_pre", "weight", "backward", "state_dict_pre", "state_dict", "load"]
    for change in (lambda m: m, lambda m: fqt.convert(m, INT8), fqt.revert):
        calls.clear()
        change(model)
        model(image().requires_grad_()).sum().backward()
        model.load_state_dict(model.state_dict())
        assert sorted(calls) == sorted(expected)
        assert calls[:3] == expected[:3]


def test_a_forward_hook_that_changes_the_output_still_does() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].register_forward_hook(lambda m, args, out: out * 0 + 7)
    assert fqt.convert(model, INT8)(torch.randn(2, 3)).unique().tolist() == [7]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 6)
        self.twin = nn.Linear(6, 6, bias=False)
        self.twin.weight = self.inner.weight
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.twin(self.inner(self.embed(tokens))))


def test_tied_weights_stay_tied_and_gather_both_gradients() -> None:
    model = fqt.convert(Tied(), INT8)
    assert model.head.weight is model.embed.weight
    assert model.twin.weight is model.inner.weight
    assert len(list(model.parameters())) == 3
    model(torch.arange(4)).square().sum().backward()
    both = model.inner.weight.grad.clone()
    twin_only = copy.deepcopy(model)
    twin_only.zero_grad()
    twin_only.inner.weight = nn.Parameter(twin_only.inner.weight.detach().clone(), requires_grad=False)
    twin_only(torch.arange(4)).square().sum().backward()
    assert not torch.allclose(both, twin_only.twin.weight.grad, rtol=0.1)
    state = model.state_dict()
    model.load_state_dict(state)
    assert model.head.weight is model.embed.weight


def test_state_dict_is_plain_and_loads_both_ways() -> None:
    plain, other = small(), small()
    converted = fqt.convert(small(), ONE_BIT)
    assert list(converted.state_dict()) == list(plain.state_dict())
    assert {type(v) for v in converted.state_dict().values()} == {Tensor}
    assert {type(p) for p in converted.parameters()} == {nn.Parameter}
    converted.load_state_dict(plain.state_dict(), strict=True)
    other.load_state_dict(converted.state_dict(), strict=True)
    for name, value in plain.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert converted.state_dict()._metadata == plain.state_dict()._metadata


def test_state_dict_round_trips_with_weights_only() -> None:
    converted, buffer = fqt.convert(small(), ONE_BIT), io.BytesIO()
    converted(image()).sum().backward()
    torch.save(converted.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    fresh = fqt.convert(small(), ONE_BIT)
    fresh.load_state_dict(state, strict=True)
    x = image()
    converted.eval(), fresh.eval()
    with torch.no_grad():
        assert torch.equal(converted(x), fresh(x))


def test_fp32_changes_nothing() -> None:
    model = small()
    before = fingerprint(model)
    assert fqt.convert(model, "fp32") is model
    assert fingerprint(model) == before
    assert fqt.convert(model, "dorefa_w32a32g32") is model
    assert fingerprint(model) == before


# --- what is left alone ----------------------------------------------------------------------------------------------


class MyLinear(nn.Linear):
    """May compute anything."""


def test_subclasses_are_left_alone() -> None:
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 4),
            "lazy": nn.LazyLinear(3),
            "lazy_conv": nn.LazyConv2d(3, 1),
            "parametrized": parametrizations.weight_norm(MyLinear(4, 4)),
            "user": MyLinear(4, 4),
            "bilinear": nn.Bilinear(4, 4, 2),
        }
    )
    before = {name: type(m) for name, m in model.named_modules() if name != "plain"}
    fqt.convert(model, INT8)
    assert recipes_of(model) == {"plain": "int8"}
    assert {name: type(m) for name, m in model.named_modules() if name != "plain"} == before
    assert model["parametrized"](torch.randn(2, 4)).shape == (2, 4)


def test_old_style_weight_norm_trains_through_its_hook() -> None:
    with pytest.warns(FutureWarning):
        model = torch.nn.utils.weight_norm(nn.Linear(4, 4))
    names = [name for name, _ in model.named_parameters()]
    fqt.convert(model, INT8)
    assert [name for name, _ in model.named_parameters()] == names
    model(torch.randn(3, 4)).square().sum().backward()
    assert bool(model.weight_g.grad.any())
    assert bool(model.weight_v.grad.any())


def test_a_module_under_two_names_is_converted_once_and_under_both() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": shared})
    fqt.convert(model, INT8)
    assert type(model["b"]) is fqt.QuantLinear
    assert model["a"][0] is model["b"]
    assert len(model["b"]._forward_hooks) == 1
    fqt.revert(model)
    assert type(model["b"]) is nn.Linear


def test_the_root_may_be_the_layer() -> None:
    layer = nn.Linear(4, 3)
    assert fqt.convert(layer, INT8) is layer
    assert type(layer) is fqt.QuantLinear
    fqt.revert(layer)
    assert type(layer) is nn.Linear
    with pytest.raises(ValueError, match="all 1 layers"):
        fqt.convert(layer, "int8")  # it is the first and the last


def test_a_transformer_layer_takes_no_float_short_cut_in_evaluation() -> None:
    """torch's fused path would read linear1.weight as it is, past the quantized layers."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 2)
    x, plain = torch.randn(2, 5, 16), copy.deepcopy(model).eval()
    fqt.convert(model, ONE_BIT).eval()
    with_grad = model(x)
    with torch.no_grad():
        without = model(x)
        far = (plain(x) - without).abs().max()
    torch.testing.assert_close(without, with_grad, rtol=1e-4, atol=1e-4)
    assert far > 0.1, "one bit is nowhere near float here, so the test can tell them apart"


# --- which layers, by which recipe --------------------------------------------------------------------------------------


def test_rules_keep_first_last_and_downsample_in_float() -> None:
    assert recipes_of(fqt.convert(small(), "fqt_1bit")) == {"5": "fqt_1bit", "8": "fqt_1bit"}
    assert recipes_of(fqt.convert(small(), "int8")) == {"3": "int8", "5": "int8", "8": "int8"}
    assert recipes_of(fqt.convert(small(), ONE_BIT)) == dict.fromkeys(["0", "3", "5", "8", "10"], "fqt_1bit")


WITH_DEPTHWISE = [name for name in fqt.recipes() if any(rule.match == "<depthwise>" for rule in fqt.load_recipe(name).rules)]


def test_conv_is_every_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Flatten(2), nn.Conv1d(4, 4, 3), nn.Linear(4, 4))
    assert set(recipes_of(fqt.convert(model, replace(INT8, rules=(Rule("<conv>", None),))))) == {"3"}


@pytest.mark.parametrize(
    ("conv", "stays"),
    [
        (nn.Conv2d(4, 4, 1, stride=2), True),
        (nn.Conv2d(4, 4, 1, stride=(1, 2)), True),
        (nn.Conv2d(4, 4, 1), False),
        (nn.Conv2d(4, 4, 3, stride=2), False),
        (nn.Conv2d(4, 4, (1, 3), stride=2), False),
    ],
    ids=str,
)
def test_downsample_is_a_strided_1x1_convolution(conv: nn.Conv2d, stays: bool) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), conv, nn.Conv2d(4, 4, 1))
    recipe = replace(INT8, rules=(Rule("<downsample>", None),))
    assert ("1" in recipes_of(fqt.convert(model, recipe))) is not stays


@pytest.mark.parametrize(
    ("conv", "stays"),
    [
        (nn.Conv2d(4, 4, 3, groups=4), True),
        (nn.Conv2d(4, 8, 3, groups=4), True),
        (nn.Conv2d(4, 4, 1, groups=4), True),
        (nn.Conv2d(4, 4, 3, groups=2), False),
        (nn.Conv2d(1, 4, 3), False),
        (nn.Conv2d(4, 4, 3), False),
    ],
    ids=str,
)
@pytest.mark.parametrize("recipe", WITH_DEPTHWISE)
def test_depthwise_convolutions_stay_in_float(recipe: str, conv: nn.Conv2d, stays: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), copy.deepcopy(conv), nn.Linear(4, 4))
    by_conv = {"2": "int8"} if recipe == "int8_token" else {"2": recipe}
    assert recipes_of(fqt.convert(model, recipe)) == {"1": recipe, **({} if stays else by_conv)}


def test_named_rules_first_match_wins() -> None:
    rules = (Rule("3", None), Rule("[35]", ONE_BIT), Rule("<last>", ONE_BIT), Rule("1*", INT8))
    recipe = replace(INT8, rules=rules, replace=ONE_BIT.replace)
    assert recipes_of(fqt.convert(small(), recipe)) == {"0": "int8", "5": "fqt_1bit", "8": "int8", "10": "fqt_1bit"}


def test_a_float_recipe_with_a_quantized_rule_converts_that_layer_alone() -> None:
    recipe = replace(fqt.load_recipe("fp32"), rules=(Rule("8", INT8),))
    assert recipes_of(fqt.convert(small(), recipe)) == {"8": "int8"}


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ("8", ["0", "3", "5", "10"]),
        (["8", "0"], ["3", "5", "10"]),
        (("[0-5]",), ["8", "10"]),
        ([], ["0", "3", "5", "8", "10"]),
        (None, ["0", "3", "5", "8", "10"]),
        ("1?", ["0", "3", "5", "8"]),
    ],
)
def test_skip_patterns(skip: object, left: list[str]) -> None:
    assert list(recipes_of(fqt.convert(small(), INT8, skip=skip))) == left  # type: ignore[arg-type]


def test_skip_matches_whole_dotted_names_and_their_case() -> None:
    def model() -> nn.Module:
        return nn.ModuleDict({"Block": nn.ModuleDict({"fc": nn.Linear(2, 2)}), "fc": nn.Linear(2, 2)})

    assert list(recipes_of(fqt.convert(model(), INT8, skip="fc"))) == ["Block.fc"]
    assert list(recipes_of(fqt.convert(model(), INT8, skip="Block.*"))) == ["fc"]
    with pytest.raises(ValueError, match="matches no layer"):
        fqt.convert(model(), INT8, skip="block.*")


def test_a_recipe_comes_by_name_path_or_object(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("output: float\ngrad_input: {g: {quantizer: psq, bits: 2}, w: float}\ngrad_weight: float\n")
    for recipe, name in (("int8", "int8"), (fqt.load_recipe("int8"), "int8"), (path, "mine"), (str(path), "mine")):
        assert set(recipes_of(fqt.convert(small(), recipe)).values()) == {name}


# --- ReLU -> Identity ----------------------------------------------------------------------------------------------------


def test_activations_are_replaced_where_the_recipe_says_and_come_back() -> None:
    model = small()
    before, attributes = kinds(model), [sorted(m.__dict__) for m in model.modules()]
    fqt.convert(model, "fqt_1bit")
    assert [type(model[i]) for i in (2, 4, 6, 9)] == [nn.ReLU, nn.Identity, nn.Identity, nn.Tanh], "layer 3 stays float"
    fqt.revert(model)
    assert kinds(model) == before
    assert model[4].inplace
    assert not model[2].inplace
    assert [sorted(m.__dict__) for m in model.modules()] == attributes
    fqt.convert(model, "int8")
    assert type(model[2]) is nn.ReLU


def test_a_replacement_gets_the_attributes_that_its_class_needs() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    before = [sorted(m.__dict__) for m in model.modules()]
    fqt.convert(model, replace(INT8, replace=(("ReLU", "Hardtanh"),)))
    assert type(model[1]) is nn.Hardtanh
    assert float(model[1](torch.tensor(-3.0))) == -1
    fqt.revert(model)
    assert float(model[1](torch.tensor(-3.0))) == 0
    assert [sorted(m.__dict__) for m in model.modules()] == before


# --- revert -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in fqt.recipes() if n != "fp32"])
def test_revert_gives_the_model_back(name: str) -> None:
    model, x = small(), image()
    expected, before = model.eval()(x), fingerprint(model)
    fqt.convert(model, name)
    assert not torch.equal(model(x), expected)
    assert fqt.revert(model) is model
    assert fingerprint(model) == before
    assert torch.equal(model(x), expected)


def test_revert_keeps_what_was_learned() -> None:
    model = fqt.convert(small(), "int8")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(image()).sum().backward()
    optimizer.step()
    learned = {k: v.clone() for k, v in model.state_dict().items()}
    fqt.revert(model)
    assert all(torch.equal(v, learned[k]) for k, v in model.state_dict().items())


def test_convert_revert_convert_with_another_recipe() -> None:
    model = fqt.convert(small(), "fqt_1bit")
    fqt.convert(fqt.revert(model), "int8")
    assert set(recipes_of(model).values()) == {"int8"}
    assert type(model[2]) is nn.ReLU
    assert all(len(m._forward_hooks) <= 1 for m in model.modules())


def test_a_parametrization_added_later_works_and_must_go_before_revert() -> None:
    model = fqt.convert(small(), INT8)
    parametrizations.weight_norm(model[8])
    model(image()).sum().backward()
    before = kinds(model)
    with pytest.raises(ValueError, match=r"layer '8' is a ParametrizedQuantLinear.*remove_parametrizations"):
        fqt.revert(model)
    assert kinds(model) == before, "a refused revert changes nothing"
    parametrize.remove_parametrizations(model[8], "weight")
    fqt.revert(model)
    assert type(model[8]) is nn.Linear


# --- whole networks -----------------------------------------------------------------------------------------------------


def vit() -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=2, mlp_ratio=2, num_classes=5
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "resnet18": (
        lambda: torchvision.models.resnet18(num_classes=5),
        {"conv1", "fc", "layer2.0.downsample.0", "layer3.0.downsample.0", "layer4.0.downsample.0"},
    ),
    "mobilenet_v3_small": (
        lambda: torchvision.models.mobilenet_v3_small(num_classes=5),
        {"features.0.0", "classifier.3"},
    ),
    "vit": (vit, {"patch_embed.proj", "head"}),
}


@pytest.mark.parametrize("recipe", ["fqt_1bit", "int8"])
@pytest.mark.parametrize("network", NETWORKS)
def test_whole_networks_convert_and_train_a_step(network: str, recipe: str) -> None:
    make, float_layers = NETWORKS[network]
    model = make()
    layers = {name: m for name, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}
    depthwise = {name for name, m in layers.items() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels}
    assert len(depthwise) == (11 if network == "mobilenet_v3_small" else 0)
    if recipe == "int8":
        float_layers = {name for name in float_layers if "downsample" not in name}
    fqt.convert(model, recipe)
    assert set(recipes_of(model)) == layers.keys() - float_layers - depthwise
    size = 32 if network == "vit" else 64
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = nn.functional.cross_entropy(model(torch.randn(4, 3, size, size)), torch.arange(4))
    loss.backward()
    optimizer.step()
    assert bool(loss.isfinite())
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert bool(p.grad.isfinite().all()), name
    still = [name for name, p in model.named_parameters() if name.endswith("weight") and torch.equal(p, before[name])]
    # of 4 samples AGP keeps one a layer on average, sometimes none, and then no gradient arrives further up
    assert len(still) < (0.1 if recipe == "int8" else 0.8) * len(before), still


# --- errors, each of which leaves the model as it was ----------------------------------------------------------------------


def yaml_recipe(text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "bad.yaml"
        path.write_text(text)
        return path

    return write


def token(letter: str) -> object:
    return build("uniform", letter, granularity="token")


def output(text: str) -> Callable[[Path], Path]:
    return yaml_recipe(f"output: {text}\ngrad_input: float\ngrad_weight: float\n")


PLAIN = "output: float\ngrad_input: float\ngrad_weight: float\n"
ERRORS: list[tuple[object, dict[str, object], type[Exception], list[str]]] = [
    ("fqt_1bitt", {}, ValueError, ["unknown recipe 'fqt_1bitt'", "did you mean 'fqt_1bit'?", "built-in recipes:", "int8"]),
    ("dorefa_w2a2", {}, ValueError, ["dorefa_w2a2", "did you mean", "built-in"]),
    ("fqt_1bit_b99", {}, ValueError, ["fqt_1bit_b99", "1 to 16 bits, not 99"]),
    ("dorefa_w0a1g1", {}, ValueError, ["dorefa_w0a1g1", "output.w", "0"]),
    ("nowhere.yaml", {}, ValueError, ["'nowhere.yaml' does not exist", "built-in recipes:"]),
    (Path("nowhere"), {}, ValueError, ["'nowhere' does not exist"]),
    ("no/such", {}, ValueError, ["'no/such' does not exist"]),
    (8, {}, TypeError, ["a recipe is a name, a path or a fqt.Recipe, not int"]),
    (None, {}, TypeError, ["not NoneType"]),
    (yaml_recipe(": ["), {}, ValueError, ["'bad' is not valid YAML"]),
    (yaml_recipe("int8"), {}, ValueError, ["'bad' is a YAML str, not a mapping"]),
    (yaml_recipe(""), {}, ValueError, ["'bad' is a YAML NoneType"]),
    (yaml_recipe("output: float\ngrad_input: float\n"), {}, ValueError, ["lacks the product 'grad_weight'", "write grad"]),
    (yaml_recipe(PLAIN + "rule: []\n"), {}, ValueError, ["no key 'rule'", "did you mean 'rules'?"]),
    (output("8"), {}, ValueError, ["output is 8", "'float' or a mapping of x and w"]),
    (output("{x: float}"), {}, ValueError, ["output lacks its operand 'w'"]),
    (output("{x: float, w: saved}"), {}, ValueError, ["output.w cannot be 'saved'"]),
    (output("{x: float, w: float, g: float}"), {}, ValueError, ["no key 'g'"]),
    (
        output("{x: {quantizer: unifrom}, w: float}"),
        {}, ValueError, ["output.x", "unknown quantizer 'unifrom'", "did you mean 'uniform'?"],
    ),
    (
        output("{x: {quantizer: uniform, bit: 4}, w: float}"),
        {}, ValueError, ["output.x", "no option 'bit'", "did you mean 'bits'?"],
    ),
    (
        output("{x: {quantizer: psq, bits: 4}, w: float}"),
        {}, ValueError, ["output.x", "'psq' is for g (gradient), not for x (activation)"],
    ),
    (yaml_recipe(PLAIN + "rules: {match: a}\n"), {}, ValueError, ["rules is {'match': 'a'}, not a list"]),
    (yaml_recipe(PLAIN + "rules: [{match: a}]\n"), {}, ValueError, ["a rule is {match: pattern, recipe: name or float}"]),
    (yaml_recipe(PLAIN + "rules: [{match: <frist>, recipe: float}]\n"), {}, ValueError, ["'<frist>'", "mean '<first>'?"]),
    (yaml_recipe(PLAIN + "rules: [{match: '8', recipe: int9}]\n"), {}, ValueError, ["unknown recipe 'int9'", "'int8'"]),
    (yaml_recipe(PLAIN + "replace: [ReLU]\n"), {}, ValueError, ["replace is ['ReLU']", "{ReLU: Identity}"]),
    ("int8", {"skip": "layer9"}, ValueError, ["skip pattern 'layer9' matches no layer", "layers: 0, 3, 5, 8, 10"]),
    ("int8", {"skip": ["8", "fc"]}, ValueError, ["skip pattern 'fc'"]),
    ("int8", {"skip": "1"}, ValueError, ["skip pattern '1'", "did you mean '10'?"]),
    ("int8", {"skip": ""}, ValueError, ["skip pattern '' matches no layer"]),
    ("int8", {"skip": 3}, TypeError, ["skip", "not 3"]),
    ("int8", {"skip": [3]}, TypeError, ["skip", "not [3]"]),
    ("int8", {"skip": "*"}, ValueError, ["'int8' converts nothing in this Sequential", "all 5 layers (0, 3, 5, 8)", "skip"]),
    (ONE_BIT, {"skip": ["[035]", "8", "10"]}, ValueError, ["all 5 layers", "everywhere()"]),
    (replace(INT8, rules=(Rule("fc", None),)), {}, ValueError, ["rule 'fc' matches no layer", "layers: 0, 3"]),
    (replace(INT8, rules=(Rule("*", None),)), {}, ValueError, ["all 5 layers", "stay float by the rule '*'"]),
    (replace(INT8, replace=(("ReLu", "Identity"),)), {}, ValueError, ["'ReLu'", "did you mean 'ReLU'?"]),
    (replace(INT8, replace=(("ReLU", "functional"),)), {}, ValueError, ["'functional'", "no module of torch.nn"]),
    (replace(INT8, replace=(("ReLU", "Parameter"),)), {}, ValueError, ["'Parameter'", "no module of torch.nn"]),
    (replace(INT8, replace=(("ReLU", "PReLU"),)), {}, ValueError, ["'PReLU'", "has parameters"]),
    (replace(INT8, replace=(("ReLU", "Linear"),)), {}, ValueError, ["cannot make a Linear", "in_features"]),
    (
        Recipe("tokens", Product(token("x"), build("uniform", "w")), Product("float", "saved"), Product("float", "saved")),  # type: ignore[arg-type]
        {}, ValueError, ["layer '0'", "'tokens'", "x in output", "each token", "conv", "use granularity tensor or sample"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "options", "kind", "words"), ERRORS)
def test_a_refused_conversion_says_why_and_leaves_the_model_whole(
    recipe: object, options: dict[str, object], kind: type[Exception], words: list[str], tmp_path: Path
) -> None:
    model = small()
    before = fingerprint(model)
    with pytest.raises(kind) as caught:
        fqt.convert(model, recipe(tmp_path) if callable(recipe) else recipe, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert not [word for word in words if word not in message], message
    assert "\n" not in message, "one paragraph"
    assert fingerprint(model) == before


MODEL_ERRORS: list[tuple[Callable[[], object], type[Exception], list[str]]] = [
    (lambda: fqt.convert("model", "int8"), TypeError, ["convert takes a torch.nn.Module, not str"]),  # type: ignore[arg-type]
    (lambda: fqt.convert(nn.Linear, "int8"), TypeError, ["class Linear", "make an instance"]),  # type: ignore[arg-type]
    (lambda: fqt.convert([nn.Linear(2, 2)], "int8"), TypeError, ["not list"]),  # type: ignore[arg-type]
    (lambda: fqt.convert(nn.ReLU(), "int8"), ValueError, ["no layer of a kind that fqt converts (nn.Linear, ", "ReLU"]),
    (lambda: fqt.convert(nn.Sequential(), ONE_BIT), ValueError, ["converts nothing", "check that this is the model"]),
    (lambda: fqt.convert(nn.Sequential(nn.LazyLinear(3)), INT8), ValueError, ["held by 1 LazyLinear, none of a kind"]),
    (
        lambda: fqt.convert(nn.ModuleDict({"a": MyLinear(3, 3), "b": nn.LSTM(3, 3)}), INT8),
        ValueError, ["held by 1 MyLinear, 1 LSTM, none of a kind", "fqt.summary(model)", "fqt.register_layer"],
    ),
    (lambda: fqt.convert(fqt.convert(small(), "int8"), "int8"), ValueError, ["already (3 layers", "'3'", "fqt.revert(model)"]),
    (lambda: fqt.convert(fqt.convert(small(), "int8"), "fp32"), ValueError, ["already"]),
    (lambda: fqt.convert(nn.Sequential(fqt.convert(nn.Linear(3, 3), INT8)), INT8), ValueError, ["(1 layers", "'0'"]),
    (lambda: fqt.revert(small()), ValueError, ["nothing in this Sequential is converted"]),
    (lambda: fqt.revert(fqt.convert(small(), "fp32")), ValueError, ["nothing in this Sequential"]),
    (lambda: fqt.revert(fqt.revert(fqt.convert(small(), "int8"))), ValueError, ["nothing to revert"]),
    (lambda: fqt.convert(small(), INT8)(torch.ones(2, 4, 8, 8)), ValueError, ["(2, 4, 8, 8)", "(N, 3, H, W)"]),
    (lambda: fqt.convert(small(), INT8)[8](torch.ones(2, 23)), ValueError, ["(2, 23)", "last axis must be 24"]),
    (lambda: fqt.convert(small(), INT8)[5](torch.ones(2, 6, 2, 9)), ValueError, ["3x3 window", "2x9 input"]),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "words"), MODEL_ERRORS)
def test_a_wrong_model_or_input_is_named(call: Callable[[], object], kind: type[Exception], words: list[str]) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


def test_a_second_conversion_leaves_the_first_whole() -> None:
    model = fqt.convert(small(), "fqt_1bit")
    before = fingerprint(model)
    with pytest.raises(ValueError, match="already"):
        fqt.convert(model, "int8")
    assert fingerprint(model) == before


def test_the_log_says_once_what_was_converted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fqt"):
        fqt.convert(small(), "fqt_1bit")
    (record,) = caplog.records
    assert (
        "fqt_1bit: 2 of 5 layers converted, 2 activations replaced (4, 6); 1 kept for float readers (2); "
        "<first> is (0); <last> is (10)" in record.getMessage()
    )
    reference = {row.backend for row in fqt.summary(fqt.convert(small(), "fqt_1bit")).rows if row.bits["output"] < 32}
    assert ("fqt.summary(model)" in record.getMessage()) == any("reference" in name for name in reference)


def test_a_rule_whose_recipe_needs_a_replacement_is_refused_until_the_recipe_gives_it():
    rule = fqt.Rule("*", fqt.load_recipe("xnor"))
    with pytest.raises(
        ValueError, match=r"follows a recipe that replaces ReLU by Identity.* give it replace: {ReLU: Identity}"
    ):
        replace(fqt.load_recipe("int8"), rules=(rule,))
    replaced = (("ReLU", "Identity"), ("ReLU6", "Identity"))
    recipe = replace(fqt.load_recipe("int8"), rules=(rule,), replace=replaced)
    model = fqt.convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), recipe)
    assert type(model[1]) is nn.Identity
