"""Layers whose forward was set on the instance are converted through and through, or refused by name."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

import fqt
from tests.fqt.helpers import fingerprint

ONE_BIT = fqt.load_recipe("fqt_1bit").everywhere()


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def hook_like_accelerate(layer: nn.Module) -> list[str]:
    """What `accelerate.hooks.add_hook_to_module` does."""
    calls: list[str] = []

    def new_forward(module: nn.Module, *args: torch.Tensor) -> torch.Tensor:
        calls.append("hook")
        return module._old_forward(*args)  # type: ignore[operator]

    layer._old_forward = layer.forward  # type: ignore[assignment]
    layer.forward = functools.update_wrapper(functools.partial(new_forward, layer), layer._old_forward)  # type: ignore
    return calls


def test_a_hook_that_keeps_the_old_forward_on_the_layer_reaches_the_converted_one() -> None:
    patched, plain = model(), model()
    plain.load_state_dict(patched.state_dict())
    calls, x = hook_like_accelerate(patched[0]), torch.randn(4, 8)
    expected = plain(x)
    fqt.convert(patched, ONE_BIT)
    fqt.convert(plain, ONE_BIT)
    assert torch.equal(patched(x), plain(x)) and calls == ["hook"]
    again = copy.deepcopy(patched)
    with torch.no_grad():
        again[0].weight.neg_()
        assert not torch.equal(again[0](x), patched[0](x)), "a copy goes through its own layer"
    fqt.revert(patched)
    assert torch.equal(patched(x), expected) and len(calls) == 4, calls


def test_one_hooked_after_conversion_can_be_reverted() -> None:
    patched, x = model(), torch.randn(4, 8)
    expected = patched(x)
    fqt.convert(patched, ONE_BIT)
    calls = hook_like_accelerate(patched[2])
    fqt.revert(patched)
    assert torch.equal(patched(x), expected) and calls == ["hook"]


def test_what_a_removed_hook_leaves_behind_is_no_obstacle() -> None:
    """accelerate puts the bound method back as an attribute of the instance."""
    patched, x = model(), torch.randn(4, 8)
    expected = patched(x)
    patched[0].forward = patched[0].forward  # type: ignore[method-assign]
    fqt.convert(patched, ONE_BIT)
    assert not torch.equal(patched[0](x), nn.functional.linear(x, patched[0].weight, patched[0].bias))
    assert torch.equal(fqt.revert(patched)(x), expected)


def test_a_forward_that_hides_what_it_calls_is_refused_and_named() -> None:
    patched = model()
    before_patch = patched[2].forward

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * before_patch(x)

    patched[2].forward = doubled  # type: ignore[method-assign]
    before = fingerprint(patched)
    with pytest.raises(ValueError, match=r"layer '2' has a forward of its own, .*doubled.*convert first.*skip='2'"):
        fqt.convert(patched, ONE_BIT)
    assert fingerprint(patched) == before
    assert [name for name, _ in fqt.quantized_layers(fqt.convert(patched, ONE_BIT, skip="2"))] == ["0"]


def test_one_hidden_after_conversion_is_refused_by_revert() -> None:
    patched = fqt.convert(model(), ONE_BIT)
    old = patched[0].forward
    patched[0].forward = lambda x: old(x)
    with pytest.raises(ValueError, match=r"layer '0' has a forward of its own, .*lambda.*take it off first"):
        fqt.revert(patched)
    del patched[0].forward
    fqt.revert(patched)


def test_accelerate_itself() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    patched, x = model(), torch.randn(4, 8)
    plain = fqt.convert(copy.deepcopy(patched), ONE_BIT)
    hooks.add_hook_to_module(patched[0], hooks.ModelHook())
    fqt.convert(patched, ONE_BIT)
    assert torch.equal(patched(x), plain(x))
    hooks.remove_hook_from_module(patched[0])
    assert torch.equal(patched(x), plain(x))
    fqt.revert(patched)
    assert type(patched[0]) is nn.Linear
