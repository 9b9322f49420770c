"""The random Hadamard transform: its algebra, its use in all three products, and what it is for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fqt
from fqt.quantizers import build
from fqt.quantizers.hadamard import Hadamard, walsh

SIZES = (16, 32, 64, 128)


@pytest.mark.parametrize("size", [2, 4, *SIZES])
def test_the_matrix_is_hadamards(size):
    h = walsh(torch.eye(size))
    assert torch.equal(h.abs(), torch.ones(size, size)) and torch.equal(h @ h.T, size * torch.eye(size))


@pytest.mark.parametrize("terms", [1, 5, 16, 100, 128, 250])
@pytest.mark.parametrize("size", SIZES)
def test_the_inverse_is_exact_and_products_are_kept(size, terms):
    transform, key = Hadamard(size), torch.tensor(-5)
    a, b = torch.randint(-50, 50, (3, 4, terms)).float(), torch.randint(-50, 50, (6, terms)).float()
    for side in (0, 1):
        assert torch.equal(transform.inverse(transform.apply(a, side, key, 14), side, key, 14), a)
    # integers: no addition rounds
    assert torch.equal(transform.apply(a, 0, key, 14) @ transform.apply(b, 1, key, 14).T, a @ b.T)
    assert not torch.equal(transform.apply(a, 0, key, 14), transform.apply(a, 0, key + 1, 14)) or terms == 1


def recipe(transform: object, bits: int = 8) -> fqt.Recipe:
    """All three products in `bits`, each with codes of its own."""
    left, right = (build("uniform", letter, bits=bits, granularity="tensor", stochastic=letter == "g") for letter in "gw")
    x = build("uniform", "x", bits=bits)
    products = {"output": (x, right), "grad_input": (left, right), "grad_weight": (left, x)}
    return fqt.Recipe("rotated", **{name: fqt.Product(*pair, transform=transform) for name, pair in products.items()})


LAYERS = {
    "linear": (lambda: nn.Linear(40, 24), (10, 40)),
    "tokens": (lambda: nn.Linear(40, 24), (4, 5, 40)),
    "conv": (lambda: nn.Conv2d(24, 16, 3, padding=1, stride=2), (6, 24, 7, 7)),
    "groups": (lambda: nn.Conv2d(24, 16, 3, groups=2), (6, 24, 7, 7)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", ["reference", None])
def test_all_three_products_stay_what_they_are(name, backend):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    plain = make()
    layer = fqt.convert(make(), recipe({"hadamard": {"size": 16}}, bits=16 if backend == "reference" else 8), backend=backend)
    layer.load_state_dict(plain.state_dict())
    one, other = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    y, expected = layer(one), plain(other)
    g = torch.randn_like(y)
    y.backward(g)
    expected.backward(g)
    tolerance = 2e-3 if backend == "reference" else 0.06
    pairs = [(y, expected), (one.grad, other.grad), (layer.weight.grad, plain.weight.grad)]
    for actual, wanted in pairs:
        assert float((actual - wanted).detach().norm() / wanted.detach().norm()) < tolerance


def test_a_random_call_repeats_with_its_seed_and_an_evaluation_draws_nothing():
    layer = fqt.convert(nn.Linear(40, 24), recipe("hadamard"))
    x = torch.randn(10, 40)
    torch.manual_seed(3)
    one, another = layer(x), layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), one) and not torch.equal(one, another)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    assert torch.equal(compiled(x), one)
    layer.eval()
    with torch.no_grad():
        before = torch.get_rng_state()
        assert torch.equal(layer(x), layer(x)) and torch.equal(torch.get_rng_state(), before)
        assert float((layer(x) - one).norm() / one.norm()) < 0.05


def test_heavy_tails_lose_most_of_their_variance():
    """Gradients of which a few are very large, 4 bits: the error of grad_weight, mean of 20 draws, and no bias."""
    torch.manual_seed(0)
    x = torch.randn(256, 32)
    g = torch.randn(256, 24) * torch.where(torch.rand(256, 24) < 0.01, 60.0, 1.0)
    exact, errors, bias = g.T @ x, {}, {}
    for name, transform in (("plain", None), ("rotated", {"hadamard": {"size": 128}})):
        quantizer = build("uniform", "g", bits=4, granularity="tensor", stochastic=True)
        x8 = build("uniform", "x", bits=8)
        floats = fqt.Product("float", "float")
        chosen = fqt.Recipe(name, floats, floats, fqt.Product(quantizer, x8, transform=transform))
        layer = fqt.convert(nn.Linear(32, 24, bias=False), chosen)
        draws = []
        for _ in range(20):
            layer.zero_grad()
            layer(x).backward(g)
            draws.append(layer.weight.grad.clone())
        errors[name] = torch.stack([(d - exact).square().sum() / exact.square().sum() for d in draws]).mean().item()
        bias[name] = ((torch.stack(draws).mean(0) - exact).square().sum() / exact.square().sum()).item()
    assert errors["rotated"] < errors["plain"] / 3
    assert bias["rotated"] < 3 * errors["rotated"] / 20 + 1e-3


def test_what_cannot_be_is_refused_by_name():
    for size in (0, 3, 2048, "16"):
        with pytest.raises(ValueError, match="is not a power of two from 2 to 1024"):
            Hadamard(size)  # type: ignore[arg-type]
    g = build("uniform", "g", granularity="tensor")
    with pytest.raises(ValueError, match=r"grad_input.w cannot be 'saved', the codes .* were made without hadamard"):
        fqt.Recipe(
            "bad",
            fqt.Product(build("uniform", "x"), build("uniform", "w")),
            fqt.Product(g, "saved", transform="hadamard"),
            fqt.Product("float", "float"),
        )
    with pytest.raises(ValueError, match=r"transform hadamard\(size=32\) is for both operands of a product"):
        fqt.Quantizer("int", 8, transform="hadamard")
