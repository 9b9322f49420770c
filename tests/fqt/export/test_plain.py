"""A frozen model is exported by torch, saved and loaded; and its graph without fqt's operators computes the same bits."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

import fqt
from fqt.export.plain import plain_graph
from fqt.quantizers import build
from fqt.recipe import Product, Recipe
from tests.fqt.export.cases import recipe

RECIPES = ("fqt_1bit", "int8", "int4", "bitnet", "dorefa_w1a2g6", "adapt", "int8_token")


class Block(nn.Module):
    """Attention and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.norm = nn.MultiheadAttention(16, 2, batch_first=True), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x, x, x, need_weights=False)[0]
        return x + self.down(torch.relu(self.up(self.norm(x))))


def linear() -> tuple[nn.Module, Tensor]:
    """A layer of every recipe, one with a calibration of its own, and one whose activations alone are codes."""
    x, w = (build("uniform", letter, bits=8, granularity="tensor", calibrate="moving_average") for letter in "xw")
    average = Recipe("average", Product(x, w), Product("float", "saved"), Product("float", "saved"))
    half = Recipe("half", Product(build("uniform", "x"), "float"), Product("float", "float"), Product("float", "saved"))
    recipes = [*map(recipe, RECIPES), average, half]
    model = nn.Sequential(*(nn.Linear(24, 24) for _ in recipes))
    fqt.convert(model, "int8", overrides={str(i): each for i, each in enumerate(recipes)})
    return model, torch.randn(6, 24)


def convolutions() -> tuple[nn.Module, Tensor]:
    """Convolutions of all kinds of window, BatchNorms and poolings between those of signs."""
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, (3, 2), padding="same", bias=False, groups=2),
        nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, stride=2, dilation=2, padding=(3, 2)), nn.Conv2d(8, 4, 1),
        nn.Conv2d(4, 4, 2, padding=1), nn.Flatten(), nn.Linear(48, 3),
    )  # fmt: skip
    by_name = {"5": "int8", "6": "dorefa_w1a2g6", "7": "int4", "9": "bitnet"}
    fqt.convert(model, recipe("fqt_1bit"), overrides={name: recipe(each) for name, each in by_name.items()})
    return model, torch.randn(4, 4, 8, 8)


def block() -> tuple[nn.Module, Tensor]:
    return fqt.convert(Block(), recipe("int8_token")), torch.randn(3, 5, 16)


def exported(frozen: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(frozen, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))


@pytest.mark.parametrize("make", [linear, convolutions, block])
@pytest.mark.every(2)
def test_plain_operations_give_the_frozen_models_bits_for_any_batch(make):
    torch.manual_seed(0)
    model, x = make()
    model(x)  # statistics move
    frozen = fqt.freeze(model)
    graph = plain_graph(exported(frozen, x).module())
    assert not any("fqt" in str(node.target) for node in graph.graph.nodes)
    with torch.no_grad():
        for batch in (x, x[:2], torch.cat([x, 3 * x])):
            assert torch.equal(graph(batch), frozen(batch))
        zeros = torch.zeros_like(x)
        assert torch.equal(graph(-zeros), frozen(zeros)), "sign(-0) is +1"


class Both(nn.Module):
    """A convolution whose activations have an offset, and a linear layer whose weight has one, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x), self.linear(x.flatten(1))


def test_offsets_are_equal_but_for_rounding():
    torch.manual_seed(0)
    x, w = (build("affine", letter) for letter in "xw")
    affine = Recipe("affine", Product(x, w), Product("float", "float"), Product("float", "float"))
    model = fqt.convert(Both(), "int8", overrides={"conv": affine, "linear": recipe("dorefa_w8a8g8")})
    images = torch.randn(3, 3, 4, 4)
    frozen = fqt.freeze(model)
    with torch.no_grad():
        graph = plain_graph(exported(frozen, images).module())
        torch.testing.assert_close(graph(images), frozen(images), atol=1e-5, rtol=1e-5)


def test_an_exported_program_is_saved_and_loaded():
    torch.manual_seed(0)
    model, x = convolutions()
    frozen = fqt.freeze(model)
    file = io.BytesIO()
    torch.export.save(exported(frozen, x), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    with torch.no_grad():
        assert all(torch.equal(loaded(batch), frozen(batch)) for batch in (x, x[:3]))


def test_what_has_no_plain_form_is_refused_with_the_reason():
    model = fqt.convert(nn.Sequential(nn.Linear(32, 4)), Recipe(
        "e4m3", *(Product(build("float8", a), build("float8", b)) for a, b in ("xw", "gw", "gx"))
    ))  # fmt: skip
    with pytest.raises(
        ValueError, match="activations of format e4m3 are small floats, for which no plain operations are known"
    ):
        plain_graph(exported(fqt.freeze(model), torch.randn(2, 32)).module())
    trained = fqt.convert(nn.Sequential(nn.Linear(32, 4)), recipe("int8"))
    with pytest.raises(ValueError, match="a weight of format int8:O is quantized at every forward: fqt.freeze the model first"):
        plain_graph(exported(trained.eval(), torch.randn(2, 32)).module())
