"""The modelled speed-up counts every matrix product, and FlopCounterMode knows the low-bit ones."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fqt

EVERYWHERE = fqt.load_recipe("int8").everywhere()


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 5)
    )


def flops(model: nn.Module, *inputs: Tensor, backward: bool = False) -> int:
    with FlopCounterMode(display=False) as counter:
        output = model(*inputs)
        if backward:
            output.sum().backward()
    return counter.get_total_flops()


def test_by_hand() -> None:
    model = fqt.convert(small(), "fqt_1bit")
    first, middle, last = 216 * 64, 216 * 36, 540
    cost = 32 * 3 * (first + last) + middle * (1 + 4 / 4 + 4 / 4)
    expected = 32 * 3 * (first + middle + last) / cost
    assert fqt.modelled_speedup(model, torch.randn(2, 3, 8, 8)) == pytest.approx(expected)
    assert fqt.modelled_speedup(fqt.revert(model), torch.randn(2, 3, 8, 8)) == 1.0


@pytest.mark.parametrize(("name", "expected"), [("int8", 4.0), ("fqt_w1a1g4", 96 / 9), ("xnor", 96 / 65), ("psq_b1", 32)])
def test_one_layer(name: str, expected: float) -> None:
    layer = fqt.convert(nn.Linear(6, 5), fqt.load_recipe(name).everywhere())
    assert fqt.modelled_speedup(layer, torch.randn(2, 6)) == pytest.approx(expected)


class Twice(nn.Module):
    """One small layer called three times, a larger one once, tokens among the samples, and scores that are no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Linear(8, 8), nn.Linear(8, 24)

    def forward(self, x_NTC: Tensor) -> Tensor:
        n, t, c = x_NTC.shape
        y = self.small(self.small(self.small(x_NTC.reshape(n * t, c))))
        return self.large(y.reshape(n, t, c) @ x_NTC.transpose(1, 2) @ x_NTC)


def test_every_call_every_token_and_the_products_of_no_layer_count() -> None:
    model = fqt.convert(Twice(), EVERYWHERE, skip="large")
    low, scores, large = 3 * 8 * 8, 2 * 8 * 5, 8 * 24  # multiply-adds a token, of 5 tokens
    expected = (low + scores + large) / (low / 4 + scores + large)
    assert fqt.modelled_speedup(model, torch.randn(2, 5, 8)) == pytest.approx(expected)


def test_float_layers_of_any_kind_are_in_the_cost() -> None:
    model = fqt.convert(nn.Sequential(nn.Conv1d(4, 64, 5, padding=2), nn.Conv1d(64, 2, 1)), EVERYWHERE, skip="0")
    kept, low = 4 * 64 * 5, 64 * 2
    assert fqt.modelled_speedup(model, torch.randn(2, 4, 16)) == pytest.approx((kept + low) / (kept + low / 4))


@pytest.mark.parametrize("recipe", ["int8", "xnor"])
def test_an_attention_and_its_projection_count_once_each(recipe: str) -> None:
    model = fqt.convert(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), fqt.load_recipe(recipe).everywhere())
    layers, scores = 4 * 16 * 16 + 2 * 16 * 32, 2 * 6 * 16
    low = layers / 4 if recipe == "int8" else layers * (1 + 32 + 32) / 96
    assert fqt.modelled_speedup(model, torch.randn(3, 6, 16)) == pytest.approx((layers + scores) / (low + scores))


@pytest.mark.parametrize("recipe", ["int8", "fqt_1bit"])
def test_the_flop_counter_counts_converted_layers_as_it_counts_plain_ones(recipe: str) -> None:
    def net() -> nn.Sequential:
        blocks = [nn.Conv2d(4, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)]
        return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(72, 5))

    x = torch.randn(3, 4, 10, 10, requires_grad=True)
    converted = fqt.convert(net(), fqt.load_recipe(recipe).everywhere())
    assert flops(converted, x, backward=True) == flops(net(), x, backward=True)
