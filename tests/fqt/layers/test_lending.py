"""Modules that call F.linear with a layer's weight call the layer, where a forward of example has shown that they do."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import fqt
from tests.fqt.helpers import fingerprint
from tests.fqt.layers.cases import INT16, step


class Block(nn.Module):
    """Three ways to a bias, and a layer that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.called = nn.Linear(6, 6)
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.linear(x, self.one.weight, self.one.bias))
        x = torch.tanh(F.linear(x, weight=self.two.weight, bias=self.shift))
        return self.called(F.linear(x, self.three.weight, 2 * self.three.bias))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), Block())


X = torch.randn(4, 6)


def test_sixteen_bits_give_what_the_model_does() -> None:
    plain = model()
    made = fqt.convert(copy.deepcopy(plain), INT16, example=X)
    for one, other in zip(step(made, X), step(plain, X), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3 * float(other.abs().max()))
    assert [(row.name, row.bits["output"]) for row in fqt.summary(made).rows] == [
        ("0", 16), ("1.one", 16), ("1.two", 16), ("1.three", 16), ("1.called", 16),
    ]  # fmt: skip


def test_the_share_counts_them(caplog: pytest.LogCaptureFixture) -> None:
    fqt.convert(model(), "int8", skip="1.called", example=X)
    assert "only" not in caplog.text, "three of five"
    fqt.convert(model(), "int8", only="1.one", example=X)
    assert "only 20% of the multiply-adds are in low bits" in caplog.text


def test_copies_pickles_and_revert() -> None:
    made = model()
    before = fingerprint(made)
    fqt.convert(made, INT16, example=X)
    assert isinstance(made[1], Block)
    expected = made(X)
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(again(X), expected) and isinstance(again[1], Block)
    torch.testing.assert_close(torch.compile(copy.deepcopy(made), backend="eager")(X), expected)
    fqt.revert(made)
    assert fingerprint(made) == before


@pytest.mark.parametrize(
    ("make", "size", "name"),
    [
        (
            lambda: timm.create_model("test_beit", num_classes=3) if timm.is_model("test_beit") else None,
            160,
            "blocks.0.attn.qkv",
        ),
        (lambda: torchvision.models.swin_t(num_classes=3), 64, "features.1.0.attn.qkv"),
        (lambda: torchvision.models.swin_v2_t(num_classes=3), 64, "features.1.0.attn.qkv"),
    ],
    ids=["beit", "swin", "swin v2"],
)
@pytest.mark.every(2)
def test_attention_blocks_of_real_models(make, size: int, name: str) -> None:
    made = make()
    if made is None:
        pytest.skip("this timm has no such model")
    x = torch.randn(2, 3, size, size)
    fqt.convert(made, "int8", example=x)
    made(x).square().sum().backward()
    assert all(row.madds for row in fqt.summary(made).rows if row.kind.startswith("Quant"))
    assert made.get_submodule(name).weight.grad is not None
