"""nn.Conv1d is converted, and computes what nn.Conv2d does over images one pixel high."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fqt

CASES = {
    "plain": ({}, (4, 6, 20)),
    "stride": ({"stride": 2, "padding": 1}, (4, 6, 21)),
    "same": ({"padding": "same", "dilation": 2}, (4, 6, 20)),
    "even same": ({"padding": "same", "kernel_size": 4}, (4, 6, 20)),
    "groups": ({"groups": 3, "padding": 2, "bias": False}, (4, 6, 20)),
    "circular": ({"padding": 2, "padding_mode": "circular"}, (4, 6, 20)),
    "reflect": ({"padding": 2, "padding_mode": "reflect"}, (4, 6, 20)),
    "no batch": ({}, (6, 20)),
}


def step(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(2)
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
    return [y.detach(), leaf.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("recipe", ["int8", "fqt_1bit", "xnor", "dorefa_w1a2g6"])
def test_it_is_the_convolution_of_flat_images(name, recipe):
    options, shape = CASES[name]
    torch.manual_seed(0)
    plain = nn.Conv1d(6, 9, **{"kernel_size": 3, **options})
    flat_options = {key: value for key, value in options.items() if key != "kernel_size"}
    flat_options = {k: (1, v) if k in ("stride", "dilation") else (0, v) if isinstance(v, int) and k == "padding" else v
                    for k, v in flat_options.items()}  # fmt: skip
    flat = nn.Conv2d(6, 9, (1, plain.kernel_size[0]), **flat_options)
    with torch.no_grad():
        flat.weight.copy_(plain.weight.unsqueeze(2))
        if plain.bias is not None:
            flat.bias.copy_(plain.bias)
    chosen = fqt.load_recipe(recipe).everywhere()
    layer, flat = fqt.convert(copy.deepcopy(plain), chosen), fqt.convert(flat, chosen)
    x = torch.randn(shape)
    for one, other in zip(step(layer, x), step(flat, x.unsqueeze(-2)), strict=True):
        assert torch.equal(one, other.squeeze(-2) if other.dim() > 1 else other)


def test_everything_that_asks_about_layers_knows_it():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv1d(16, 16, 3, groups=16), nn.Conv1d(16, 4, 1, stride=2)
    )
    x = torch.randn(4, 8, 30)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"all 3 layers \(0, 2, 3\) stay float"):  # the first, a depthwise one, the last
        fqt.convert(model, "int8")
    fqt.convert(model, fqt.load_recipe("int8").everywhere())
    assert model.state_dict().keys() == before.keys()
    y = model(x)
    rows = fqt.summary(model).rows
    assert [row.kind for row in rows] == ["QuantConv1d"] * 3
    assert [row.madds for row in rows] == [30 * 8 * 16 * 3, 28 * 16 * 3, 14 * 16 * 4]
    assert y.shape == (4, 4, 14)
    with fqt.observe_gradients(model) as seen:
        model(x).square().sum().backward()
    assert set(seen["0"]) == {"grad_input", "grad_weight"}
    assert {row.layer for row in fqt.profile(model, x, seconds=0.01).rows} == {"0", "2", "3"}
    assert fqt.memory(model, x, measure=False).converted.rows["packed weights"] > 0
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    plain = fqt.revert(model)
    assert all(type(layer) in (nn.Conv1d, nn.ReLU) for layer in plain)
