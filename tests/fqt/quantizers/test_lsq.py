"""LSQ against its formulas, element by element, and its step as a parameter of a real model."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import fqt
from fqt.precision import at_word_length
from fqt.quantizers import build
from fqt.quantizers.lsq import LSQ

BITS = (2, 3, 4, 8)


def recipe(bits: int = 4, unsigned: bool = False) -> fqt.Recipe:
    lsq = [build("lsq", letter, bits=bits, **({"unsigned": unsigned} if letter == "x" else {})) for letter in "xw"]
    grad = fqt.Product("float", "saved")
    return fqt.Recipe("lsq", fqt.Product(*lsq), grad, grad)


def formulas(v: np.ndarray, s: float, low: int, high: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, d value / d s and d value / d v, equations 1, 3 and 5."""
    codes, of_step, of_value = np.zeros_like(v), np.zeros_like(v), np.zeros_like(v)
    for i in np.ndindex(v.shape):
        r = v[i] * np.float32(1 / np.float32(s))
        q = v[i] / np.float32(s)
        codes[i] = np.rint(min(max(r, low), high))
        of_step[i] = low if q < low else high if q > high else np.rint(q) - q
        of_value[i] = low <= q <= high
    return codes, of_step, of_value


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
def test_codes_and_gradients_are_the_papers(bits, unsigned):
    torch.manual_seed(bits)
    layer = fqt.convert(nn.Linear(24, 10, bias=False), recipe(bits, unsigned))
    x = torch.randn(16, 24, requires_grad=True)
    layer(x)  # the first batch sets the step
    step_x, step_w = (layer.quantizers[name].lsq.step.detach() for name in ("output_x", "output_w"))
    high = 2**bits - 1 if unsigned else 2 ** (bits - 1) - 1
    low = 0 if unsigned else -high
    assert float(step_x) == pytest.approx(2 * float(x.detach().abs().mean()) / math.sqrt(high), rel=1e-6)
    half = 2 ** (bits - 1) - 1
    assert float(step_w) == pytest.approx(2 * float(layer.weight.detach().abs().mean()) / math.sqrt(half), rel=1e-6)

    codes_x, of_step_x, of_x = formulas(x.detach().numpy(), float(step_x), low, high)
    codes_w, of_step_w, of_w = formulas(layer.weight.detach().numpy(), float(step_w), -half, half)
    g = torch.randn(16, 10)
    y = layer(x)
    y.backward(g)
    values_x, values_w = codes_x * np.float32(float(step_x)), codes_w * np.float32(float(step_w))
    np.testing.assert_allclose(y.detach().numpy(), values_x @ values_w.T, rtol=1e-5, atol=1e-5)
    grad_x, grad_w = g.numpy() @ values_w, g.numpy().T @ values_x
    np.testing.assert_allclose(x.grad.numpy(), grad_x * of_x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer.weight.grad.numpy(), grad_w * of_w, rtol=1e-4, atol=1e-4)
    expected = (grad_x * of_step_x).sum() / math.sqrt(x.numel() * high)
    assert float(layer.quantizers.output_x.lsq.step.grad) == pytest.approx(float(expected), rel=1e-3, abs=1e-5)
    expected = (grad_w * of_step_w).sum() / math.sqrt(layer.weight.numel() * half)
    assert float(layer.quantizers.output_w.lsq.step.grad) == pytest.approx(float(expected), rel=1e-3, abs=1e-5)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))


def step(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    net.zero_grad()
    net(x).square().mean().backward()
    return [parameter.grad.clone() for parameter in net.parameters()]


def test_the_step_lives_in_the_layer_and_in_its_state_dict():
    net = fqt.convert(model(), recipe())
    names = [name for name, _ in net.named_parameters() if "quantizers" in name]
    assert names == [f"{layer}.quantizers.output_{letter}.lsq.step" for layer in "03" for letter in "xw"]
    x = torch.randn(4, 3, 6, 6)
    step(net, x)
    again = fqt.convert(model(), recipe())
    again.load_state_dict(net.state_dict())
    for one, other in zip(step(net, 9 * x), step(again, 9 * x), strict=True):  # the loaded step is not started anew
        assert torch.equal(one, other)
    for same in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(same(x), net(x))


def test_training_lowers_the_loss_and_moves_the_step():
    net, x, target = fqt.convert(model(), recipe()), torch.randn(32, 3, 6, 6), torch.randn(32, 5)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses, first = [], None
    for _ in range(60):
        loss = (net(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        first = first if first is not None else net[0].quantizers.output_w.lsq.step.item()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0] and net[0].quantizers.output_w.lsq.step.item() != first


def test_compiled_checkpointed_and_cast_it_is_the_same():
    net, x = fqt.convert(model(), recipe()), torch.randn(4, 3, 6, 6)
    step(net, x)
    expected = step(net, x)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for one, other in zip(step(compiled, x), expected, strict=True):
        torch.testing.assert_close(one, other)
    net.zero_grad()
    torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False).square().mean().backward()
    for parameter, other in zip(net.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, other)
    assert net.double()[0].quantizers.output_w.lsq.step.dtype == torch.float64
    assert net(x.double()).dtype == torch.float64


def test_revert_drops_the_steps_and_says_so(caplog):
    net = fqt.convert(model(), recipe())
    with caplog.at_level("INFO", "fqt"):
        fqt.revert(net)
    assert not any("quantizers" in name for name in net.state_dict())
    assert "dropped with the quantizers: 0.quantizers.output_x.lsq.step" in caplog.text


def test_nan_is_not_hidden_and_wrong_options_are_named():
    layer = fqt.convert(nn.Linear(8, 3), recipe())
    x = torch.randn(4, 8)
    x[1, 2] = math.nan
    assert layer(x).isnan().all()
    with pytest.raises(ValueError, match="counts codes of int4, not of int8: make lsq anew at these bits"):
        at_word_length(recipe(4), 8)
    with pytest.raises(ValueError, match="bits 9 is not an integer from 2 to 8"):
        build("lsq", "w", bits=9)
    gradient = fqt.Quantizer("int", 4, calibrate=LSQ("int", 4))
    with pytest.raises(ValueError, match=r"lsq is not for g, only for x and w"):
        fqt.Recipe("bad", fqt.Product("float", "float"), fqt.Product(gradient, "float"), fqt.Product("float", "float"))
