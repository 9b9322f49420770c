"""nn.MultiheadAttention by a recipe: at 16 bits what torch computes, whatever its options; no short cut past the low bits."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import fqt
from fqt.precision import build_policy
from tests.fqt.helpers import fingerprint
from tests.fqt.layers.cases import INT16

ONE_BIT = fqt.load_recipe("fqt_1bit").everywhere()


def attention(**options: object) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(8, 2, **options)  # type: ignore[arg-type]
    for name, parameter in made.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return made


def close(one: Tensor | None, other: Tensor | None) -> None:
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        torch.testing.assert_close(one, other, rtol=5e-3, atol=5e-3 * float(other.detach().abs().max()) + 1e-6)


OPTIONS = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"batch_first": True, "add_zero_attn": True},
    {"kdim": 6, "vdim": 4},
    {"vdim": 4, "bias": False, "batch_first": True},
]
CALLS = {
    "plain": {},
    "no weights": {"need_weights": False},
    "heads": {"average_attn_weights": False},
    "mask": {"attn_mask": torch.triu(torch.ones(5, 5, dtype=torch.bool), 1), "is_causal": True, "need_weights": False},
    "float mask": {"attn_mask": torch.randn(5, 5)},
    "mask by head": {"attn_mask": torch.randn(6, 5, 5)},
    "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])},
    "both": {
        "attn_mask": torch.randn(5, 5),
        "key_padding_mask": torch.zeros(3, 5).masked_fill(torch.arange(5) > 3, -torch.inf),
        "need_weights": False,
    },
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_sixteen_bits_give_what_torch_does(options, call) -> None:
    plain = attention(**options)
    made = fqt.convert(copy.deepcopy(plain), INT16)
    results = []
    for layer in (made, plain):
        x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
        x = (x if layer.batch_first else x.transpose(0, 1)).detach().requires_grad_()
        y, weights = layer(x, x[..., : layer.kdim], x[..., : layer.vdim], **call)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        results.append([y, weights, x.grad, *(parameter.grad for parameter in layer.parameters())])
    for one, other in zip(*results, strict=True):
        close(one, other)


@pytest.mark.parametrize("batch_first", [True, False])
def test_other_keys_and_inputs_without_a_batch(batch_first: bool) -> None:
    plain = attention(batch_first=batch_first)
    made = fqt.convert(copy.deepcopy(plain), INT16)
    query, key, value = torch.randn(4, 4, 8), torch.randn(4, 4, 8), torch.randn(4, 4, 8)
    long = torch.randn(4, 7, 8) if batch_first else torch.randn(7, 4, 8)
    for args in ((query, key, value), (query, long, long), (query[0], key[0], value[0])):
        for one, other in zip(made(*args), plain(*args), strict=True):
            close(one, other)
    with pytest.raises(RuntimeError, match="give that mask too"):
        made(query, query, query, is_causal=True)


def test_the_output_projection_is_a_layer_that_is_called() -> None:
    model = nn.ModuleDict({"a": attention(batch_first=True), "b": nn.Linear(8, 8)})
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    fqt.convert(model, ONE_BIT)
    x = torch.randn(3, 5, 8)
    model["b"](model["a"](x, x, x)[0]).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert [(row.name, row.madds, row.backend) for row in fqt.summary(model).rows] == [
        ("a", 5 * 3 * 64, "cpu"),
        ("a.out_proj", 5 * 64, "cpu"),
        ("b", 5 * 64, "cpu"),
    ]
    assert list(model.state_dict()) == keys
    assert {row.layer for row in fqt.profile(model["a"], (x, x, x), seconds=0.0).rows} == {"", "out_proj"}
    with fqt.observe_gradients(model) as seen:
        model["b"](model["a"](x, x, x)[0]).sum().backward()
    assert {"a", "a.out_proj"} <= set(seen)
    fqt.revert(model)
    assert [type(m) for m in model.modules()] == kinds and list(model.state_dict()) == keys


def test_where_the_attention_stays_float_its_output_projection_does() -> None:
    model = nn.ModuleDict({"a": attention(), "b": nn.Linear(8, 8)})
    fqt.convert(model, ONE_BIT, skip="a")
    assert [name for name, _ in fqt.quantized_layers(model)] == ["b"]
    notes = {row.name: row.note for row in fqt.summary(model).rows}
    assert notes["a.out_proj"] == "kept float with 'a', which multiplies its weight itself"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(("skip", "norm_first"), [*itertools.product([None, "*.self_attn*", "*.linear?"], [True, False])])
def test_no_short_cut_in_evaluation(skip: str | None, norm_first: bool) -> None:
    """Torch's encoder multiplies float weights in one operator where it can, of nested tensors where there is padding."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0, norm_first=norm_first)
    plain = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    model = fqt.convert(copy.deepcopy(plain), ONE_BIT, skip=skip)
    x, padding = torch.randn(3, 5, 16), torch.arange(5) >= torch.tensor([[5], [3], [4]])
    for options in ({}, {"src_key_padding_mask": padding}):
        with_graph = model(x, **options)
        with torch.no_grad():
            without, far = model(x, **options), plain(x, **options)
            frozen = fqt.freeze(model)(x, **options)
        kept = ~padding if options else torch.ones(3, 5, dtype=torch.bool)
        torch.testing.assert_close(without[kept], with_graph[kept], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(frozen[kept], without[kept], rtol=1e-4, atol=1e-4)  # a float attention takes torch's own
        assert (without[kept] - far[kept]).abs().max() > 0.05
    before = fingerprint(plain)
    assert [part[2:] for part in fingerprint(fqt.revert(model)) if len(part) > 4] == [
        part[2:] for part in before if len(part) > 4
    ]
    assert model.use_nested_tensor == plain.use_nested_tensor
    assert model.layers[0].activation_relu_or_gelu == plain.layers[0].activation_relu_or_gelu  # type: ignore[union-attr]


def test_one_forward_finds_the_ends_of_a_transformer(caplog: pytest.LogCaptureFixture) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(nn.Linear(4, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 3))
    fqt.convert(model, "fqt_1bit", example=torch.randn(2, 5, 4))
    assert {row.name for row in fqt.summary(model).rows if row.bits["output"] == 32} == {"0", "2"}
    assert "not called" not in caplog.text and "only" not in caplog.text


def test_copies_compile_and_masks() -> None:
    x = torch.randn(3, 5, 8)
    model = fqt.convert(attention(batch_first=True), ONE_BIT).eval()
    with torch.no_grad():
        expected = model(x, x, x, need_weights=False)[0]
        assert torch.equal(copy.deepcopy(model)(x, x, x, need_weights=False)[0], expected)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, x, x, need_weights=False)[0], expected)
    pruned = attention()
    prune.l1_unstructured(pruned, "in_proj_weight", 0.5)
    with pytest.raises(ValueError, match="is pruned"):
        fqt.convert(pruned, ONE_BIT)


