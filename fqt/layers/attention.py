"""QuantMultiheadAttention: nn.MultiheadAttention with a recipe, its projections of query, key and value as three linear layers.

Where keys or values have a size of their own (kdim, vdim), torch keeps three weights, else one of three times the rows.

Torch multiplies all four weights of an attention within one function, so `out_proj` is no layer that is called. Here it is: it
is converted, kept float and hooked as any other layer. Scores and their softmax stay float.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fqt import functional
from fqt.layers import changing
from fqt.layers.base import QuantizedLayer, register_layer
from fqt.layers.linear import QuantLinear
from fqt.packed import Weight

# of an attention's output; called where the attention is converted
register_layer("torch.nn.modules.linear.NonDynamicallyQuantizableLinear")(QuantLinear)


@register_layer(nn.MultiheadAttention)
class QuantMultiheadAttention(QuantizedLayer, nn.MultiheadAttention):
    """nn.MultiheadAttention whose three input projections follow `recipe`, each with ranges of its own."""

    options = ("embed_dim", "num_heads", "dropout", "add_zero_attn", "kdim", "vdim", "batch_first")
    borrows = ("out_proj",)
    weight_name = "in_proj_weight"
    observer: Callable[[Tensor], None] | None = None
    """Given the gradient of each projection's output in turn, see `fqt.observe_gradients`."""

    # torch's fast paths in evaluation multiply the float weights; both of their callers ask for this first
    @property
    def _qkv_same_embed_dim(self) -> bool:
        return "recipe" not in self.__dict__ and self.__dict__["_qkv_same_embed_dim"]

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        self.__dict__["_qkv_same_embed_dim"] = value

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Those of query, key and value: (3 E, E), or beside each other, (E, E + kdim + vdim), where each has its own."""
        return _weight(self)

    def weights(self) -> Sequence[Weight]:
        # The three parameters themselves: to split `weight` would first copy all three into one tensor.
        return _own(self) if _apart(self) else super().weights()

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        return self.in_proj_bias

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention's. RuntimeError if `is_causal` comes without the mask that it describes."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal says that attn_mask is causal, so give that mask too")
        batched = query.dim() == 3
        inputs = [
            x if batched and self.batch_first else x.transpose(0, 1) if batched else x.unsqueeze(0) for x in (query, key, value)
        ]
        weights = self.weights()  # once: a parametrization computes it
        project = partial(changing.compute, self) if self.changing else self.compute
        q, k, v = (self._seen(project(x, weights[part], part)) for part, x in enumerate(inputs))
        n, length, heads = q.shape[0], q.shape[1], self.num_heads
        if self.bias_k is not None and self.bias_v is not None:
            k, v = torch.cat([k, self.bias_k.expand(n, 1, -1)], 1), torch.cat([v, self.bias_v.expand(n, 1, -1)], 1)
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = (F.pad(x, [0, 0, 0, 1]) for x in (k, v))
        mask = None
        if attn_mask is not None:
            attn_mask = attn_mask.view(n, heads, length, -1) if attn_mask.dim() == 3 else attn_mask
            mask = _added(attn_mask, q.dtype, k.shape[2])
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, q.dtype, k.shape[2]).view(n, 1, 1, -1)
            mask = padding if mask is None else mask + padding
        dropout, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
            weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
            y = weights @ v
        else:
            causal = is_causal and key_padding_mask is None  # then torch masks by position, keys that it appended too
            y = F.scaled_dot_product_attention(q, k, v, None if causal else mask, dropout, causal)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return (y if batched and self.batch_first else y.transpose(0, 1) if batched else y.squeeze(0)), weights

    def compute(self, x_NPC: Tensor, w_OI: Weight, part: int) -> Tensor:  # type: ignore[override]
        """The projection of the query (0), key (1) or value (2)."""
        rows = slice(part * self.embed_dim, (part + 1) * self.embed_dim)
        bias = None if self.in_proj_bias is None else self.in_proj_bias[rows]
        options = {"training": self.training, "states": self.states, "backend": self.backend}
        return functional.linear(x_NPC, w_OI, bias, self.recipe, **options)  # type: ignore[arg-type]

    def _seen(self, y: Tensor) -> Tensor:
        return y if self.observer is None or not y.requires_grad else changing.watched(y, self.observer)

    def split(self, weight: Tensor) -> Sequence[Tensor]:
        if _apart(self):
            return weight.split([self.embed_dim, self.kdim, self.vdim], 1)
        return weight.split(self.embed_dim)

    def weight_OKI(self) -> Tensor:
        """Three weights are cut into taps of one width, which divides the width of each and a block of 32: no tap has elements
        of two weights, or of two blocks."""
        if _apart(self):
            return _weight(self).unflatten(1, (-1, math.gcd(self.embed_dim, self.kdim, self.vdim, 32)))
        return _weight(self).unsqueeze(1)

    def multiply_adds(self, output: tuple[Tensor, Tensor | None]) -> int:  # type: ignore[override]
        """With as many keys as queries."""
        y = output[0]
        return y.shape[1 if self.batch_first and y.dim() == 3 else 0] * _weight(self).numel()

    def exercise(self, x: Tensor) -> Tensor:
        """Of keys and values that are x, cut or padded to their sizes."""
        key, value = (F.pad(x, (0, size - x.shape[-1])) for size in (self.kdim, self.vdim))
        return self(x, key, value, need_weights=False)[0]

    def like(self, kind: type[nn.Module]) -> nn.Module:
        sizes = {name: getattr(self, name) for name in self.options}
        return kind(**sizes, bias=self.in_proj_bias is not None, add_bias_kv=self.bias_k is not None)


def _apart(layer: nn.MultiheadAttention) -> bool:
    """Whether keys or values have a size of their own, so that there is no joint weight."""
    return (layer.kdim, layer.vdim) != (layer.embed_dim, layer.embed_dim)


def _own(layer: nn.MultiheadAttention) -> list[Tensor]:
    return [layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight]  # type: ignore[list-item]


def _weight(layer: nn.MultiheadAttention) -> Tensor:
    """The joint weight, or all three beside each other."""
    return layer.in_proj_weight if layer.in_proj_weight is not None else torch.cat(_own(layer), 1)


def _added(mask: Tensor, dtype: torch.dtype, keys: int) -> Tensor:
    """A mask as what is added to scores, with zeros for the keys that the attention itself appends."""
    added = (
        mask.to(dtype) if mask.is_floating_point() else mask.new_zeros(mask.shape, dtype=dtype).masked_fill(mask, -torch.inf)
    )
    return F.pad(added, [0, keys - mask.shape[-1]])
