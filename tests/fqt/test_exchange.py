"""Activations are exchanged where a 1-bit layer reads them, stay where a float layer does, and signs of ReLU are found."""

from __future__ import annotations

import logging

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import fqt

ONE_BIT = fqt.load_recipe("fqt_1bit").everywhere()


def replaced(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is nn.Identity]


def mlp() -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(5):
        layers += [nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(8, 2))


@pytest.mark.parametrize("example", [None, torch.randn(4, 8)], ids=["traced", "forward"])
def test_where_skip_leaves_the_reader_float_the_activation_stays(example) -> None:
    assert replaced(fqt.convert(mlp(), "fqt_1bit", example=example)) == ["2", "5", "8", "11"]
    assert replaced(fqt.convert(mlp(), "fqt_1bit", skip=["3", "6"], example=example)) == ["8", "11"]
    assert replaced(fqt.convert(mlp(), "fqt_1bit", overrides={"6": "int8"}, example=example)) == ["2", "8", "11"]


def test_where_min_speedup_leaves_the_reader_float_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from fqt.inspect.timing import Profile

    class Said(Profile):
        def speedups(self) -> dict[str, float]:
            return {"3": 2.0, "6": 0.5, "9": 2.0, "12": 2.0}

    monkeypatch.setattr(sys.modules["fqt.convert"], "measure", lambda *args, **options: Said([]))
    assert replaced(fqt.convert(mlp(), "fqt_1bit", min_speedup=1.0, example=torch.randn(4, 8))) == ["2", "8", "11"]


def test_a_shared_activation_goes_if_one_of_its_readers_needs_signs() -> None:
    model = torchvision.models.resnet18(num_classes=3)
    fqt.convert(model, "fqt_1bit", skip="layer1.*")
    # layer1.1.relu is read within its block, which is float, and by layer2.0.conv1, which is not
    kept = [name for name, module in model.named_modules() if type(module) is nn.ReLU]
    assert kept == ["relu", "layer1.0.relu"]


def test_timms_activations_behind_a_residual_belong_to_the_next_block() -> None:
    model = fqt.convert(timm.create_model("resnet10t", num_classes=3), "fqt_1bit")
    assert "layer1.0.act2" in replaced(model) and "layer4.0.act2" not in replaced(model)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x if x.sum() > 0 else -x)


def test_without_a_trace_the_layers_beside_it_decide() -> None:
    assert replaced(fqt.convert(Untraceable(), "fqt_1bit", skip=["*.3", "*.6"])) == ["body.8", "body.11", "body.14"]


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.act(self.two(F.relu(self.one(x)))))


@pytest.mark.parametrize("example", [{"x": torch.randn(4, 8)}, None], ids=["forward", "traced"])
def test_a_functional_relu_before_a_sign_is_said(example, caplog: pytest.LogCaptureFixture) -> None:
    fqt.convert(Functional(), ONE_BIT, example=example)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "two takes signs of values that are nowhere negative (behind " in record.getMessage()
    assert "three takes" not in record.getMessage() and "one takes" not in record.getMessage()
    caplog.clear()
    fqt.convert(Functional(), "int8", example=example)
    assert "nowhere negative" not in caplog.text


def test_images_that_are_nowhere_negative_are_said(caplog: pytest.LogCaptureFixture) -> None:
    fqt.convert(mlp(), ONE_BIT, example=torch.rand(4, 8))
    assert "0 takes signs of values that are nowhere negative (behind its input)" in caplog.text


def test_a_conversion_that_reaches_little_says_so_in_its_line(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 5), nn.Conv2d(16, 4, 1), nn.Flatten(), nn.Linear(64, 2))
    fqt.convert(model, "int8", example=torch.randn(2, 3, 8, 8))
    (record,) = caplog.records
    madds = 16 * (75 * 16 + 64) + 128
    assert f"only {16 * 64 / madds:.0%} of the multiply-adds are in low bits" in record.getMessage()
    caplog.clear()
    fqt.convert(fqt.revert(model), "int8")
    assert f"only {64 / (1200 + 64 + 128):.0%} of the weights of matrices are in low bits" in caplog.text


def test_layers_that_the_example_does_not_call_are_said(caplog: pytest.LogCaptureFixture) -> None:
    class Borrows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(F.linear(x, self.inner.weight))

    fqt.convert(Borrows(), fqt.load_recipe("int8").everywhere(), example=torch.randn(2, 6))
    assert "1 converted layers are not called by example (inner): where the module around one calls F.linear" in caplog.text