def test_keys_and_values_with_sizes_of_their_own() -> None:
    """Three weights: codes of each by what it multiplies, names and classes back after revert, a refusal to freeze by name."""
    model = nn.ModuleDict({"a": attention(kdim=6, vdim=4)})
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    fqt.convert(model, ONE_BIT)
    layer = model["a"]
    whole = layer.quantized_weight().decode()
    parts = [q.decode() for q in layer.quantized_weights()]
    assert torch.equal(whole.flatten(1), torch.cat([part.flatten(1) for part in parts], 1))
    assert [part.shape for part in parts] == [(8, 1, 8), (8, 1, 6), (8, 1, 4)]
    assert layer.exercise(torch.randn(5, 3, 8)).shape == (5, 3, 8)
    with pytest.raises(ValueError, match=r"layer 'a': it keeps three weights.*skip='a'"):
        fqt.freeze(model)
    assert list(model.state_dict()) == keys
    fqt.revert(model)
    assert [type(m) for m in model.modules()] == kinds and list(model.state_dict()) == keys


def test_the_gradients_of_its_projections_are_seen() -> None:
    """One error of the three together, and the gradient bits that the variance policy chooses by it."""
    model = fqt.convert(nn.ModuleDict({"a": attention(batch_first=True)}), fqt.load_recipe("psq_b4").everywhere())
    x, errors = torch.randn(16, 5, 8), []
    for parts in ((x, x, x), (x, x, 0 * x)):
        with fqt.observe_gradients(model) as seen:
            model["a"](*parts)[0].square().sum().backward()
        errors.append(seen["a"]["grad_weight"])
    assert all(0 < error < 0.05 for error in errors)
    policy = build_policy("variance", model, fraction=1e9, bits=[2, 8], every=1)
    model["a"](x, x, x)[0].square().sum().backward()
    assert {decision.layer for decision in policy.step(1.0)} == {"a", "a.out_proj"}
