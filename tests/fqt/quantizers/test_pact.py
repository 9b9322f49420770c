"""PACT and PAMS against their formulas, element by element."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import fqt
from fqt.quantizers import build


def layer(name: str, **options) -> nn.Module:
    saved = fqt.Product("float", "saved")
    recipe = fqt.Recipe(name, fqt.Product(build(name, "x", **options), "float"), fqt.Product("float", "float"), saved)
    return fqt.convert(nn.Linear(20, 6, bias=False), recipe)


@pytest.mark.parametrize("name", ["pact", "pams"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_codes_and_gradients_are_the_papers(name, bits, decay):
    alpha, signed = 1.5, name == "pams"
    made = layer(name, bits=bits, alpha=alpha, decay=decay)
    x = (2 * torch.randn(30, 20)).requires_grad_()
    g = torch.randn(30, 6)
    made(x).backward(g)
    high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    v = x.detach().numpy()
    inverse = np.float32(high) / np.float32(alpha)
    codes = np.rint(np.clip(v * inverse, -high if signed else 0, high))
    values = codes * (np.float32(alpha) / np.float32(high))
    np.testing.assert_allclose(made(x).detach().numpy(), values @ made.weight.detach().numpy().T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(made.weight.grad.numpy(), g.numpy().T @ values, rtol=1e-5, atol=1e-4)
    grad = g.numpy() @ made.weight.detach().numpy()
    passes, beyond = (np.abs(v) < alpha, np.sign(v) * (np.abs(v) >= alpha)) if signed else ((v >= 0) & (v < alpha), v >= alpha)
    np.testing.assert_allclose(x.grad.numpy(), grad * passes, rtol=1e-5, atol=1e-6)
    learned = made.quantizers.output_x.pact.alpha
    assert float(learned.grad) == pytest.approx(float((grad * beyond).sum()) + decay * alpha, rel=1e-4, abs=1e-4)


def test_alpha_is_a_parameter_that_training_moves():
    made = layer("pact", bits=4, alpha=8.0, decay=0.1)
    x, target = torch.rand(64, 20), torch.randn(64, 6)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.05)
    losses = []
    for _ in range(80):
        loss = (made(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and made.quantizers.output_x.pact.alpha.item() < 8.0
    assert "quantizers.output_x.pact.alpha" in made.state_dict()


def test_what_makes_no_sense_is_refused_and_what_is_not_finite_shows():
    for options, words in (({"alpha": 0.0}, "alpha 0.0 is not a positive"), ({"decay": -1.0}, "decay -1.0 is not 0 or")):
        with pytest.raises(ValueError, match=words):
            build("pact", "x", **options)
    with pytest.raises(ValueError, match="quantizer 'pact' is for x"):
        build("pact", "w")
    made = layer("pams", bits=4)
    assert made(torch.full((2, 20), math.inf)).isfinite().all()
    assert made(torch.full((2, 20), math.nan)).isnan().all()
