"""torch.fx and what is made of it see a converted model as they see the plain one: layers are leaves."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torchvision
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import fqt


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 8),
        nn.BatchNorm1d(8), nn.Linear(8, 2),
    )  # fmt: skip


@pytest.mark.parametrize("recipe", ["int8", "fqt_1bit", "xnor"])
def test_the_graph_is_that_of_the_plain_model_and_computes_the_same(recipe: str) -> None:
    model = network()
    plain = [(node.op, node.target) for node in fx.symbolic_trace(model).graph.nodes]
    fqt.convert(model, recipe)
    traced = fx.symbolic_trace(model)
    assert [(node.op, node.target) for node in traced.graph.nodes] == plain
    assert traced.get_submodule("4") is model[4]
    x = torch.randn(4, 3, 8, 8)
    for mode in (True, False):
        results = []
        for one in (copy.deepcopy(model).train(mode), copy.deepcopy(traced).train(mode)):
            torch.manual_seed(0)
            y = one(x)
            y.square().sum().backward()
            results.append([y.detach(), *(p.grad for p in one.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_hook_runs_when_the_graph_does_and_not_while_it_is_traced() -> None:
    model, calls = fqt.convert(network(), "int8"), []
    model[4].register_forward_hook(lambda module, args, y: calls.append(type(y)))
    traced = fx.symbolic_trace(model)
    assert calls == []
    traced(torch.randn(4, 3, 8, 8))
    assert calls == [torch.Tensor]


def test_layers_of_other_kinds_are_leaves_too() -> None:
    model = fqt.convert(nn.Sequential(nn.Conv1d(3, 4, 3), nn.Conv1d(4, 4, 3)), fqt.load_recipe("int8").everywhere())
    assert [node.op for node in fx.symbolic_trace(model).graph.nodes] == ["placeholder", *["call_module"] * 2, "output"]


@pytest.mark.parametrize("recipe", ["int8", "fqt_1bit"])
def test_torchvisions_feature_extractor(recipe: str) -> None:
    model = torchvision.models.resnet18(num_classes=3)
    plain = get_graph_node_names(model)
    fqt.convert(model, recipe)
    names = get_graph_node_names(model)
    assert names == plain
    extractor = create_feature_extractor(model, {"layer1.0.bn1": "early", "layer3": "late"})
    found = extractor.eval()(torch.randn(2, 3, 32, 32))
    assert {name: tuple(y.shape) for name, y in found.items()} == {"early": (2, 64, 8, 8), "late": (2, 256, 2, 2)}
    assert not any(bool(y.isnan().any()) for y in found.values())


def test_copies_and_pickles_stay_leaves_and_revert_takes_it_away() -> None:
    model = network()
    before = [sorted(module.__dict__) for module in model.modules()]
    fqt.convert(model, "fqt_1bit")
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        fx.symbolic_trace(again)
    assert type(model[4]).__module__ == "fqt.layers.conv"
    fqt.revert(model)
    assert [sorted(module.__dict__) for module in model.modules()] == before


TRANSFORMS = {
    "vmap": (lambda model, x: torch.func.vmap(model)(x), r"torch\.func\.vmap"),
    "samples": (lambda model, x: torch.func.vmap(torch.func.grad(lambda x: model(x).sum()))(x), r"torch\.func\.vmap"),
    "ensemble": (
        lambda model, x: torch.func.vmap(lambda w: torch.func.functional_call(model, {"0.weight": w}, (x,)))(
            x.new_ones(3, 8, 8)
        ),
        r"torch\.func\.vmap",
    ),
    "jacrev": (lambda model, x: torch.func.jacrev(model)(x), r"torch\.func\.vmap \(jacrev"),
    "jvp": (lambda model, x: torch.func.jvp(model, (x,), (x,)), "no forward-mode derivative"),
    "trace": (torch.jit.trace, r"torch\.jit\.trace cannot"),
    "script": (lambda model, x: torch.jit.script(model), r"torch\.jit\.script cannot compile a QuantLinear"),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize(("transform", "words"), TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("recipe", ["int8", "fqt_1bit"])
def test_other_transforms_are_refused_with_the_way_out(recipe: str, transform, words: str) -> None:
    model = fqt.convert(nn.Sequential(nn.Linear(8, 8)), fqt.load_recipe(recipe).everywhere())
    with pytest.raises(NotImplementedError, match=words + r".*fqt\.revert"):
        transform(model, torch.randn(4, 8))
    transform(fqt.revert(model), torch.randn(4, 8))


def test_no_kernel_is_missed_on_the_meta_device(caplog: pytest.LogCaptureFixture) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    fqt.convert(model, fqt.load_recipe("int8").everywhere())
    assert "reference" not in caplog.text
