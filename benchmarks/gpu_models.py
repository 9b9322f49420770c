"""The models whose steps `gpu_check` times: a function by name that returns the model, its batch on a device, and its loss.

Those of torchvision raise ImportError where it is not installed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Made = tuple[nn.Module, Callable[[str], tuple[Tensor, ...]], Callable[..., Tensor]]


class Block(nn.Module):
    """A transformer block as GPT-2's: attention and a layer four times as wide, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_NTC: Tensor) -> Tensor:
        n, t, c = x_NTC.shape
        parts = self.attend(self.before(x_NTC)).view(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x_NTC = x_NTC + self.project(mixed.transpose(1, 2).reshape(n, t, c))
        return x_NTC + self.narrow(F.gelu(self.widen(self.between(x_NTC))))


def gpt2_stack(width: int = 768, heads: int = 12, blocks: int = 12, batch: int = 8, tokens: int = 1024) -> Made:
    """GPT-2 small's twelve blocks, without its embeddings; the loss is a mean of squares."""
    model = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
    return model, lambda device: (torch.randn(batch, tokens, width, device=device),), lambda m, x: m(x).float().square().mean()


def image_model(name: str, batch: int = 64, size: int = 224) -> Made:
    """One of torchvision's, on random images."""
    import torchvision

    model = getattr(torchvision.models, name)(weights=None).to(memory_format=torch.channels_last)

    def make_batch(device: str) -> tuple[Tensor, ...]:
        images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
        return images, torch.randint(0, 1000, (batch,), device=device)

    return model, make_batch, lambda m, images, labels: F.cross_entropy(m(images), labels)


MODELS: dict[str, Callable[[], Made]] = {
    "resnet18": lambda: image_model("resnet18"),
    "resnet50": lambda: image_model("resnet50"),
    "vgg16": lambda: image_model("vgg16_bn"),
    "vit_b_16": lambda: image_model("vit_b_16"),
    "gpt2_small": gpt2_stack,
}
