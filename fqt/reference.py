"""The specification: how tensors are quantized and multiplied, in plain PyTorch. Every kernel equals this, bit for bit.

quantize = fold -> calibrate -> prune -> encode -> pack. All arithmetic is float32, one rounding an operation, none fused:

    y = (x - offset) * inverse          inverse: one division a group (a division an element would flip rare codes)
    nearest:    code = y rounded, ties to even
    stochastic: code = k + (u24 < (y - k) * 2^24) with k = floor(y) and 24 random bits u24, an exact comparison

One rule for what is not finite: a group with a NaN, or whose range is infinite, gets scale NaN and stored bits 0, so it
decodes to NaN and the loss shows it; where the range is fixed beforehand (calibrate="none") infinities saturate like any
large value. A group whose range is below `MIN_RANGE` counts as constant: its scale is 0.

The products accumulate codes exactly, turn the accumulator into float32 once, and then, in this order:

    t = acc * a_scale;  t = t * b_scale
    t = t + ((sum of a's codes) * a_scale) * b_offset      if b has an offset
    t = t + ((sum of b's codes) * b_scale) * a_offset      if a has an offset
    t = t + (number of terms * a_offset) * b_offset        if both have

where the sums run over the positions inside the image: zero padding is the value 0, not the code 0. `grad_weight` with a
scale for each sample does this within every sample and adds the samples in ascending order. Bias or mask come last.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fqt.formats import FLOAT8_MAX, Format, Shape3
from fqt.geometry import Geometry
from fqt.philox import uniform_u24
from fqt.qtensor import QTensor, codes_dtype

MIN_RANGE = 2.0**-100
_ONE = 1 << 24  # the probability 1, in the integers that decide
_FLOAT8_DTYPE = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_FLOAT8_MIN_EXPONENT = {"e4m3": -6, "e5m2": -14}
_FLOAT8_MANTISSA_BITS = {"e4m3": 3, "e5m2": 2}
_BLOCK_ELEMENTS = 1 << 24  # of unfolded images at a time, in a product with a scale for each sample


def quantize(
    x_NPC: Tensor,
    format: Format,
    *,
    calibrate: str,
    limits: tuple[float, float] = (-1.0, 1.0),
    stochastic: bool = False,
    prune: str = "",
    keep_one_in: int = 1,
    fold: Tensor | None = None,
    key: Tensor | None = None,
    stream: int = 0,
    pass_range: tuple[float, float] | None = None,
    ranges: tuple[Tensor, Tensor] | None = None,
) -> tuple[QTensor, Tensor | None]:
    """Quantize a tensor.

    Args:
        x_NPC: (N, P, C) or (O, K, I), any float dtype, any strides.
        calibrate: "absmax" (symmetric range), "minmax", "absmean" (scale = mean |x|; sign and ternary) or "none".
        limits: with calibrate="none", the values of the smallest and the largest code.
        stochastic: stochastic instead of nearest rounding; needs `key`.
        prune: "" (nothing), "bernoulli" or "topk", see `keep_groups`.
        keep_one_in: b: pruning keeps one group in b.
        fold: broadcastable to x and multiplied into it first: the other operand's scale that cannot leave the product.
        key: () int64, the Philox key.
        stream: even; rounding draws from this stream, pruning from the next.
        pass_range: of the clipped straight-through estimator; None passes every gradient.
        ranges: what `group_range` would compute, (G,) float32 each, where the caller knows it.

    Returns:
        The codes, and the packed mask of `pass_mask` (None without `pass_range`).
    """
    mask = None if pass_range is None else pass_mask(x_NPC, *pass_range)
    shape = (x_NPC.shape[0], x_NPC.shape[1], x_NPC.shape[2])
    rows_GE = group_rows(x_NPC.float() if fold is None else x_NPC.float() * fold, format)
    low, high = ranges or group_range(rows_GE)
    mean = absmean(rows_GE) if calibrate == "absmean" else None
    scale, inverse, offset = calibrate_groups(low, high, mean, format, calibrate, limits)
    groups = torch.arange(rows_GE.shape[0], device=rows_GE.device)
    kept, factor = groups, None
    if prune:
        kept, factor = keep_groups(low, high, prune, keep_one_in, key, stream + 1)

    kept_offset = None if offset is None else offset[kept]
    codes_GE = encode(rows_GE[kept], format, inverse[kept], kept_offset, kept, key if stochastic else None, stream)
    stored_GE = _stored(codes_GE, format, scale[kept])
    if factor is None:
        return QTensor(pack(stored_GE, format, shape), scale, offset, None, format, shape), mask
    stored_GE = stored_GE.new_zeros(rows_GE.shape).index_copy_(0, kept, stored_GE)
    return pruned(QTensor(pack(stored_GE, format, shape), scale, offset, None, format, shape), kept, factor), mask


def group_rows(x_NPC: Tensor, format: Format) -> Tensor:
    """(N, P, C) as (groups, elements of a group), in the order of `fqt.formats`."""
    shape = (x_NPC.shape[0], x_NPC.shape[1], x_NPC.shape[2])
    groups = format.groups(shape)
    stored = x_NPC.permute(2, 0, 1) if format.channel_major else x_NPC
    return stored.reshape(groups, x_NPC.numel() // max(groups, 1))


def group_range(rows_GE: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each group, (G,) float32; NaN if the group holds one, 0 if it is empty."""
    if rows_GE.shape[1] == 0:
        return rows_GE.new_zeros(rows_GE.shape[0]), rows_GE.new_zeros(rows_GE.shape[0])
    return torch.aminmax(rows_GE, dim=1)


