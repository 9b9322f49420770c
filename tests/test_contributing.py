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
from fqt.precision.policy import POLICIES
from fqt.quantizers import QUANTIZERS

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
    yield
    POLICIES.clear()
    POLICIES.update(policies)
    QUANTIZERS.clear()
    QUANTIZERS.update(quantizers)
    ops.KERNELS[:] = kernels
    sys.modules.pop("example_kernel", None)
    sys.modules.pop("example_policy", None)
    sys.modules.pop("example_quantizer", None)


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
