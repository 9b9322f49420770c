"""Whoever holds a deferred activation has a tensor: its value, its place in the graph, or an error; never a NaN."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fqt
from fqt.fusion.deferred import Deferred


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12),
        nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), nn.MaxPool2d(2), nn.Conv2d(12, 6, 3), nn.BatchNorm2d(6),
        nn.Flatten(), nn.Linear(24, 20), nn.BatchNorm1d(20), nn.Linear(20, 4),
    )  # fmt: skip
    return fqt.convert(model, "xnor")  # type: ignore[return-value]


DEFERRED = (1, 3, 4, 5, 6, 7, 8, 9, 12)
"""Modules of `network` whose output is deferred."""


def images() -> Tensor:
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def activation() -> Deferred:
    y = network()[:5](images())
    assert isinstance(y, Deferred)
    return y


# --- the graph ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", DEFERRED)
def test_the_gradient_of_an_activation_that_a_hook_kept(where: int) -> None:
    """As Grad-CAM asks for it, and the same bits as where the hook hands on the float tensor."""
    found = []
    for hand_on in (lambda y: y, lambda y: y * 1):
        model, kept = network(), []

        def keep(module: nn.Module, args: object, y: Tensor, hand_on=hand_on, kept=kept) -> Tensor:
            kept.append(hand_on(y))
            return kept[0]

        model[where].register_forward_hook(keep)
        score = model(images()).square().sum()
        assert isinstance(kept[0], Deferred) == (len(found) == 0)
        (grad,) = torch.autograd.grad(score, kept[0], retain_graph=True)
        assert grad.shape == kept[0].shape and bool(grad.any())
        kept[0].retain_grad()
        tapped = []
        kept[0].register_hook(tapped.append)
        score.backward(inputs=[kept[0], model[0].weight])
        assert torch.equal(kept[0].grad, grad) and torch.equal(tapped[0], grad)
        found.append([grad, model[0].weight.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_one_that_has_two_readers_gathers_both_gradients() -> None:
    model = network()
    y = model[:5](images())
    signs, floats = model[5](y).square().sum(), y.square().sum()
    grads = [torch.autograd.grad(loss, y, retain_graph=True)[0] for loss in (signs, floats, signs + floats)]
    torch.testing.assert_close(grads[0] + grads[1], grads[2])


def test_a_gradient_that_pooling_passes_over_is_refused_not_zero() -> None:
    model = network()
    y = model[:7](images())
    model[7](y)
    asked: list[Callable[[], object]] = [
        lambda: torch.autograd.grad(y.sum(), y),
        lambda: y.register_hook(print),
        y.retain_grad,
        lambda: y.grad,
    ]
    for ask in asked:
        with pytest.raises(RuntimeError, match=r"max-pooling behind it.*Register the hook.*before its forward.*fuse=False"):
            ask()


@pytest.mark.parametrize("keep", [lambda y: y.retain_grad(), lambda y: y.register_hook(lambda g: None)])
def test_pooling_goes_through_one_whose_gradient_was_asked_for(keep: Callable[[Tensor], object]) -> None:
    model = network()
    y = model[:7](images())
    keep(y)
    (grad,) = torch.autograd.grad(model[7:](y).square().sum(), y)
    assert bool(grad.any())


@pytest.mark.parametrize("where", DEFERRED)
def test_backward_hooks_see_gradients(where: int) -> None:
    expected, seen = network(), []
    expected(images()).sum().backward()
    model = network()
    model[where].register_full_backward_hook(lambda module, of_input, of_output: seen.extend([*of_input, *of_output]))
    model(images()).sum().backward()
    assert len(seen) == 2 and not any(bool(g.isnan().any()) for g in seen)
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_where_no_graph_is_kept_one_may_begin_here() -> None:
    model = network().eval()
    with torch.no_grad():
        y = model[:5](images())
    assert not y.requires_grad
    y.requires_grad_()
    model[5:](y).square().sum().backward()
    assert y.grad is not None and bool(y.grad.any())


# --- the value ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "write",
    [
        lambda y: y.__setitem__((slice(None), 0), 7.0),
        lambda y: y.view(-1).mul_(2),
        lambda y: y.detach().mul_(2),
        lambda y: y[0].zero_(),
        lambda y: torch.relu_(y.detach()),
        lambda y: setattr(y, "data", y.data - 0.5),
        lambda y: y.add_(1),
    ],
    ids=["item", "view", "detached", "row", "relu_", "data", "add_"],
)  # fmt: skip
def test_what_is_written_to_it_or_to_a_view_of_it_is_read_by_all(write: Callable[[Tensor], object]) -> None:
    y, plain = activation(), activation() * 1
    write(y)
    write(plain)
    assert torch.equal(y * 1, plain)
    model = network()
    assert torch.equal(model[5](y) * 1, model[5](plain) * 1)


def test_the_value_is_that_of_the_forward_whatever_an_optimizer_does_since() -> None:
    model, expected = network(), network()(images()).detach() * 1
    for length in (4, 5, len(model)):
        model = network()
        y, now = model[:length](images()), network()[:length](images()).detach() * 1
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        assert torch.equal(y * 1, now)
    assert torch.equal(now, expected)


def test_readers_past_torch_functions() -> None:
    y, plain = activation(), activation() * 1
    with torch._C.DisableTorchFunctionSubclass():
        total = y.sum()
        with pytest.raises(RuntimeError, match=r"not computed yet, past torch functions: clone it first"):
            y.add_(1)
    torch.testing.assert_close(total, plain.sum())
    assert torch.autograd.grad(total, y)[0].unique().tolist() == [1]


class Doubled(torch.autograd.Function):
    """Somebody's function, which keeps its input."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]


def test_functions_of_others() -> None:
    y = activation()
    z = Doubled.apply(y)
    torch.testing.assert_close(torch.autograd.grad(z.sum(), y)[0], 2 * (y * 1).detach())


def test_memory_that_is_pointed_at_stays() -> None:
    y, plain = activation(), activation() * 1
    assert y.data_ptr() == y.data_ptr() == y.detach().numpy().ctypes.data
    assert np.array_equal(np.from_dlpack(y.detach()), plain.detach().numpy())
    assert y.untyped_storage().nbytes() == 4 * y.numel()
    assert torch.equal(copy.deepcopy(y.detach()), plain)
    assert torch.equal(y.data, plain)


def test_a_compiled_part_behind_it() -> None:
    model, plain = network().eval(), network().eval()
    tail = torch.compile(nn.Sequential(nn.Conv2d(12, 2, 1), nn.Flatten()), backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(tail(model[:5](images())), tail(plain[:5](images()) * 1))


def test_a_step_computes_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers and BatchNorms in a row ask for nothing; the flatten in the midst does, and is left out here."""
    model = network()[:10]

    def refuse(self: Deferred) -> Tensor:
        raise AssertionError("somebody asked for floats")

    monkeypatch.setattr(Deferred, "value", refuse)
    y = model(images())
    monkeypatch.undo()
    y.sum().backward()
