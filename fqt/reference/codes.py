"""How tensors are quantized, in plain PyTorch: the specification that every kernel equals, bit for bit.

quantize = fold -> calibrate -> prune -> encode -> pack. All arithmetic is float32, one rounding an operation, none fused:

    y = (x - offset) * inverse          inverse: one division a group (a division an element would flip rare codes)
    nearest:    code = y rounded, ties to even
    stochastic: code = k + (u24 < (y - k) * 2^24) with k = floor(y) and 24 random bits u24, an exact comparison

One rule for what is not finite: a group with a NaN, or whose range is infinite, gets scale NaN and stored bits 0, so it
decodes to NaN and the loss shows it; where the range is fixed beforehand (calibrate="none") infinities saturate like any
large value. A group whose range is below `MIN_RANGE` counts as constant: its scale is 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fqt.formats import GRIDS, Format, Grid
from fqt.philox import uniform_u24
from fqt.qtensor import QTensor, Scales
from fqt.reference.packing import pack, pass_mask, stored
from fqt.reference.pruning import ONE, keep_groups, kept_index

MIN_RANGE = 2.0**-100


def quantize(
    x_NPC: Tensor,
    format: Format,
    *,
    stochastic: bool = False,
    fold: Tensor | None = None,
    key: Tensor | None = None,
    stream: int = 0,
    pass_range: tuple[float, float] | None = None,
    **calibration: Any,
) -> tuple[QTensor, Tensor | None]:
    """`calibrate`, then `encode`.

    Args:
        stochastic: stochastic instead of nearest rounding; needs `key`.
        pass_range: of the clipped straight-through estimator; None passes every gradient.
        calibration: further arguments of `calibrate`.

    Returns:
        The codes, and the packed mask of `pass_mask` (None without `pass_range`).
    """
    mask = None if pass_range is None else pass_mask(x_NPC, *pass_range)
    scales = calibrate(x_NPC, format, fold=fold, key=key, stream=stream, **calibration)
    codes = encode(x_NPC, scales, format, fold=fold, key=key if stochastic else None, stream=stream)
    return scales.of(codes, format, (x_NPC.shape[0], x_NPC.shape[1], x_NPC.shape[2])), mask


def calibrate(
    x_NPC: Tensor,
    format: Format,
    *,
    calibrate: str,
    limits: tuple[float, float] = (-1.0, 1.0),
    prune: str = "",
    keep_one_in: int = 1,
    fold: Tensor | None = None,
    key: Tensor | None = None,
    stream: int = 0,
    ranges: tuple[Tensor, Tensor] | None = None,
) -> Scales:
    """What a tensor's groups are encoded with.

    Args:
        x_NPC: (N, P, C) or (O, K, I), any float dtype, any strides.
        calibrate: "absmax" (symmetric range), "minmax", "absmean" (scale = mean |x|; sign and ternary) or "none".
        limits: with calibrate="none", the values of the smallest and the largest code.
        prune: "" (nothing), "bernoulli" or "topk", see `keep_groups`.
        keep_one_in: b: pruning keeps one group in b.
        fold: broadcastable to x and multiplied into it first: the other operand's scale that cannot leave the product.
        key: () int64, the Philox key.
        stream: even; rounding draws from this stream, pruning from the next.
        ranges: what `group_range` would compute, (G,) float32 each, where the caller knows it.
    """
    rows_GE = group_rows(x_NPC.float() if fold is None else x_NPC.float() * fold, format)
    low, high = ranges or group_range(rows_GE)
    mean = absmean(rows_GE) if calibrate == "absmean" else None
    scale, inverse, offset = calibrate_groups(low, high, mean, format, calibrate, limits)
    if not prune:
        return Scales(scale, inverse, offset)
    kept, factor = keep_groups(low, high, prune, keep_one_in, key, stream + 1)
    return Scales(scale, inverse, offset, factor, kept_index(kept, factor.shape[0]))


def encode(
    x_NPC: Tensor,
    scales: Scales,
    format: Format,
    *,
    fold: Tensor | None = None,
    key: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """Packed codes of a tensor, of shape `format.packed_shape`.

    Args:
        x_NPC, fold: as in `calibrate`.
        key: None rounds to nearest, ties to even; else stochastic rounding draws with it.
        stream: even; from which the draws are taken.
    """
    shape = (x_NPC.shape[0], x_NPC.shape[1], x_NPC.shape[2])
    rows_GE = group_rows(x_NPC.float() if fold is None else x_NPC.float() * fold, format)
    kept = torch.arange(rows_GE.shape[0], device=rows_GE.device)
    if scales.index is not None:
        kept = scales.index[scales.index >= 0].long()
    offset = None if scales.offset is None else scales.offset[kept]
    codes_GE = round_rows(rows_GE[kept], format, scales.inverse[kept], offset, kept, key, stream)
    stored_GE = stored(codes_GE, format, scales.scale[kept])
    if scales.index is not None:
        stored_GE = stored_GE.new_zeros(rows_GE.shape).index_copy_(0, kept, stored_GE)
    return pack(stored_GE, format, shape)


def group_rows(x_NPC: Tensor, format: Format) -> Tensor:
    """(N, P, C) as (groups, elements of a group), in the order of `fqt.formats`."""
    shape = (x_NPC.shape[0], x_NPC.shape[1], x_NPC.shape[2])
    grouping = format.grouping
    groups = grouping.groups(shape)
    stored = x_NPC if grouping.in_order else x_NPC.permute(grouping.order)
    if grouping.block:
        together = grouping.together(shape)
        rows = stored.reshape(-1, together) if together else stored.new_empty(0, 0)
        stored = F.pad(rows, (0, -together % grouping.block))
    return stored.reshape(groups, x_NPC.numel() // max(groups, 1) if not grouping.block else grouping.block)


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


def round_rows(
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
    step = _float_step(y, GRIDS[format.grid]) if format.is_float else None
    y = y if step is None else y / step  # a power of two: exact
    if key is None:
        codes = y.round()
    else:
        below = y.floor()
        codes = below + (uniform_u24(numbers, y.shape[1], key, stream) < (y - below).mul_(ONE))
    return codes if step is None else codes * step


def _float_step(y: Tensor, grid: Grid) -> Tensor:
    """Distance of neighbours on a grid of small floats around y."""
    exponent = (torch.frexp(y).exponent - 1).clamp(min=1 - grid.bias)
    return torch.ldexp(torch.ones_like(y), exponent - grid.mantissa)
