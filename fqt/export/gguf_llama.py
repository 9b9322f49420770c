"""What llama.cpp wants of transformers' Llama-style models beside their weights: names, metadata, the order of rows.

Rotary embeddings turn pairs of a head's channels: transformers pairs channel j with j + D/2, llama.cpp's models of architecture
"llama" (Llama, Mistral) pair 2j with 2j + 1, so the rows of q and k are reordered for it; those of Qwen stay.

llama.cpp multiplies a quantized weight by activations that it rounds to 8 bits, with a scale for each 256 (TQ2_0) or 32 (the
other types) of them. A recipe that rounds activations otherwise is served nearly; one whose activations are signs, or never
negative, computes another function there, and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gguf
import torch
from torch import Tensor, nn

from fqt.export.gguf_tokenizer import describe_tokenizer
from fqt.export.weights import Entry
from fqt.layers import quantized_layers

ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "MistralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
}
"""Class of transformers -> llama.cpp's architecture."""


class Language:
    """A causal language model as llama.cpp sees it.

    Args:
        model: of a class in `ARCHITECTURES`, converted.
        tokenizer: transformers' fast tokenizer, or None: the file then speaks numbers of tokens alone.

    Attributes:
        architecture: its name in the file.
        notes: in which llama.cpp computes otherwise than the model.

    Raises:
        ValueError: the model has something that llama.cpp's architecture has not.
    """

    def __init__(self, model: nn.Module, tokenizer: object | None) -> None:
        self.config: Any = model.config
        self.tokenizer = tokenizer
        self.arch = ARCHITECTURES[type(model).__name__]
        self.architecture = gguf.MODEL_ARCH_NAMES[self.arch]
        self.names = gguf.get_tensor_name_map(self.arch, self.config.num_hidden_layers)
        self.head = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        self.turned = self.arch == gguf.MODEL_ARCH.LLAMA
        if self.config.hidden_act != "silu":
            raise ValueError(f"llama.cpp's {self.architecture} has hidden_act 'silu', not {self.config.hidden_act!r}")
        window = getattr(self.config, "sliding_window", None)
        if window is not None and getattr(self.config, "use_sliding_window", True):
            raise ValueError(
                f"llama.cpp's {self.architecture} attends to everything before a token, the model to {window}: set "
                f"config.sliding_window = None if no text is longer"
            )
        self.stretch = self._stretch(model)
        self.notes = self._notes(model)

    def _stretch(self, model: Any) -> Tensor:
        """By how much the model's rotary frequencies are slower than base^(-2j/D), (D/2,)."""
        rotary = model.model.rotary_emb
        plain = self.config.rope_parameters["rope_theta"] ** (-torch.arange(0, self.head, 2, dtype=torch.float64) / self.head)
        stretch = (plain / rotary.inv_freq.double().cpu()).float()
        stretch = torch.where((stretch - 1).abs() < 1e-5, 1.0, stretch)
        kind = self.config.rope_parameters.get("rope_type", "default")
        fixed = kind in ("default", "linear", "llama3") and rotary.attention_scaling == 1
        if not fixed or (not self.turned and bool((stretch != 1).any())):
            raise ValueError(
                f"rope_type {kind!r} of this model is not one that a GGUF file of {self.architecture} is written for here "
                f"({'default, linear, llama3' if self.turned else 'default'})"
            )
        return stretch

    def _notes(self, model: nn.Module) -> list[str]:
        kinds = set()
        for name, layer in quantized_layers(model):
            x = layer.recipe.operand("output", "x")
            if layer.recipe.operand("output", "w") is None:
                continue
            kinds.add("floats" if x is None else str(x.quantizer))
            if x is not None and (x.format.grid == "sign" or (x.format.grid == "uint" and not x.format.offset)):
                raise ValueError(
                    f"layer {name!r} takes activations {x.quantizer}, and llama.cpp multiplies by activations of 8 bits and "
                    f"both signs: it would compute another function; train with activations of 8 bits, as recipe 'bitnet'"
                )
        taken = " and ".join(sorted(kinds))
        return [f"the model's layers take {taken}; llama.cpp rounds activations to 8 bits with a scale for each 32 or 256"]

    def name_of(self, entry: Entry) -> str | None:
        """An entry's name in the file; None for a float head that is the embedding, which stands for both.

        Raises:
            ValueError: llama.cpp has no such tensor.
        """
        if entry.name == "lm_head.weight" and self.config.tie_word_embeddings and entry.q is None:
            return None
        name = self.names.get_name(entry.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(
                f"llama.cpp's {self.architecture} has no tensor for {entry.name!r}: merge or remove what was added to the model"
            )
        return name

    def order_of(self, entry: Entry) -> Tensor | None:
        """The order in which the rows of q and k go, (O,) int64; None for what keeps its order."""
        module = entry.name.split(".")[-2:][0]
        if not self.turned or module not in ("q_proj", "k_proj"):
            return None
        in_head = torch.arange(self.head).view(2, -1).T.flatten()
        heads = torch.arange(0, entry.value.shape[0], self.head)
        return (heads.unsqueeze(1) + in_head).flatten()

    def more(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors that are no entries of the state dict."""
        if bool((self.stretch != 1).any()):
            yield f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS]}.weight", self.stretch

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Write the metadata, and the tokenizer's."""
        config = self.config
        writer.add_name(getattr(config, "name_or_path", "") or type(config).__name__.removesuffix("Config"))
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head)
        writer.add_value_length(self.head)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(self.head)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        describe_tokenizer(writer, self.tokenizer, config)
