"""The examples of CONTRIBUTING.md run as they stand there."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import fqt
from fqt import ops
from fqt.layers import base
from fqt.precision.policy import POLICIES
from fqt.quantizers import QUANTIZERS, build, quantize
from fqt.quantizers.stages import KINDS

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()


def example(language: str, name: str) -> str:
    found = re.search(rf"```{language}\n# {name}\n(.*?)```", TEXT, re.DOTALL)
    assert found, f"CONTRIBUTING.md has no {language} example '# {name}'"
    return found[1]


def run_as_module(name: str, source: str) -> types.ModuleType:
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(source, module.__dict__)  # noqa: S102  the example is the subject
    return module


@pytest.fixture
def tables():
    """The tables that the examples add to, as they were, afterwards."""
    quantizers, kernels, policies = dict(QUANTIZERS), list(ops.KERNELS), dict(POLICIES)
    stages, adapters = {kind: dict(words) for kind, (_, words) in KINDS.items()}, dict(base.ADAPTERS)
    yield
    base.ADAPTERS.clear()
    base.ADAPTERS.update(adapters)
    for kind, words in stages.items():
        KINDS[kind][1].clear()
        KINDS[kind][1].update(words)
    POLICIES.clear()
    POLICIES.update(policies)
    QUANTIZERS.clear()
    QUANTIZERS.update(quantizers)
    ops.KERNELS[:] = kernels
    for name in [name for name in sys.modules if name.startswith("example_")]:
        del sys.modules[name]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(8 * 16, 4))


@pytest.mark.usefixtures("tables")
def test_quantizer_recipe_and_kernel_examples(tmp_path):
    run_as_module("example_quantizer", example("python", "quantizer"))
    path = tmp_path / "mine.yaml"
    path.write_text(example("yaml", "recipe"))
    converted = fqt.convert(model(), path)
    x = torch.randn(4, 3, 8, 8)
    expected = converted(x)
    (row,) = [row for row in fqt.summary(converted).rows if row.kind == "QuantConv2d"]
    assert row.grad_input.startswith("uint2/tensor") and "example" not in row.backend

    run_as_module("example_kernel", example("python", "kernel"))
    (row,) = [row for row in fqt.summary(converted).rows if row.kind == "QuantConv2d"]
    assert row.backend.startswith("example")
    assert torch.equal(converted(x), expected)
    converted(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in converted.parameters())


@pytest.mark.usefixtures("tables")
def test_policy_example():
    run_as_module("example_policy", example("python", "policy"))
    converted = fqt.convert(model(), "int8")
    policy = fqt.build_policy("settle", converted, patience=2)
    losses = [3.0, 2.0, 2.5, 2.1, 1.0]
    decided = [policy.step(loss) for loss in losses]
    assert [len(decisions) for decisions in decided] == [0, 0, 0, 1, 0]
    (layer,) = policy.layers.values()
    assert (layer.recipe.bits("output"), layer.recipe.format("grad_input", "g").bits) == (8, 4)
    again = fqt.build_policy("settle", fqt.convert(model(), "int8"))
    again.load_state_dict(policy.state_dict())
    assert again.own_state() == {"best": 1.0, "waited": 0}


def test_every_file_of_the_map_exists():
    root = Path(__file__).parent.parent
    named = re.findall(r"`((?:fqt|train|benchmarks)/[\w./]*)`", TEXT)
    assert len(named) > 10
    for name in named:
        assert (root / name).exists(), name


@pytest.mark.usefixtures("tables")
def test_calibration_example():
    run_as_module("example_calibration", example("python", "calibration"))
    quantizer = build("uniform", "x", bits=4, granularity="sample", calibrate={"mean_plus_deviations": {"deviations": 2}})
    x = torch.randn(3, 4, 50)
    q, _ = quantize(x, quantizer, "x")
    size = x.abs().flatten(1)
    torch.testing.assert_close(q.scale, (size.mean(1) + 2 * size.std(1, correction=0)) / 7)
    assert float((q.decode() - x).abs().max()) > float(q.scale.max()) / 2, "what lies beyond the span saturates"


@pytest.mark.usefixtures("tables")
def test_estimator_example():
    run_as_module("example_estimator", example("python", "estimator"))
    x = build("xnor_activation", "x", estimator={"soft": {"width": 2.0}})
    saved = fqt.Product("float", "saved")
    layer = fqt.convert(nn.Linear(6, 3), fqt.Recipe("soft", fqt.Product(x, build("xnor_weight", "w")), saved, saved))
    assert layer.state_dict()["quantizers.output_x.soft.width"] == 2.0
    values, g = torch.randn(4, 6, requires_grad=True), torch.randn(4, 3)
    layer(values).backward(g)
    weight = layer.quantized_weight().decode()[:, 0]
    torch.testing.assert_close(values.grad, g @ weight * (1 - torch.tanh(values.detach() / 2).square()))


@pytest.mark.usefixtures("tables")
def test_layer_example():
    module = run_as_module("example_layer", example("python", "layer"))
    plain = module.Scaled(16, 8)
    net = nn.Sequential(plain)
    x = torch.randn(5, 16)
    expected = plain(x)
    fqt.convert(net, fqt.load_recipe("int8").everywhere())
    assert type(net[0]) is module.QuantScaled
    assert float((net(x) - expected).detach().norm() / expected.detach().norm()) < 0.05
    assert fqt.summary(net).rows[0].madds == 16 * 8
    assert fqt.profile(net, x, seconds=0.01).rows
    assert type(fqt.revert(net)[0]) is module.Scaled
