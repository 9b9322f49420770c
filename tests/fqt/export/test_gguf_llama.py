"""A Llama in GGUF: llama.cpp's graph, written down in torch, computes from the file what transformers does from the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from torch import nn

import fqt
from benchmarks.step_models import recipe_of
from benchmarks.tinyllama import FloatLlama, tokenizer_of
from fqt.export.gguf_llama import ARCHITECTURES

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'fqt[export]'")
TEXT = "To be, or not to be, that is the question: 42 times over.\n" * 20
ROPE = {"rope_type": "llama3", "rope_theta": 5e3, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}  # fmt: skip


def made(name: str = "Llama", recipe: str = "bitnet", **options: object) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, **{"sliding_window": None} if name == "Mistral" else {}, **options,
    )  # fmt: skip
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # so that attention has something to choose between
    return fqt.convert(model, recipe_of(recipe), skip="lm_head").eval()


def as_in_the_file(model: nn.Module) -> nn.Module:
    """The plain model with what a file holds of its weights: codes with scales, and matrices, in half precision."""
    weights = {
        name: replace(q, scale=q.scale.half().float()).decode()[:, 0]
        for name, layer in fqt.quantized_layers(model)
        if (q := layer.quantized_weight()) is not None
    }
    plain = fqt.revert(model)
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.copy_(weights.get(name, module.weight.half().float()))
    return plain


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 32}),
        ("Llama", {"rope_parameters": ROPE}),
        ("Mistral", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    ],
)
def test_llama_cpps_graph_computes_the_same_from_the_file(name, options, tmp_path):
    model = made(name, **options)
    fqt.export(model, tmp_path / "m.gguf")
    tokens = torch.randint(300, (40,))
    with torch.no_grad():
        expected = as_in_the_file(model)(input_ids=tokens.unsqueeze(0)).logits[0]
        found = FloatLlama(tmp_path / "m.gguf")(tokens)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    assert float(expected.std()) > 0.5


@pytest.mark.parametrize("name", ["Qwen2", "Qwen3"])
def test_qwens_rows_keep_their_order(name, tmp_path):
    model = made(name)
    fqt.export(model, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert reader.fields["general.architecture"].contents() == name.lower()
    assert len(found) == len(model.state_dict())
    layer = model.model.layers[1].self_attn.q_proj
    q = layer.quantized_weight()
    values = gguf.quants.dequantize(found["blk.1.attn_q.weight"].data, found["blk.1.attn_q.weight"].tensor_type)
    assert torch.equal(torch.from_numpy(values), replace(q, scale=q.scale.half().float()).decode()[:, 0])


def metadata(path: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_metadata_and_a_byte_level_tokenizer(tmp_path):
    tokenizer = tokenizer_of(TEXT, 290)
    result = fqt.export(made(), tmp_path / "m.gguf", tokenizer=tokenizer)
    said = metadata(tmp_path / "m.gguf")
    expected = {"context_length": 64, "embedding_length": 64, "block_count": 2, "feed_forward_length": 96, "vocab_size": 300,
                "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16, "rope.dimension_count": 16,
                "rope.freq_base": 10000.0}  # fmt: skip
    assert {name: said[f"llama.{name}"] for name in expected} == expected
    assert said["tokenizer.ggml.model"] == "gpt2" and said["tokenizer.ggml.pre"] == "gpt-2"
    tokens, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == 300
    used = len(tokenizer)
    assert (
        tokens[:used] == tokenizer.convert_ids_to_tokens(range(used))
        and kinds[:2] == [3, 1]
        and kinds[used:] == [5] * (300 - used)
    )
    assert "t h" in said["tokenizer.ggml.merges"] or "Ġ t" in said["tokenizer.ggml.merges"]
    assert said["tokenizer.ggml.bos_token_id"] == 0 and said["tokenizer.ggml.add_bos_token"] is False
    assert "llama.cpp rounds activations to 8 bits" in str(result)


def test_a_tokenizer_with_byte_fallback(tmp_path):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "t", "o", "▁t", "▁to"]
    tokenizer = transformers.LlamaTokenizer(
        vocab={token: number for number, token in enumerate(tokens)}, merges=[("▁", "t"), ("▁t", "o")]
    )
    fqt.export(made(), tmp_path / "m.gguf", tokenizer=tokenizer)
    said = metadata(tmp_path / "m.gguf")
    assert said["tokenizer.ggml.model"] == "llama" and said["tokenizer.ggml.add_space_prefix"] is True
    scores = dict(zip(said["tokenizer.ggml.tokens"], said["tokenizer.ggml.scores"], strict=True))
    assert scores["▁t"] == 0 > scores["▁to"] == -1, "what was merged first scores most"
    assert said["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6] and said["tokenizer.ggml.unknown_token_id"] == 0


def test_refusals_name_the_thing_and_the_remedy(tmp_path):
    path = tmp_path / "m.gguf"

    def refused(words: str, model: nn.Module, **options: object) -> None:
        with pytest.raises((ValueError, TypeError), match=words):
            fqt.export(model, path, **options)
        assert not list(tmp_path.iterdir())

    signs = made(recipe="xnor")
    refused(r"layer 'model.layers.0.self_attn.q_proj' takes activations sign/tensor.*another function.*'bitnet'", signs)
    refused("hidden_act 'silu', not 'gelu'", made(hidden_act="gelu"))
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
    refused("rope_type 'yarn' of this model.*default, linear, llama3", made(rope_parameters=yarn))
    windowed = made("Mistral")
    windowed.config.sliding_window = 16
    refused("attends to everything before a token, the model to 16: set config.sliding_window = None", windowed)
    more = made()
    more.model.layers[0].mlp.adapter = nn.Linear(4, 4)
    refused("has no tensor for 'model.layers.0.mlp.adapter.weight': merge or remove what was added", more)
    longer = tokenizer_of(TEXT, 290)
    longer.add_tokens([f"<{number}>" for number in range(60)])
    refused(r"the tokenizer has a token 3\d\d, the model 300 tokens", made(), tokenizer=longer)
    refused("tokenizer is a str, not a fast tokenizer of transformers", made(), tokenizer="gpt2")
    split = tokenizer_of(TEXT, 290)
    split.backend_tokenizer.pre_tokenizer = __import__("tokenizers").pre_tokenizers.Whitespace()
    refused("the tokenizer splits text by .*Whitespace.*none of llama.cpp's rules", made(), tokenizer=split)


def test_the_architectures_are_the_packages() -> None:
    assert {gguf.MODEL_ARCH_NAMES[arch] for arch in ARCHITECTURES.values()} == {"llama", "qwen2", "qwen3"}
