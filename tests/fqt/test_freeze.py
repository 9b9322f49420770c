"""freeze: what a frozen model computes is what the model that it was made of does in evaluation, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import fqt
from fqt.fusion.deferred import Deferred
from fqt.recipe import Product, Recipe
from tests.fqt.frozen_cases import (
    FORWARDS,
    RECIPES,
    Convolutions,
    Linears,
    Mixed,
    chain,
    everywhere,
    same,
    trained,
)
from tests.fqt.helpers import fingerprint, fits_convolutions, pickled, torch_saved


def check(model: nn.Module, x: Tensor) -> nn.Module:
    """Freeze, and compare; the frozen model."""
    before = fingerprint(model)
    frozen = fqt.freeze(model)
    assert fingerprint(model) == before
    with torch.no_grad():
        expected = model(x)
        assert same(frozen(x), expected)
        assert same(frozen(x[:1]), model(x[:1])), "a batch of one"
    assert same(frozen(x).detach(), expected), "and where gradients are enabled"
    assert not frozen.training and not any(parameter.requires_grad for parameter in frozen.parameters())
    for name, layer in fqt.quantized_layers(model):
        other, codes = frozen.get_submodule(name), layer.quantized_weight()
        assert isinstance(other, fqt.QuantizedLayer) and other.frozen
        if codes is None:
            assert other.quantized_weight() is None and torch.equal(other.weight, layer.weight)
            continue
        assert layer.weight_name not in other._parameters and bool(other.weight.isnan().all())
        frozen_codes = other.quantized_weight()
        assert frozen_codes is not None and frozen_codes.format == codes.format and frozen_codes.shape == codes.shape
        for one, same_one in zip(codes.tensors(), frozen_codes.tensors(), strict=True):
            assert torch.equal(one, same_one)
    return frozen


# --- the same bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.every(2)
def test_every_kind_of_layer_computes_the_same_bits(name: str) -> None:
    x = torch.randint(11, (3, 5))
    model = trained(fqt.convert(Linears(), everywhere(name), example=x), x)
    frozen = check(model, x)
    assert frozen.flat.packed is frozen.twin.packed, "layers that share a weight share its codes"
    if fits_convolutions(fqt.load_recipe(name)):
        x = torch.randn(3, 4, 9, 8)
        check(trained(fqt.convert(Convolutions(), everywhere(name)), x), x)


@pytest.mark.parametrize("recipe", FORWARDS.values(), ids=FORWARDS)
def test_stages_states_and_products_of_which_a_part_is_float(recipe: Callable[[], Recipe]) -> None:
    x = torch.randn(3, 4, 5, 5)
    model = trained(fqt.convert(Mixed(), recipe()), x)
    frozen = check(model, x)
    kept = {name for name in model.state_dict() if ".quantizers." in name and "output_w" not in name}
    assert {name for name in frozen.state_dict() if ".quantizers." in name} == kept, "what evaluation reads of x"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["fqt_1bit", "int8", "dorefa_w1a2g6"])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, 9, 8, dtype=dtype)
    check(trained(fqt.convert(Convolutions().to(dtype), everywhere(name)), x), x)


@pytest.mark.parametrize("name", ["fqt_1bit", "bitnet"])
def test_under_autocast(name: str) -> None:
    x = torch.randint(11, (3, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert check(trained(fqt.convert(Linears(), everywhere(name), example=x), x), x)(x).dtype == torch.bfloat16


NORMS: dict[str, Callable[[], nn.Module]] = {
    "mask": lambda: pruned(nn.Conv2d(3, 4, 3)),
    "weight_norm": lambda: weight_norm(nn.Conv2d(3, 4, 3)),
    "spectral_norm": lambda: spectral_norm(nn.Conv2d(3, 4, 3)),
    "parametrization": lambda: parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
    "two": lambda: parametrizations.weight_norm(parametrizations.orthogonal(nn.Conv2d(3, 4, 3)), "bias", 0),
}


def pruned(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", 0.5)
    return prune.l1_unstructured(layer, "bias", 0.5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_masks_and_norms_are_part_of_the_codes(make: Callable[[], nn.Module]) -> None:
    x = torch.randn(2, 3, 5, 5)
    model = trained(fqt.convert(nn.Sequential(make()), everywhere("int8")), x)
    assert sorted(check(model, x).state_dict()) == ["0.bias", "0.packed.0.codes", "0.packed.0.scale"]
    model.train()
    model(x).sum().backward()  # the model's own parametrization is as it was


# --- between 1-bit layers -------------------------------------------------------------------------------------------------


def test_no_float_activation_is_written_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    x, written = torch.randn(2, 3, 12, 12), []
    frozen = check(trained(fqt.convert(chain(), everywhere("fqt_1bit")), x), x)
    value = Deferred.value
    monkeypatch.setattr(Deferred, "value", lambda deferred: written.append(deferred.shape) or value(deferred))
    with torch.no_grad():
        frozen(x)
    assert written == [(2, 9, 1, 1)], "that of the last one, which is flattened"


def test_zeros_of_both_signs_are_plus_one() -> None:
    layer = fqt.convert(nn.Linear(4, 2, bias=False), everywhere("xnor"))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, -0.0, 1.0, -1.0], [-0.0, 0.0, 2.0, 2.0]]))
    codes = fqt.freeze(layer).quantized_weight()
    assert codes.decode().squeeze(1).tolist() == [[0.5, 0.5, 0.5, -0.5], [1.0, 1.0, 1.0, 1.0]]


# --- a module like any other ----------------------------------------------------------------------------------------------


def frozen_chain() -> tuple[nn.Module, Tensor, Tensor]:
    """A frozen model, an input, and its output."""
    x = torch.randn(4, 3, 12, 12)
    frozen = fqt.freeze(trained(fqt.convert(chain(), "fqt_1bit"), x))
    return frozen, x, frozen(x)


def _state(model: nn.Module) -> nn.Module:
    other = fqt.freeze(fqt.convert(chain(), "fqt_1bit"))
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, torch_saved, _state])
def test_copies(copied: Callable[[nn.Module], nn.Module]) -> None:
    frozen, x, y = frozen_chain()
    other = copied(frozen)
    assert same(other(x), y)
    layer, twin = frozen[4], other[4]
    assert layer.packed[0].codes.data_ptr() != twin.packed[0].codes.data_ptr()
    assert twin.weight.shape == layer.weight.shape and twin.weight.untyped_storage().nbytes() == 4, "one NaN, not a weight"


def test_to_moves_everything_and_rounds_no_scale() -> None:
    frozen, x, _ = frozen_chain()
    scale = frozen[4].packed[0].scale.clone()
    frozen.to(torch.bfloat16)
    assert frozen(x.bfloat16()).dtype == frozen[4].weight.dtype == frozen[4].bias.dtype == torch.bfloat16
    assert torch.equal(frozen[4].packed[0].scale, scale) and frozen[4].weight.untyped_storage().nbytes() == 2
    assert all(t.is_meta for t in (*frozen.to("meta").buffers(), frozen[4].weight))


def test_threads_share_a_model() -> None:
    frozen, x, y = frozen_chain()
    with ThreadPoolExecutor(4) as pool:
        assert all(same(other, y) for other in pool.map(lambda _: frozen(x), range(12)))


def test_compile_and_export() -> None:
    x = torch.randn(4, 3, 6, 6)
    model = trained(fqt.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5)), everywhere("fqt_1bit")), x)
    frozen = fqt.freeze(model)
    torch._dynamo.reset()
    with torch.no_grad():
        assert same(torch.compile(frozen, fullgraph=True, backend="eager")(x), model(x))
        program = torch.export.export(frozen, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
        assert same(program.module()(x[:3]), model(x[:3]))
    assert {"0.packed.0.codes", "2.packed.0.codes"} < program.state_dict.keys()


def test_gradients_pass_to_the_input_in_float() -> None:
    saved = fqt.load_recipe("int8").output
    model = fqt.convert(
        nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), Recipe("forward", saved, *[Product("float", "saved")] * 2)
    )
    x, g = torch.randn(4, 6, requires_grad=True), torch.randn(4, 3)
    expected = torch.autograd.grad(model.eval()(x), x, g)[0]
    assert same(torch.autograd.grad(fqt.freeze(model)(x), x, g)[0], expected)
    rotated = fqt.freeze(fqt.convert(nn.Linear(6, 5), FORWARDS["hadamard"]()))
    rotated(x.detach())
    with pytest.raises(
        RuntimeError, match=r"no gradient passes a frozen layer whose weight was packed after hadamard\(size=4\)"
    ):
        rotated(x)


# --- what is left away, kept and refused ----------------------------------------------------------------------------------


def test_a_layer_that_was_not_called_stays_float(caplog: pytest.LogCaptureFixture) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.called = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.called(x @ self.read.weight)

    model, x = fqt.convert(Reads(), everywhere("int8")), torch.randn(2, 4)
    assert bool(fqt.freeze(model)(x).isnan().all()), "nobody has seen yet that `read` is not called"
    model(x)
    frozen = fqt.freeze(model)
    assert type(frozen.read) is nn.Linear and same(frozen(x).detach(), model.eval()(x).detach())
    assert "not called, so kept float: read" in caplog.text
    assert "not called before it was frozen" in fqt.summary(frozen).rows[0].note


def test_what_training_put_there_is_gone() -> None:
    x = torch.randn(4, 3, 12, 12)
    model = fqt.convert(chain(), "fqt_1bit")
    policy = fqt.build_policy("variance", model)
    model(x).sum().backward()
    policy.step(1.0)
    frozen = fqt.freeze(model)
    assert all(parameter.grad is None for parameter in frozen.parameters())
    assert not any(layer.changing or layer.watcher for _, layer in fqt.quantized_layers(frozen))
    assert not any(module._forward_hooks for module in frozen.modules())
    assert fqt.summary(frozen).rows[1].madds == fqt.summary(model).rows[1].madds, "what is known of it"


def test_a_summary_says_frozen() -> None:
    frozen, *_ = frozen_chain()
    _, row, *_ = fqt.summary(frozen).rows
    assert row.note == "frozen" and row.grad_input == row.grad_weight == "" and row.output == "sign/tensor x sign/channel"
    assert row.packed_bytes == 12 * 9 * 2 + 12 * 4 and row.parameters == 12 * 12 * 9 + 12
    assert "recipe=fqt_1bit, frozen" in str(frozen)


@pytest.mark.parametrize(
    "refused",
    [
        lambda model: fqt.convert(model, "int8"),
        fqt.revert,
        lambda model: fqt.modelled_speedup(model, torch.randn(1, 3, 12, 12)),
        lambda model: fqt.profile(model, torch.randn(1, 3, 12, 12)),
        lambda model: fqt.diff(model, torch.randn(1, 3, 12, 12)),
        lambda model: fqt.build_policy("static", model),
    ],
)
def test_what_trains_refuses_a_frozen_model(refused: Callable[[nn.Module], object]) -> None:
    frozen, *_ = frozen_chain()
    with pytest.raises(ValueError, match=r"this Sequential is frozen \(layer '4'\): .*fqt.load\(..., trainable=True\)"):
        refused(frozen)


def test_a_frozen_layer_neither_trains_nor_changes() -> None:
    frozen, x, y = frozen_chain()
    with pytest.raises(RuntimeError, match=r"this QuantConv2d is frozen: it has no float weight to train.*\.eval\(\)"):
        frozen.train()
    assert same(frozen.eval()(x), y)
    with pytest.raises(ValueError, match="its codes are of recipe 'fqt_1bit' for good"):
        frozen[4].recipe = fqt.load_recipe("int8")


def test_what_cannot_be_frozen_is_named() -> None:
    with pytest.raises(ValueError, match="nothing in this Linear is converted: fqt.convert it first"):
        fqt.freeze(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="this Sequential is frozen already"):
        fqt.freeze(frozen_chain()[0])
    layer = fqt.convert(nn.Linear(3, 2), everywhere("int8"))
    layer.other = layer._parameters.pop("weight")
    layer.weight = 2 * layer.other
    with pytest.raises(ValueError, match="layer '': its weight is no parameter but computed before every forward: make it one"):
        fqt.freeze(layer)
