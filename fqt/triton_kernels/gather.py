"""output, accumulate and grad_input: products that gather, for each pixel of the result, the pixels under a window.

An implicit matrix product, m x n x k: m counts the result's pixels, n the channels of a conv group, k the window's taps and
within each the channels that are summed. Both operands are read along k. A linear layer is a window of one pixel.
What a window adds outside the image is nothing: sums of codes, which offsets and centres need, are added over the taps inside.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fqt import reference
from fqt.formats import Shape3
from fqt.geometry import Geometry
from fqt.qtensor import QTensor
from fqt.triton_kernels import plan
from fqt.triton_kernels.codes import dequantized, expanded, load_codes
from fqt.triton_kernels.launch import capability, fitted, launch


@triton.jit
def _pixels(
    oh, ow, tap, a_height, a_width, kw, sh, sw, top, left, dh, dw, FORWARD: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """Under a tap of the window of pixels (oh, ow): the pixel of a's image, and whether it is inside."""
    if not WINDOW:
        pixel = oh * a_width + ow
        inside = ow < a_width
    else:
        if FORWARD:
            h = oh * sh - top + (tap // kw) * dh
            w = ow * sw - left + (tap % kw) * dw
            inside = (h >= 0) & (h < a_height) & (w >= 0) & (w < a_width)
        else:
            h = oh + top - (tap // kw) * dh
            w = ow + left - (tap % kw) * dw
            inside = (h >= 0) & (w >= 0)
            h = tl.where(inside, h, 0)
            w = tl.where(inside, w, 0)
            inside = inside & (h % sh == 0) & (w % sw == 0)
            h = h // sh
            w = w // sw
            inside = inside & (h < a_height) & (w < a_width)
        pixel = tl.where(inside, h * a_width + w, 0)
    return pixel, inside


@triton.jit
def _inside_sums(
    sums_ptr, out_ptr, y_height, y_width, columns, taps, a_height, a_width, kw, sh, sw, top, left, dh, dw,
    FORWARD: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Sums of b's codes (columns, taps) over the taps that are inside the image, by pixel: (positions, columns)."""
    p = tl.program_id(0) * P + tl.arange(0, P)
    n = tl.program_id(1) * N + tl.arange(0, N)
    total = tl.zeros((P, N), tl.int32)
    for tap in range(taps):
        _, inside = _pixels(
            p // y_width, p % y_width, tap, a_height, a_width, kw, sh, sw, top, left, dh, dw, FORWARD, True
        )  # fmt: skip
        sums = tl.load(sums_ptr + n * taps + tap, mask=n < columns, other=0)
        total += tl.where(inside[:, None], sums[None, :], 0)
    ok = (p < y_height * y_width)[:, None] & (n < columns)[None, :]
    tl.store(out_ptr + p.to(tl.int64)[:, None] * columns + n[None, :], total, mask=ok)


@triton.jit
def _gather(
    a_ptr, b_ptr, y_ptr, a_scale_ptr, b_scale_ptr, a_offset_ptr, b_offset_ptr, a_sums_ptr, b_sums_ptr, bias_ptr, mask_ptr,
    index_ptr, samples, y_height, y_width, columns, depth, a_row, a_group, b_row, mask_row,
    a_height, a_width, taps, kw, sh, sw, top, left, dh, dw,
    FORWARD: tl.constexpr, WINDOW: tl.constexpr, GATHER: tl.constexpr, STORE: tl.constexpr,
    A_GRID: tl.constexpr, A_BITS: tl.constexpr, A_AXES: tl.constexpr, A_OFFSET: tl.constexpr, A_CENTRE: tl.constexpr,
    B_GRID: tl.constexpr, B_BITS: tl.constexpr, B_AXES: tl.constexpr, B_OFFSET: tl.constexpr, B_CENTRE: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr, FLOAT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """A tile (M, N) of y. Rows of b are (conv group, column, tap), each `b_row` bytes of k on end."""
    positions = y_height * y_width
    m_tiles = tl.cdiv(samples * positions, M)
    n_tiles = tl.cdiv(columns, N)
    pid = tl.program_id(0)
    conv_group = tl.program_id(1)
    band = pid // (BAND * n_tiles) * BAND  # bands of rows, so that neighbours in time share what they read
    height = tl.minimum(m_tiles - band, BAND)
    m = (band + pid % (BAND * n_tiles) % height) * M + tl.arange(0, M)
    n = pid % (BAND * n_tiles) // height * N + tl.arange(0, N)
    sample = m // positions
    position = m % positions
    m_ok = m < samples * positions
    if GATHER:  # the kept samples come first, then -1
        sample = tl.load(index_ptr + sample, mask=m_ok, other=-1)
        m_ok = sample >= 0
        if tl.max(sample, axis=0) < 0:
            return
        sample = tl.where(m_ok, sample, 0)
    n_ok = n < columns
    oh = position // y_width
    ow = position % y_width
    column = conv_group * columns + n
    image = sample.to(tl.int64) * (a_height * a_width)

    if FLOAT:
        total = tl.zeros((M, N), tl.float32)
    elif WIDE:
        total = tl.zeros((M, N), tl.int64)
    else:
        total = tl.zeros((M, N), tl.int32)
    steps = tl.cdiv(depth, K)
    for step in range(taps * steps):
        tap = step // steps
        k = step % steps * K
        pixel, inside = _pixels(oh, ow, tap, a_height, a_width, kw, sh, sw, top, left, dh, dw, FORWARD, WINDOW)
        a_at = (image + pixel) * a_row + conv_group * a_group
        a = load_codes(a_ptr, a_at, m_ok & inside, k, depth, A_GRID, A_BITS, M, K)
        b_at = (column.to(tl.int64) * taps + tap) * b_row
        b = load_codes(b_ptr, b_at, n_ok, k, depth, B_GRID, B_BITS, N, K)
        if FLOAT:
            total = tl.dot(a, tl.trans(b), total, max_num_imprecise_acc=K, out_dtype=tl.float32)
        elif WIDE:
            total += tl.dot(a, tl.trans(b), out_dtype=tl.int32).to(tl.int64)
        else:
            total = tl.dot(a, tl.trans(b), total, out_dtype=tl.int32)

    row = sample.to(tl.int64) * positions + position if GATHER else m.to(tl.int64)  # the same, and nothing kept for it
    y_at = row[:, None] * (columns * tl.num_programs(1)) + column[None, :]
    ok = m_ok[:, None] & n_ok[None, :]
    if STORE == "sums":
        tl.store(y_ptr + y_at, total.to(tl.int16), mask=ok)
        return

    a_sum = tl.zeros((M, 1), tl.int32)
    b_sum = tl.zeros((1, N), tl.int32)
    terms = tl.zeros((M, 1), tl.int32)
    if B_OFFSET or B_CENTRE:
        for tap in range(taps):
            pixel, inside = _pixels(oh, ow, tap, a_height, a_width, kw, sh, sw, top, left, dh, dw, FORWARD, WINDOW)
            terms += tl.where(inside, depth, 0)[:, None]
            at = (image + pixel) * tl.num_programs(1) + conv_group
            a_sum += tl.load(a_sums_ptr + at, mask=m_ok & inside, other=0)[:, None]
    if A_OFFSET or A_CENTRE:
        if WINDOW:
            at = position.to(tl.int64)[:, None] * (columns * tl.num_programs(1)) + column[None, :]
            b_sum = tl.load(b_sums_ptr + at, mask=ok, other=0)
        else:
            b_sum = tl.load(b_sums_ptr + column, mask=n_ok, other=0)[None, :]

    a_at = sample if A_AXES == "N" else (sample * positions + position if A_AXES == "NP" else tl.zeros_like(sample))
    b_at = column if B_AXES == "O" else tl.zeros_like(column)
    a_scale = tl.load(a_scale_ptr + a_at, mask=m_ok, other=0.0)[:, None]
    b_scale = tl.load(b_scale_ptr + b_at, mask=n_ok, other=0.0)[None, :]
    a_offset = a_scale
    b_offset = b_scale
    if A_OFFSET:
        a_offset = tl.load(a_offset_ptr + a_at, mask=m_ok, other=0.0)[:, None]
    if B_OFFSET:
        b_offset = tl.load(b_offset_ptr + b_at, mask=n_ok, other=0.0)[None, :]
    y = dequantized(
        total, a_sum, b_sum, terms, a_scale, b_scale, a_offset, b_offset, A_OFFSET, B_OFFSET, A_CENTRE, B_CENTRE
    )  # fmt: skip
    if BIAS:
        y = y + tl.load(bias_ptr + column, mask=n_ok, other=0.0)[None, :]
    if MASK:
        mask_at = row[:, None] * mask_row + (column // 8)[None, :]
        bits = tl.load(mask_ptr + mask_at, mask=ok, other=0).to(tl.int32)
        y = tl.where((bits >> (column % 8)[None, :]) & 1 != 0, y, 0.0)
    tl.store(y_ptr + y_at, y, mask=ok)


def output(x: QTensor, w: QTensor, bias: Tensor | None, geometry: Geometry | None, *, rules: plan.Rules = plan.RULES) -> Tensor:
    """As `fqt.reference.output`."""
    if 0 in (*x.shape, *w.shape):  # nothing to launch
        return reference.output(x, w, bias, geometry)
    return _forward(x, w, bias, geometry, torch.float32, rules)


def accumulate(x: QTensor, w: QTensor, geometry: Geometry | None, *, rules: plan.Rules = plan.RULES) -> Tensor:
    """As `fqt.reference.accumulate`."""
    if 0 in (*x.shape, *w.shape):
        return reference.accumulate(x, w, geometry)
    return _forward(x, w, None, geometry, torch.int16, rules)


def _forward(
    x: QTensor, w: QTensor, bias: Tensor | None, geometry: Geometry | None, dtype: torch.dtype, rules: plan.Rules
) -> Tensor:
    n, positions, _ = x.shape
    window = geometry or _column(positions)
    height, width = window.output_size
    y = torch.empty(n, height * width, w.shape[0], dtype=dtype, device=x.codes.device)
    rows = n * height * width
    columns, taps, depth = w.shape[0] // window.groups, w.shape[1], w.shape[2]
    shifted, rules = _shifted(x, w), fitted(rules, y)
    wide = _wide(x, w, taps * depth, rules)
    t = rules.tile(rows, columns, depth, capability(y), window.groups, holds=_holds(x, shifted, window, wide))
    x_bytes = shifted > 0 or rules.expands(x.format, taps * plan.ceil_div(columns, t.n), window.groups)
    w_bytes = shifted > 0 or rules.expands(w.format, plan.ceil_div(rows, t.m), window.groups)
    bias = None if bias is None else bias.float().contiguous()
    a = expanded(x) if x_bytes else x.codes
    b = expanded(w) if w_bytes else w.codes
    _launch(x, w, a, b, y, bias, None, None, window, (height, width), (columns, taps, depth), t, rules, forward=True)
    return y


def grad_input(
    g: QTensor,
    w: QTensor,
    mask: Tensor | None,
    geometry: Geometry | None,
    x_shape: Shape3,
    *,
    rules: plan.Rules = plan.RULES,
) -> Tensor:
    """As `fqt.reference.grad_input`. Pruned samples are not multiplied."""
    if 0 in (*g.shape, *w.shape):
        return reference.grad_input(g, w, mask, geometry, x_shape)
    n, positions, channels = x_shape
    window = geometry or _column(positions)
    columns, taps, depth = channels // window.groups, w.shape[1], w.shape[0] // window.groups
    index = g.index if g.index is not None and g.format.axes == "N" else None
    make = torch.empty if index is None else torch.zeros
    grad = make(n, positions, channels, dtype=torch.float32, device=g.codes.device)
    shifted, rules = _shifted(g, w), fitted(rules, grad)
    holds = _holds(g, max(shifted, int(mask is not None)), window, _wide(g, w, taps * depth, rules))
    t = rules.tile(n * positions, columns, depth, capability(grad), window.groups, holds=holds)
    g_bytes = shifted > 0 or rules.expands(g.format, taps * plan.ceil_div(columns, t.n), window.groups)
    a = expanded(g) if g_bytes else g.codes
    if window.groups == 1:
        b = expanded(w, (2, 1, 0))  # (I, K, O): the summed channels on end
    else:
        grouped = expanded(w).view(window.groups, depth, taps, columns)
        b = grouped.permute(0, 3, 2, 1).contiguous()
    mask = None if mask is None else mask.contiguous()
    image = (window.height, window.width)
    _launch(g, w, a, b, grad, None, mask, index, window, image, (columns, taps, depth), t, rules, forward=False)
    return grad


def _shifted(a: QTensor, b: QTensor) -> int:
    """Of how many operands the offset or centre needs sums of the other's codes."""
    return sum(q.offset is not None or plan.centre(q.format) != 0 for q in (a, b))


def _wide(a: QTensor, b: QTensor, terms: int, rules: plan.Rules) -> bool:
    """Whether sums of so many terms are kept in 64 bits."""
    return plan.bound(terms, a.format, b.format) >= rules.wide


def _holds(a: QTensor, extras: int, window: Geometry, wide: bool) -> str:
    """See `plan.fits_registers`."""
    linear = plan.is_linear(window)
    if wide:
        return "wide"
    if extras == 0:
        return "" if linear and not a.format.is_float else "places"
    return "offset" if linear or extras == 1 else "offsets"


def _launch(
    a: QTensor, b: QTensor, a_codes: Tensor, b_codes: Tensor, y: Tensor, bias: Tensor | None, mask: Tensor | None,
    index: Tensor | None, window: Geometry, image: tuple[int, int], sizes: tuple[int, int, int], t: plan.Tile,
    rules: plan.Rules, *, forward: bool,
) -> None:  # fmt: skip
    columns, taps, depth = sizes
    groups = window.groups
    a_bytes, b_bytes = a_codes.dtype != torch.uint8, b_codes.dtype != torch.uint8
    a_bits = 8 if a_bytes else a.format.storage_bits
    b_bits = 8 if b_bytes else b.format.storage_bits
    a_size = window.output_size if not forward else (window.height, window.width)
    a_codes, b_codes = a_codes.contiguous(), b_codes.contiguous()
    where = (window.kernel[1], *window.stride, window.padding[0], window.padding[2], *window.dilation)
    a_sums = b_sums = a.scale
    if b.offset is not None or plan.centre(b.format):
        a_sums = a_codes.view(-1, groups, depth).sum(-1, dtype=torch.int32) + depth * plan.centre(a.format)
    if a.offset is not None or plan.centre(a.format):
        b_sums = b_codes.view(-1, depth).sum(-1, dtype=torch.int32) + depth * plan.centre(b.format)
        if not plan.is_linear(window):
            table = torch.empty(y.shape[1:], dtype=torch.int32, device=y.device)
            launch(
                _inside_sums, (plan.ceil_div(y.shape[1], 16), plan.ceil_div(y.shape[2], 128)), b_sums, table, *image,
                y.shape[2], taps, *a_size, *where, FORWARD=forward, P=16, N=128,
            )  # fmt: skip
            b_sums = table
    m_tiles, n_tiles = plan.ceil_div(y.shape[0] * y.shape[1], t.m), plan.ceil_div(columns, t.n)
    nothing = a.scale
    launch(
        _gather, (m_tiles * n_tiles, groups),
        a_codes, b_codes, y, a.scale, b.scale, nothing if a.offset is None else a.offset,
        nothing if b.offset is None else b.offset, a_sums, b_sums, nothing if bias is None else bias,
        nothing if mask is None else mask, nothing if index is None else index,
        y.shape[0], *image, columns, depth, a_codes.shape[-1], depth if groups > 1 else 0, b_codes.shape[-1],
        plan.ceil_div(y.shape[2], 8), *a_size, taps, *where,
        FORWARD=forward, WINDOW=not plan.is_linear(window), GATHER=index is not None,
        STORE="sums" if y.dtype == torch.int16 else "floats",
        A_GRID=a.format.grid, A_BITS=a_bits, A_AXES=a.format.axes, A_OFFSET=a.offset is not None,
        A_CENTRE=plan.centre(a.format), B_GRID=b.format.grid, B_BITS=b_bits, B_AXES=b.format.axes,
        B_OFFSET=b.offset is not None, B_CENTRE=plan.centre(b.format), BIAS=bias is not None, MASK=mask is not None,
        WIDE=_wide(a, b, taps * depth, rules),
        FLOAT=a.format.is_float, M=t.m, N=t.n, K=t.k, BAND=8, warps=t.warps, stages=t.stages,
    )  # fmt: skip


def _column(positions: int) -> Geometry:
    """A linear layer as a convolution: a window of one pixel over a column of positions."""
    return Geometry(positions, 1, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
