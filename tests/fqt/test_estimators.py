"""The gradients of quantized operands against explicit autograd graphs of the papers' formulas, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from fqt import functional
from fqt.quantizers import Quantizer
from tests.fqt.layer_cases import (
    LAYERS,
    Layer,
    affine,
    assert_close,
    dorefa_w,
    dorefa_x,
    fixed_point,
    float8,
    float_gradient_recipe,
    gradients_of,
    layers,
    passing,
    quantizer,
    sign,
    symmetric,
    ternary,
    xnor_w,
    xnor_x,
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny shapes: more threads only wait for each other


# Each entry: the quantizer, and its paper's formula in autograd with the detach trick, v + (q(v) - v).detach().


ACTIVATIONS = {
    "xnor": (quantizer("x", "xnor_activation"), xnor_x),
    "dorefa1": (quantizer("x", "dorefa_activation", bits=1), dorefa_x(1)),
    "dorefa3": (quantizer("x", "dorefa_activation", bits=3), dorefa_x(3)),
    "uniform8": (quantizer("x", "uniform", bits=8), symmetric(8)),
    "uniform4_sample": (quantizer("x", "uniform", bits=4, granularity="sample"), symmetric(4, 1)),
    "affine8": (quantizer("x", "affine", bits=8), affine(8)),
    "fixed_point": (
        quantizer("x", "fixed_point", word_length=6, fraction_length=3, stochastic=False),
        fixed_point(6, 3),
    ),
    "float8": (quantizer("x", "float8"), float8),
}
WEIGHTS = {
    "xnor": (quantizer("w", "xnor_weight"), xnor_w),
    "dorefa1": (quantizer("w", "dorefa_weight", bits=1), dorefa_w(1)),
    "dorefa2": (quantizer("w", "dorefa_weight", bits=2), dorefa_w(2)),
    "dorefa8": (quantizer("w", "dorefa_weight", bits=8), dorefa_w(8)),
    "uniform8_channel": (quantizer("w", "uniform", bits=8, granularity="channel"), symmetric(8, 1)),
    "ternary": (quantizer("w", "ternary_weight"), ternary),
}


def check_estimator(layer: Layer, x_pair: tuple | None, w_pair: tuple | None) -> None:
    x, w, b = (t.requires_grad_() for t in layer.tensors())
    recipe = float_gradient_recipe(x_pair and x_pair[0], w_pair and w_pair[0])
    y = layer.run(x, w, b, recipe)
    g = torch.randn_like(y)
    actual = gradients_of(y, g, x, w, b)

    x64, w64, b64 = (t.detach().double().requires_grad_() for t in (x, w, b))
    xq = x_pair[1](x64) if x_pair else x64
    wq = w_pair[1](w64) if w_pair else w64
    expected = gradients_of(layer.float_run(xq, wq, b64), g, x64, w64, b64)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other)


@layers
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_estimators_equal_the_explicit_graph(layer: Layer, name: str) -> None:
    check_estimator(layer, ACTIVATIONS[name], WEIGHTS["xnor"])


@layers
@pytest.mark.parametrize("name", WEIGHTS)
def test_weight_estimators_equal_the_explicit_graph(layer: Layer, name: str) -> None:
    check_estimator(layer, ACTIVATIONS["xnor"], WEIGHTS[name])


@layers
@pytest.mark.parametrize("only", ["x", "w", "neither"])
def test_one_quantized_operand_or_none_equals_the_explicit_graph(layer: Layer, only: str) -> None:
    x_pair = ACTIVATIONS["dorefa3"] if only == "x" else None
    w_pair = WEIGHTS["dorefa8"] if only == "w" else None
    check_estimator(layer, x_pair, w_pair)


def test_a_clipped_weight_estimator_masks_the_weight_gradient() -> None:
    layer = LAYERS["conv"]
    clipped = Quantizer("sign", 1, "tensor", "none", pass_range=(-0.25, 0.25))
    pair = clipped, lambda w: passing(w * (w.abs() <= 0.25), sign(w))
    check_estimator(layer, ACTIVATIONS["xnor"], pair)
    check_estimator(LAYERS["linear"], ACTIVATIONS["xnor"], pair)


def test_the_clip_boundaries_pass_the_gradient() -> None:
    x = torch.tensor([[-1.0, 1.0, -1.0000001, 1.0000001, 0.0, -0.0, math.inf]], requires_grad=True)
    y = functional.linear(x, torch.ones(1, 7), None, float_gradient_recipe(ACTIVATIONS["xnor"][0], WEIGHTS["xnor"][0]))
    y.backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1, 1, 0, 0, 1, 1, 0]]
    assert y.item() == 3  # five of +1, zeros among them, and two of -1