def absmean(rows_GE: Tensor) -> Tensor:
    """Mean |x| of each group through a float64 sum over a fixed binary tree, so that every device gets the same bits."""
    total = rows_GE.abs().double()
    if total.shape[1] == 0:
        return rows_GE.new_zeros(rows_GE.shape[0])
    while total.shape[1] > 1:
        total = F.pad(total, (0, total.shape[1] % 2))
        total = total[:, 0::2] + total[:, 1::2]
    return (total[:, 0] / torch.full_like(total[:, 0], rows_GE.shape[1])).float()


def calibrate_groups(
    low: Tensor, high: Tensor, mean: Tensor | None, format: Format, calibrate: str, limits: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scale, its reciprocal for encoding, and offset, each (G,) float32 (offset None if the format has none).

    Args:
        low, high: of `group_range`.
        mean: of `absmean`, with calibrate="absmean".
    """
    low_code, high_code = format.code_range
    # a tensor: torch takes number / tensor for a reciprocal and a product, and so does CUDA tensor / number
    steps = torch.full_like(low, high_code if low_code < 0 else high_code - low_code)
    if calibrate == "none":
        first, last = (torch.full_like(low, limit) for limit in limits)
        if format.grid == "fixed":  # two's complement reaches one step further down than up
            scale, inverse = first / low_code, low_code / first
        else:
            span = last if low_code < 0 else last - first
            scale, inverse = span / steps, steps / span
        bad, offset = low.isnan(), first
    else:
        if calibrate == "minmax":
            span, offset = high - low, low
        elif calibrate == "absmax":
            span = torch.maximum(high, -low)
            offset = torch.where(span >= MIN_RANGE, -span, 0.0)
            span = span * 2 if format.offset else span
        else:
            assert mean is not None
            span, offset, steps = mean, low, torch.ones_like(low)
        bad, wide = ~span.isfinite(), span >= MIN_RANGE
        scale = torch.where(wide, span / steps, 0.0)
        inverse = torch.where(wide, steps / span, 0.0)
    scale = torch.where(bad, torch.nan, scale)
    inverse = torch.where(bad, 0.0, inverse)
    return scale, inverse, torch.where(bad, 0.0, offset) if format.offset else None


def keep_groups(low: Tensor, high: Tensor, mode: str, b: int, key: Tensor | None, stream: int) -> tuple[Tensor, Tensor]:
    """Activation gradient pruning (1-Bit FQT, section 4.2): which groups are kept, and by what they are multiplied.

    "bernoulli": group i is kept with probability p_i = min(1, c * R_i), c such that the p_i sum to G/b (at least 1), and
    multiplied by 1/p_i: unbiased. The paper's p_i = (G/b) R_i / sum R can exceed 1; clipping that alone would keep too few,
    so the excess is spread. R_i = max(x, 0) - min(x, 0) includes the zero, so a constant group is not lost.
    "topk": the max(1, G // b) groups of the largest max |x|, not rescaled: what the paper's code does. Biased.

    The probabilities are multiples of 2^-24 that come from exact integer sums, hence equal everywhere. A group that is not
    finite is kept as it is.

    Args:
        low, high: of `group_range`.

    Returns:
        (kept,) int64 ascending, and (G,) float32, 0 for a pruned group.
    """
    groups = low.shape[0]
    if groups == 0:
        return torch.arange(0, device=low.device), low
    high, low = high.clamp(min=0), low.clamp(max=0)
    bad = ~(high - low).isfinite()
    if mode == "topk":
        order = torch.where(bad, torch.inf, torch.maximum(high, -low)).argsort(descending=True, stable=True)
        keep = torch.zeros_like(bad).index_fill_(0, order[: max(1, groups // b)], True) | bad
        return keep.nonzero()[:, 0], keep.float()

    span = torch.where(bad, 0.0, high - low).double()
    # ranges as integers of 30 bits, so that their sums are exact in any order
    range_30 = torch.where(span > 0, (span * (2.0**30 / span.max())).floor().clamp(min=1), 0.0).long()
    budget = max(groups * _ONE / b, float(_ONE))
    largest = range_30.sort(descending=True).values
    rest = largest.flip(0).cumsum(0).flip(0).double()  # sum of the ranges from the k-th largest on
    left = (budget - _ONE * torch.arange(groups, device=span.device, dtype=torch.float64)).clamp(min=0)
    fits = (left * largest <= _ONE * rest).nonzero()  # with the k widest kept for sure, no other p exceeds 1
    k = int(fits[0]) if fits.numel() else groups
    sure = (range_30 >= largest[k - 1]) | bad if k else bad
    share = left[k] / rest[k].clamp(min=1) if k < groups else torch.zeros_like(left[0])
    threshold = torch.where(range_30 > 0, (range_30 * share).round().clamp(1, _ONE), 0.0)
    threshold = torch.where(sure, float(_ONE), threshold)
    assert key is not None, "pruning at random needs a key"
    draw = uniform_u24(torch.zeros(1, dtype=torch.int64, device=span.device), groups, key, stream)[0]
    keep = draw < threshold
    return keep.nonzero()[:, 0], torch.where(keep, _ONE / threshold, 0.0).float()


def pruned(q: QTensor, kept: Tensor, factor: Tensor) -> QTensor:
    """`q` with its kept groups multiplied, the others at scale and offset 0, and the index of the kept ones."""
    index = torch.full(factor.shape, -1, dtype=torch.int32, device=factor.device)
    index[: kept.numel()] = kept.int()
    scale, offset = (None if v is None else torch.where(factor > 0, v * factor, 0.0) for v in (q.scale, q.offset))
    assert scale is not None
    return QTensor(q.codes, scale, offset, index, q.format, q.shape)


def encode(
    rows_GE: Tensor,
    format: Format,
    inverse: Tensor,
    offset: Tensor | None,
    numbers: Tensor,
    key: Tensor | None,
    stream: int,
) -> Tensor:
    """Codes, (G, E) float32 holding integers (float64 above 24 bits; the float8 grids: their values).

    Args:
        numbers: (G,) int64, the groups' numbers, which the random numbers go by.
        key: None rounds to nearest, ties to even; else stochastic rounding draws with it.
    """
    if format.grid == "sign":
        return torch.where(rows_GE >= 0, 1.0, -1.0)
    shifted = rows_GE if offset is None else rows_GE - offset.unsqueeze(1)
    y = (shifted.double() if format.bits > 24 else shifted) * inverse.unsqueeze(1)
    y = y.clamp_(*format.code_range)
    step = _float8_step(y, format.grid) if format.grid in FLOAT8_MAX else None
    y = y if step is None else y / step  # a power of two: exact
    if key is None:
        codes = y.round()
    else:
        below = y.floor()
        codes = below + (uniform_u24(numbers, y.shape[1], key, stream) < (y - below).mul_(_ONE))
    return codes if step is None else codes * step


def _float8_step(y: Tensor, grid: str) -> Tensor:
    """Distance of neighbours on a float8 grid around y."""
    exponent = torch.frexp(y).exponent - 1
    smallest = torch.full_like(exponent, _FLOAT8_MIN_EXPONENT[grid])
    return torch.ldexp(torch.ones_like(y), torch.maximum(exponent, smallest) - _FLOAT8_MANTISSA_BITS[grid])


# --- packed codes ----------------------------------------------------------------------------------------------------


def _stored(codes_GE: Tensor, format: Format, scale: Tensor) -> Tensor:
    """Codes as the integers that are stored: bit 1 = +1 for sign, else two's complement in `storage_bits` bits."""
    bad = scale.isnan().unsqueeze(1)
    if bool(bad.any()):
        codes_GE = codes_GE.masked_fill(bad, 0.0)
    if format.grid == "sign":
        return (codes_GE > 0).to(torch.uint8)
    if format.grid in FLOAT8_MAX:
        return codes_GE.to(_FLOAT8_DTYPE[format.grid]).view(torch.uint8)
    bits = format.storage_bits
    if bits > 8:
        return codes_GE.to(torch.int64).to(codes_dtype(format))
    if format.grid == "uint":
        return codes_GE.to(torch.uint8)
    return (codes_GE.to(torch.int32) & (2**bits - 1)).to(torch.uint8)


def pack(stored_GE: Tensor, format: Format, shape: Shape3) -> Tensor:
    """(G, E) stored integers to `format.packed_shape(shape)`, the first code in the lowest bits of its byte."""
    bits = format.storage_bits
    packed_shape = format.packed_shape(shape)
    last = shape[0] * shape[1] if format.axes == "C" else format.rows(shape)[2]
    codes = stored_GE.reshape(*packed_shape[:2], last)
    if bits >= 8:
        return codes.contiguous()
    lanes = 8 // bits
    lane = F.pad(codes, (0, -last % lanes)).reshape(*packed_shape, lanes)
    packed = lane[..., 0].clone(memory_format=torch.contiguous_format)
    for i in range(1, lanes):
        packed |= lane[..., i] << (i * bits)
    return packed


def unpack(codes: Tensor, format: Format, shape: Shape3) -> Tensor:
    """Packed codes to (N, P, C) float32 (float64 above 24 bits), a view of what is stored channel-major."""
    if format.storage_bits > 8:
        codes = codes.int() & 0xFFFF if format.grid == "uint" else codes  # 16-bit codes fill int16's sign bit
        values = codes.to(torch.float64 if format.bits > 24 else torch.float32)
    else:
        values = F.embedding(codes.int(), _byte_table(format, codes.device)).flatten(-2)
    a, b, c = format.rows(shape)
    values = values[..., : b * c if format.axes == "C" else c].reshape(a, b, c)
    return values.permute(1, 2, 0) if format.channel_major else values


def _byte_table(format: Format, device: torch.device) -> Tensor:
    """(256, codes a byte) float32: the codes that each byte holds."""
    bits = format.storage_bits
    byte = torch.arange(256, device=device)
    if format.grid in FLOAT8_MAX:
        return byte.to(torch.uint8).view(_FLOAT8_DTYPE[format.grid]).float().unsqueeze(1)
    lane = (byte.unsqueeze(1) >> torch.arange(0, 8, bits, device=device)) & (2**bits - 1)
    if format.grid == "sign":
        return (2 * lane - 1).float()
    negative = (lane >= 2 ** (bits - 1)) & (format.grid != "uint")
    return torch.where(negative, lane - 2**bits, lane).float()


def decode(q: QTensor) -> Tensor:
    """Values, (N, P, C) float32 contiguous: `scale * code + offset`, in that order."""
    values = unpack(q.codes, q.format, q.shape) * spread(q.scale, q)
    if q.offset is not None:
        values = values + spread(q.offset, q)
    return values.float().contiguous()


def spread(scale_G: Tensor, q: QTensor) -> Tensor:
    """A value for each group as a tensor that broadcasts against (N, P, C)."""
    n, p, c = q.shape
    if q.format.axes == "NC":
        return scale_G.view(c, n).T.unsqueeze(1)
    shapes = {"": (1, 1, 1), "N": (n, 1, 1), "O": (n, 1, 1), "NP": (n, p, 1), "C": (1, 1, c)}
    return scale_G.view(shapes[q.format.axes])


def pass_mask(x_NPC: Tensor, low: float, high: float) -> Tensor:
    """Where the clipped straight-through estimator passes the gradient, low <= x <= high: (N, P, ceil(C/8)) uint8 bits."""
    bit = Format("sign", 1)
    x_NPC = x_NPC.float()  # else the limits would be rounded to a narrower dtype
    inside = ((x_NPC >= low) & (x_NPC <= high)).to(torch.uint8)
    return pack(inside, bit, (inside.shape[0], inside.shape[1], inside.shape[2]))


def apply_mask(g_NPC: Tensor, mask: Tensor) -> Tensor:
    """`g_NPC` where the mask of `pass_mask` is set, 0 elsewhere."""
    shape = (g_NPC.shape[0], g_NPC.shape[1], g_NPC.shape[2])
    return torch.where(unpack(mask, Format("sign", 1), shape) > 0, g_NPC, 0.0)


# --- the three products ----------------------------------------------------------------------------------------------


def output(x: QTensor, w: QTensor, bias: Tensor | None, geometry: Geometry | None) -> Tensor:
    """Y = X * W, (N, P', O) float32. x's scale: tensor, sample (linear layers: token); w's: tensor or channel."""
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
    narrow = not any(q.format.grid in FLOAT8_MAX or q.format.bits > 8 for q in (first, second))
    # without oneDNN a convolution may be NNPACK's Winograd, whose transforms are not exact
    narrow = narrow and bound < _ONE and a.device.type == "cpu" and _onednn()
    dtype = torch.float32 if narrow else torch.float64
    return a.to(dtype), b.to(dtype)


# --- the same products of plain tensors ------------------------------------------------------------------------------


def multiply_output(x_NPC: Tensor, w_OKI: Tensor, geometry: Geometry | None) -> Tensor:
    """Sum over the window and the input channels of a group, (N, P', O)."""
    if geometry is None:
        return x_NPC @ w_OKI[:, 0].T
    y_NOHW = F.conv2d(
        geometry.operand(x_NPC), geometry.window(w_OKI), None, geometry.stride, geometry.own_padding, geometry.dilation,
        geometry.groups,
    )  # fmt: skip
    return y_NOHW.permute(0, 2, 3, 1).flatten(1, 2)


def multiply_grad_input(g_NPO: Tensor, w_OKI: Tensor, channels: int, geometry: Geometry | None) -> Tensor:
    """Sum over the output channels of a group and the window, (N, P, C) with C = `channels`."""
    if geometry is None:
        return g_NPO @ w_OKI[:, 0]
    samples, positions = g_NPO.shape[0], geometry.height * geometry.width
    like = geometry.operand(g_NPO.new_empty(1, 1, 1).expand(samples, positions, channels))
    padding = geometry.own_padding
    grad, _, _ = torch.ops.aten.convolution_backward(
        geometry.gradient(g_NPO), like, geometry.window(w_OKI), None, geometry.stride, padding, geometry.dilation, False,
        (0, 0), geometry.groups, (True, False, False),
    )  # fmt: skip
    return geometry.crop(grad)


def multiply_grad_weight(g_NPO: Tensor, x_NPC: Tensor, geometry: Geometry | None) -> Tensor:
    """Sum over samples and positions, (O, K, I)."""
    if geometry is None:
        return (g_NPO.flatten(0, 1).T @ x_NPC.flatten(0, 1)).unsqueeze(1)
    if geometry.kernel == (1, 1):
        image = geometry.image(x_NPC)
        # not by convolution_backward: oneDNN's, of 1x1 windows with unequal strides, writes beyond its memory
        groups, (sh, sw), (height, width) = geometry.groups, geometry.stride, geometry.output_size
        terms, channels = g_NPO.shape[0] * g_NPO.shape[1], g_NPO.shape[2]
        met = image[:, :, ::sh, ::sw][:, :, :height, :width].permute(1, 0, 2, 3)
        columns = met.reshape(groups, x_NPC.shape[2] // groups, terms).transpose(1, 2)
        return (g_NPO.permute(2, 0, 1).reshape(groups, channels // groups, terms) @ columns).view(channels, 1, -1)
    like = x_NPC.new_empty(1).expand(g_NPO.shape[2], x_NPC.shape[2] // geometry.groups, *geometry.kernel)
    padding = geometry.own_padding
    _, grad, _ = torch.ops.aten.convolution_backward(
        geometry.gradient(g_NPO), geometry.operand(x_NPC), like, None, geometry.stride, padding, geometry.dilation, False,
        (0, 0), geometry.groups, (False, True, False),
    )  # fmt: skip
    return grad.flatten(2).transpose(1, 2)


def multiply_grad_weight_of_samples(g_NPO: Tensor, x_NPC: Tensor, geometry: Geometry | None) -> Tensor:
    """Sum over positions alone, (N, O, K, I)."""
    if geometry is None:
        return (g_NPO.transpose(1, 2) @ x_NPC).unsqueeze(2)
    samples, positions, channels = g_NPO.shape
    groups, (kh, kw) = geometry.groups, geometry.kernel
    padded_NHWC = geometry.image(x_NPC).permute(0, 2, 3, 1).contiguous()
    sn, sh, sw, sc = padded_NHWC.stride()
    window = (kh, kw, padded_NHWC.shape[3])
    strides = (sh * geometry.dilation[0], sw * geometry.dilation[1], sc)
    windows = padded_NHWC.as_strided(
        (samples, *geometry.output_size, *window),
        (sn, sh * geometry.stride[0], sw * geometry.stride[1], *strides),
    )
    columns = windows.reshape(samples, positions, kh * kw, groups, -1).permute(0, 3, 1, 2, 4).flatten(3)
    rows = g_NPO.transpose(1, 2).reshape(samples, groups, channels // groups, positions)
    return (rows @ columns).view(samples, channels, kh * kw, -1)
