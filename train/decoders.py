"""Small decoders of texts, of torch's own modules: a GPT and a Llama, in the sizes of the configuration.

Both take `input_ids` (N, T) and return logits of the next token (N, T, classes). With an `attention_mask` (N, T), 1 where a
token is and 0 behind the end of a text, they return logits of whole texts (N, classes): those of each one's last token, which
has seen all others.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

ROTARY_BASE = 10000.0


class Attention(nn.Module):
    """Causal self-attention; rotary: whether places turn queries and keys, as RoPE (arXiv 2104.09864) does."""

    def __init__(self, width: int, heads: int, *, bias: bool, rotary: bool) -> None:
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.attend, self.project = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias)

    def forward(self, x_NTC: Tensor) -> Tensor:
        n, t, c = x_NTC.shape
        q, k, v = self.attend(x_NTC).view(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        if self.rotary:
            q, k = turned(q), turned(k)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.project(mixed.transpose(1, 2).reshape(n, t, c))


class Gpt(nn.Module):
    """GPT-2's feed-forward layers: two linear ones, four times as wide between, and a GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_NTC: Tensor) -> Tensor:
        return self.narrow(gelu(self.widen(x_NTC)))


class Gated(nn.Module):
    """Llama's: one linear layer opens the other's output, 8/3 times as wide, by a SiLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = -(-8 * width // 3 // 32) * 32
        self.gate, self.widen = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.narrow = nn.Linear(inner, width, bias=False)

    def forward(self, x_NTC: Tensor) -> Tensor:
        return self.narrow(silu(self.gate(x_NTC)) * self.widen(x_NTC))


class Block(nn.Module):
    """Attention, then a feed-forward layer, each behind a norm and beside a residual."""

    def __init__(self, width: int, heads: int, *, llama: bool) -> None:
        super().__init__()
        norm = nn.RMSNorm if llama else nn.LayerNorm
        self.before, self.attention = norm(width), Attention(width, heads, bias=not llama, rotary=llama)
        self.between, self.feed_forward = norm(width), Gated(width) if llama else Gpt(width)

    def forward(self, x_NTC: Tensor) -> Tensor:
        x_NTC = x_NTC + self.attention(self.before(x_NTC))
        return x_NTC + self.feed_forward(self.between(x_NTC))


class Decoder(nn.Module):
    """llama: RMSNorm, rotary places, gated units, no biases; else LayerNorm, learned places and GELU."""

    def __init__(self, tokens: int, classes: int, length: int, *, blocks: int, width: int, heads: int, llama: bool) -> None:
        super().__init__()
        self.length = length
        self.embed = nn.Embedding(tokens, width)
        self.place = None if llama else nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads, llama=llama) for _ in range(blocks)))
        self.last, self.head = (nn.RMSNorm if llama else nn.LayerNorm)(width), nn.Linear(width, classes, bias=False)
        for module in self.modules():  # GPT-2's initialization; its narrowing layers add up over the blocks
            if isinstance(module, nn.Linear | nn.Embedding):
                narrows = isinstance(module, nn.Linear) and module.out_features == width
                nn.init.normal_(module.weight, std=0.02 / (2 * blocks) ** 0.5 if narrows else 0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x_NTC = self.embed(input_ids)
        if self.place is not None:
            x_NTC = x_NTC + self.place(torch.arange(input_ids.shape[1], device=input_ids.device))
        x_NTC = self.last(self.blocks(x_NTC))
        if attention_mask is None:
            return self.head(x_NTC)
        ends_N = attention_mask.sum(1) - 1
        return self.head(x_NTC[torch.arange(len(ends_N), device=ends_N.device), ends_N])


def turned(x_NHTC: Tensor) -> Tensor:
    """Each pair of channels (c, c + C/2) turned by an angle that grows with the place, the faster the smaller c is."""
    t, half = x_NHTC.shape[2], x_NHTC.shape[3] // 2
    speed_C = ROTARY_BASE ** (-torch.arange(half, device=x_NHTC.device) / half)
    angle_TC = torch.arange(t, device=x_NHTC.device).unsqueeze(1) * speed_C
    a, b = x_NHTC.chunk(2, -1)
    cos, sin = angle_TC.cos().to(x_NHTC.dtype), angle_TC.sin().to(x_NHTC.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
