"""Checkpoint folders that transformers loads: the decoded weights as floats, and its own BitNet layers."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import fqt
from benchmarks.tinyllama import tokenizer_of
from fqt.cli import main

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'fqt[export]'")
pytest.importorskip("accelerate", reason="transformers' BitNet needs accelerate: pip install 'fqt[export]'")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
IDS = torch.arange(24).view(2, 12)


def llama(recipe: str = "bitnet", **options: object) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, **options,
    )  # fmt: skip
    return fqt.convert(transformers.LlamaForCausalLM(config), recipe).train()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return model.eval()(input_ids=IDS).logits


def test_transformers_own_bitnet_computes_what_the_model_does(tmp_path):
    model = llama()
    result = fqt.export(model, tmp_path / "bitnet", {"input_ids": IDS}, format="bitnet")
    # a rounding that differs may flip the code of an activation behind it
    assert model.training and result.measured["relative_difference"] < 1e-3 and result.measured["top1_agreement"] == 1
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bitnet")
    kinds = {type(module).__name__ for module in loaded.modules()}
    assert "BitLinear" in kinds and type(loaded.lm_head) is nn.Linear
    x = torch.randn(2, 5, 32)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for name, layer in fqt.quantized_layers(model.eval()):
            if layer.in_features == 32:
                torch.testing.assert_close(loaded.get_submodule(name)(x), layer(x), atol=1e-6, rtol=1e-6)
    packed = loaded.model.layers[1].mlp.up_proj.weight
    assert packed.dtype == torch.uint8 and packed.shape == (12, 32)
    frozen = fqt.freeze(model)
    fqt.export(frozen, tmp_path / "frozen", format="bitnet")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("bitnet", "frozen")]
    assert files[0] == files[1]


@pytest.mark.parametrize("recipe", ["bitnet", "int4", "xnor", "dorefa_w8a8g8"])
def test_a_plain_checkpoint_holds_the_decoded_weights(recipe, tmp_path):
    model = llama(recipe)
    result = fqt.export(model, tmp_path / "plain", {"input_ids": IDS}, format="transformers")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, layer in fqt.quantized_layers(model):
        assert torch.equal(loaded.get_submodule(name).weight, layer.quantized_weight().decode()[:, 0])
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    gap = float((logits(loaded) - logits(model)).abs().max())
    assert result.measured["largest_difference"] == pytest.approx(gap) and gap > 0
    assert result.notes[0].startswith("activations are floats, where the model's are ")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())


def test_tied_heads(tmp_path):
    model = llama(tie_word_embeddings=True)
    fqt.export(model, tmp_path / "tied", {"input_ids": IDS}, format="bitnet")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert float((logits(loaded) - logits(model)).norm() / logits(model).norm()) < 1e-3
    fqt.revert(model)
    fqt.convert(model, fqt.load_recipe("bitnet").everywhere())
    with pytest.raises(ValueError, match=r"'lm_head.weight' is tied to a weight that is read as a float.*skip='lm_head'"):
        fqt.export(model, tmp_path / "none", format="transformers")
    assert not (tmp_path / "none").exists()


def test_refusals_name_the_layer_and_the_remedy(tmp_path):
    with pytest.raises(
        ValueError, match=r"layer 'model.layers.0.self_attn.q_proj', a QuantLinear, takes .* sign/channel.*'bitnet'"
    ):
        fqt.export(llama("xnor"), tmp_path / "m", format="bitnet")
    odd = llama()
    odd.model.layers[1].mlp.extra = fqt.convert(nn.Sequential(nn.Linear(4, 6)), fqt.load_recipe("bitnet").everywhere())[0]
    with pytest.raises(ValueError, match=r"weight 'model.layers.1.mlp.extra.weight' has 6 rows.*a multiple of 4 outputs"):
        fqt.export(odd, tmp_path / "m", format="bitnet")
    plain = fqt.convert(nn.Sequential(nn.Linear(4, 6)), fqt.load_recipe("bitnet").everywhere())
    with pytest.raises(TypeError, match="format 'bitnet' is for models of transformers, not for a Sequential: use fqt.save"):
        fqt.export(plain, tmp_path / "m", format="bitnet")
    with pytest.raises(
        ValueError, match=r"'.*m' does not end in .gguf or .onnx: .* give format='transformers' or format='bitnet'"
    ):
        fqt.export(plain, tmp_path / "m")
    with pytest.raises(ValueError, match=r"format 'gguf' does not go with '.*m'"):
        fqt.export(plain, tmp_path / "m", format="gguf")
    (tmp_path / "m").mkdir()
    with pytest.raises(FileExistsError, match=r"m' exists: choose another folder, or remove it first"):
        fqt.export(llama(), tmp_path / "m", format="bitnet")


def test_the_shell_exports_and_generates(tmp_path, capsys):
    text = "To be, or not to be, that is the question.\n" * 20
    tokenizer = tokenizer_of(text, 290)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=290, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    model = fqt.convert(transformers.LlamaForCausalLM(config), "bitnet").eval()
    file = str(tmp_path / "m.safetensors")
    fqt.save(model, file, factory="transformers:LlamaForCausalLM", arguments=config.to_diff_dict())
    folder = str(tmp_path / "tokenizer")
    assert main(["export", file, str(tmp_path / "m.gguf"), "--tokenizer", folder]) == 0
    assert "m.gguf: " in capsys.readouterr().out and (tmp_path / "m.gguf").stat().st_size > 10_000
    assert main(["generate", file, "--tokenizer", folder, "--prompt", "To be", "--tokens", "5"]) == 0
    given = tokenizer("To be", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = tokenizer.decode(model.generate(input_ids=given, max_new_tokens=5, do_sample=False, pad_token_id=0)[0])
    assert capsys.readouterr().out.strip() == expected.strip()
    assert main(["export", file, str(tmp_path / "m.onnx")]) == 1
    assert "fqt export: a model is traced by running it: give fqt.export an example" in capsys.readouterr().err
