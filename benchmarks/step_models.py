"""Blocks of transformers whose steps `benchmarks.step` times: by name the model, and its batch; and recipes for all of a model.

Each has a few of its network's blocks, of the sizes given, between an embedding of a small vocabulary and a linear head of ten
classes over the mean of the tokens, so that nearly all of the step is the blocks'. BERT, GPT-2 and Llama are those of the
package transformers, with random weights and their own dropout; ViT and MLP-Mixer are timm's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

import fqt
from fqt.quantizers import build

BLOCKS = 2
CLASSES = 10
_VOCABULARY = 1000

Made = tuple[nn.Module, Tensor]


class Classifier(nn.Module):
    """Tokens (N, T) to logits (N, CLASSES)."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, CLASSES)

    def forward(self, tokens_NT: Tensor) -> Tensor:
        return self.head(self.body(tokens_NT).last_hidden_state.mean(1))


def _tokens(batch: int, length: int) -> Tensor:
    return torch.randint(_VOCABULARY, (batch, length))


def bert(batch: int) -> Made:
    """BERT-base's blocks, 128 tokens."""
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=_VOCABULARY, num_hidden_layers=BLOCKS)
    return Classifier(BertModel(config, add_pooling_layer=False), config.hidden_size), _tokens(batch, 128)


def gpt2(batch: int) -> Made:
    """GPT-2 small's blocks, 256 tokens."""
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(vocab_size=_VOCABULARY, n_layer=BLOCKS, use_cache=False)
    return Classifier(GPT2Model(config), config.hidden_size), _tokens(batch, 256)


def llama(batch: int) -> Made:
    """Llama's blocks at 768 wide, 2048 inside, 12 heads, 256 tokens."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=_VOCABULARY, hidden_size=768, intermediate_size=2048, num_attention_heads=12, num_hidden_layers=BLOCKS,
        use_cache=False,
    )  # fmt: skip
    return Classifier(LlamaModel(config), 768), _tokens(batch, 256)


def vit(batch: int) -> Made:
    """ViT-S/16's blocks, images of 224 x 224."""
    import timm

    model = timm.create_model("vit_small_patch16_224", depth=BLOCKS, num_classes=CLASSES)
    return model, torch.randn(batch, 3, 224, 224)


def mixer(batch: int) -> Made:
    """MLP-Mixer-S/16's blocks, images of 224 x 224."""
    import timm

    model = timm.create_model("mixer_s16_224", num_blocks=BLOCKS, num_classes=CLASSES)
    return model, torch.randn(batch, 3, 224, 224)


MODELS: dict[str, tuple[Callable[[int], Made], int]] = {
    "bert": (bert, 16), "gpt2": (gpt2, 8), "llama": (llama, 8), "vit": (vit, 8), "mixer": (mixer, 8),
}  # fmt: skip
"""Name -> the function of a batch, and the usual batch."""


def recipe_of(name: str) -> fqt.Recipe:
    """A built-in recipe for every layer, or "signs": bitnet with weights of signs, a scale for each output channel."""
    if name != "signs":
        return fqt.load_recipe(name).everywhere()
    bitnet = fqt.load_recipe("bitnet").everywhere()
    weight = build("xnor_weight", "w")
    assert weight is not None
    return replace(bitnet, name="signs", output=replace(bitnet.output, right=weight))
