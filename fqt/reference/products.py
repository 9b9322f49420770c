"""The three products of codes, in plain PyTorch: the specification that every kernel equals, bit for bit.

The products accumulate codes exactly, turn the accumulator into float32 once, and then, in this order:

    t = acc * a_scale;  t = t * b_scale
    t = t + ((sum of a's codes) * a_scale) * b_offset      if b has an offset
    t = t + ((sum of b's codes) * b_scale) * a_offset      if a has an offset
    t = t + (number of terms * a_offset) * b_offset        if both have

where the sums run over the positions inside the image: zero padding is the value 0, not the code 0. `grad_weight` with a
scale for each sample does this within every sample and adds the samples in ascending order; formats with blocks go through
`fqt.reference.blocks`. Bias or mask come last.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fqt.formats import Shape3
from fqt.geometry import Geometry
from fqt.multiply import (
    multiply_grad_input,
    multiply_grad_weight,
    multiply_grad_weight_of_samples,
    multiply_output,
)
from fqt.qtensor import QTensor
from fqt.reference import blocks
from fqt.reference.packing import apply_mask, spread, unpack

_BLOCK_ELEMENTS = 1 << 24  # of unfolded images at a time, in a product with a scale for each sample
_EXACT_IN_FLOAT32 = 1 << 24


def output(x: QTensor, w: QTensor, bias: Tensor | None, geometry: Geometry | None) -> Tensor:
    """Y = X * W, (N, P', O) float32. x's scale: tensor, sample (linear layers: token); w's: tensor or channel."""
    if blocks.has_blocks(x, w):
        y = blocks.output(x, w, geometry)
        return y if bias is None else y + bias.float()
    groups = geometry.groups if geometry else 1
    x_codes, w_codes = unpack(x.codes, x.format, x.shape), unpack(w.codes, w.format, w.shape)
    terms = w.shape[1] * w.shape[2]

    def total(a: Tensor | None, b: Tensor | None) -> Tensor:
        a = x_codes.new_ones(1, *x.shape[1:]) if a is None else a
        if b is None:  # the window's sum is the same for all output channels of a group
            ones = w_codes.new_ones(groups, *w.shape[1:])
            per_group = multiply_output(*_exact(a, ones, terms, x, w), geometry)
            return per_group.repeat_interleave(w.shape[0] // groups, -1)
        return multiply_output(*_exact(a, b, terms, x, w), geometry)

    w_scale = spread(w.scale, w).permute(1, 2, 0)
    w_offset = None if w.offset is None else spread(w.offset, w).permute(1, 2, 0)
    x_offset = None if x.offset is None else spread(x.offset, x)
    y = _dequantize(total, x_codes, w_codes, spread(x.scale, x), w_scale, x_offset, w_offset)
    return y if bias is None else y + bias.float()


def accumulate(x: QTensor, w: QTensor, geometry: Geometry | None) -> Tensor:
    """The integers that `output` scales, (N, P', O) int16: of signs, at most 32,767 terms."""
    x_codes, w_codes = unpack(x.codes, x.format, x.shape), unpack(w.codes, w.format, w.shape)
    return multiply_output(*_exact(x_codes, w_codes, w.shape[1] * w.shape[2], x, w), geometry).to(torch.int16).contiguous()


def grad_input(g: QTensor, w: QTensor, mask: Tensor | None, geometry: Geometry | None, x_shape: Shape3) -> Tensor:
    """The gradient of X, G * W, (N, P, C) float32. g's scale: tensor, sample (linear: token); w's: tensor."""
    if blocks.has_blocks(g, w):
        grad = blocks.grad_input(g, w, geometry, x_shape[1])
        return grad if mask is None else apply_mask(grad, mask)
    groups = geometry.groups if geometry else 1
    n, p, c = x_shape
    terms = w.shape[0] * w.shape[1]
    w_codes = unpack(w.codes, w.format, w.shape)
    g_codes = unpack(g.codes, g.format, g.shape)
    g_scale, g_offset = spread(g.scale, g), None if g.offset is None else spread(g.offset, g)
    kept = None
    if g.index is not None and g.format.axes == "N":
        kept = g.index[g.index >= 0].long()
        g_codes, g_scale = g_codes[kept], g_scale[kept]
        g_offset = None if g_offset is None else g_offset[kept]

    def total(a: Tensor | None, b: Tensor | None) -> Tensor:
        a = g_codes.new_ones(1, *g.shape[1:]) if a is None else a
        if b is None:
            ones = w_codes.new_ones(w.shape[0], w.shape[1], 1)
            per_group = multiply_grad_input(*_exact(a, ones, terms, g, w), groups, geometry)
            return per_group.repeat_interleave(c // groups, -1)
        return multiply_grad_input(*_exact(a, b, terms, g, w), c, geometry)

    w_scale = spread(w.scale, w)
    w_offset = None if w.offset is None else spread(w.offset, w)
    grad = _dequantize(total, g_codes, w_codes, g_scale, w_scale, g_offset, w_offset)
    if kept is not None:
        grad = grad.new_zeros(n, p, c).index_copy_(0, kept, grad)
    return grad if mask is None else apply_mask(grad, mask)


def grad_weight(g: QTensor, x: QTensor, geometry: Geometry | None) -> Tensor:
    """The gradient of W, G^T * X, (O, K, I) float32. g's scale: any but token; x's: tensor."""
    if blocks.has_blocks(g, x):
        return blocks.grad_weight(g, x, geometry)
    groups = geometry.groups if geometry else 1
    taps = geometry.kernel[0] * geometry.kernel[1] if geometry else 1
    grad = x.scale.new_zeros(g.shape[2], taps, x.shape[2] // groups)
    g_codes, x_codes = unpack(g.codes, g.format, g.shape), unpack(x.codes, x.format, x.shape)
    g_scale, g_offset = spread(g.scale, g), None if g.offset is None else spread(g.offset, g)
    kept = None if g.index is None else g.index[g.index >= 0].long()

    if "N" not in g.format.axes:
        # pruned channels are left out; where groups of them share an input, they multiply by 0
        if kept is None or groups > 1 or g.format.axes != "C":
            return _weight_terms(g, x, g_codes, x_codes, g_scale, g_offset, geometry, blocks=False)[0]
        if kept.numel() == 0:  # a convolution without channels is an error
            return grad
        g_codes, g_scale = g_codes[..., kept], g_scale[..., kept]
        g_offset = None if g_offset is None else g_offset[..., kept]
        terms = _weight_terms(g, x, g_codes, x_codes, g_scale, g_offset, geometry, blocks=False)
        return grad.index_copy_(0, kept, terms[0])

    if kept is not None and g.format.axes == "N":
        g_codes, g_scale, x_codes = g_codes[kept], g_scale[kept], x_codes[kept]
        g_offset = None if g_offset is None else g_offset[kept]
    unfolded = taps * x.shape[2] * g.shape[1] + grad.numel()
    chunk = max(1, _BLOCK_ELEMENTS // max(unfolded, 1))
    for first in range(0, g_codes.shape[0], chunk):
        part = slice(first, first + chunk)
        offset = None if g_offset is None else g_offset[part]
        for term in _weight_terms(g, x, g_codes[part], x_codes[part], g_scale[part], offset, geometry, blocks=True):
            grad = grad + term
    return grad


def _weight_terms(
    g: QTensor,
    x: QTensor,
    g_codes: Tensor,
    x_codes: Tensor,
    g_scale: Tensor,
    g_offset: Tensor | None,
    geometry: Geometry | None,
    blocks: bool,
) -> Tensor:
    """`grad_weight` of some samples and channels: (1, O, K, I), or with `blocks` one term for each sample."""
    groups = geometry.groups if geometry else 1
    samples, channels = x_codes.shape[0], g_codes.shape[2]

    def total(a: Tensor | None, b: Tensor | None) -> Tensor:
        if blocks or (a is not None and b is not None):
            images = samples if blocks else 1
            ones = g_codes.new_ones(images, 1, groups)
            a_codes = ones.expand(images, g.shape[1], groups) if a is None else a
            b_codes = ones.expand(images, x.shape[1], groups) if b is None else b
            multiply = multiply_grad_weight_of_samples if blocks else multiply_grad_weight
            result = multiply(*_exact(a_codes, b_codes, samples * g.shape[1], g, x), geometry)
            result = result if blocks else result.unsqueeze(0)
        else:  # the samples can be added first, leaving one image of sums
            ones = g_codes.new_ones((1, 1, groups), dtype=torch.float64)
            a_sum = ones.expand(1, g.shape[1], groups) if a is None else a.double().sum(0, keepdim=True)
            b_sum = ones.expand(1, x.shape[1], groups) if b is None else b.double().sum(0, keepdim=True)
            result = multiply_grad_weight_of_samples(a_sum, b_sum, geometry)
            result = result * samples if a is None and b is None else result
        return result if a is not None else result.repeat_interleave(channels // groups, 1)

    x_offset = None if x.offset is None else spread(x.offset, x)
    by_output = g_scale.permute(0, 2, 1).unsqueeze(-1)
    offset_by_output = None if g_offset is None else g_offset.permute(0, 2, 1).unsqueeze(-1)
    return _dequantize(total, g_codes, x_codes, by_output, spread(x.scale, x), offset_by_output, x_offset)


def _dequantize(
    total: Callable[[Tensor | None, Tensor | None], Tensor],
    a_codes: Tensor,
    b_codes: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_offset: Tensor | None,
    b_offset: Tensor | None,
) -> Tensor:
    """The float part of a product, in the module's stated order. `total(a, b)` accumulates codes; None stands for ones."""
    t = total(a_codes, b_codes).float() * a_scale * b_scale
    if b_offset is not None:
        t = t + total(a_codes, None).float() * a_scale * b_offset
    if a_offset is not None:
        t = t + total(None, b_codes).float() * b_scale * a_offset
    if a_offset is not None and b_offset is not None:
        t = t + total(None, None).float() * a_offset * b_offset
    return t


def _onednn() -> bool:
    return torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()


def _exact(a: Tensor, b: Tensor, terms: int, first: QTensor, second: QTensor) -> tuple[Tensor, Tensor]:
    """Both operands in a dtype in which the sum of `terms` products is exact in any order.

    float32 where every partial sum is an integer below 2^24 (a CPU's float32 may multiply in bfloat16 or TF32 where the user
    allows it, exact for codes of 8 bits); elsewhere float64, exact below 2^53. Sums of float8 products span more bits only
    where e5m2 takes part: then the order may show, if terms 2^53 times larger than the sum cancel.
    """
    bound = terms
    for q in (first, second):
        bound *= max(abs(code) for code in q.format.code_range)
    narrow = not any(q.format.is_float or q.format.bits > 8 for q in (first, second))
    # without oneDNN a convolution may be NNPACK's Winograd, whose transforms are not exact
    narrow = narrow and bound < _EXACT_IN_FLOAT32 and a.device.type == "cpu" and _onednn()
    dtype = torch.float32 if narrow else torch.float64
    return a.to(dtype), b.to(dtype)
