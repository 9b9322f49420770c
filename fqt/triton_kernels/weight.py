"""grad_weight: products that sum over samples and positions, m x n x k with the channels of g, taps and channels of x, pixels.

Where g's scale is constant over the sum (one, or one a channel) `_sums` adds integers: the pixels are cut among programs, which
add to one sum (integers, so in any order), and `_finish` makes floats of it. Where g's scale is the sample's, `_blocks` does
both within a sample and adds the samples in ascending order; where tiles are few the samples are worked off side by side, their
terms written down, and `_add` adds those in order.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fqt import reference
from fqt.geometry import Geometry
from fqt.qtensor import QTensor
from fqt.triton_kernels import plan
from fqt.triton_kernels.codes import dequantized, expanded, load_codes
from fqt.triton_kernels.launch import capability, fitted, launch


@triton.jit
def _place(columns, channels, N: tl.constexpr, M: tl.constexpr):
    """Of a program: its rows of g within a conv group; the tap, columns and channels of x."""
    c_tiles = tl.cdiv(channels, N)
    n_tiles = columns // channels * c_tiles
    m = tl.program_id(0) // n_tiles * M + tl.arange(0, M)
    tile = tl.program_id(0) % n_tiles
    tap = tile // c_tiles
    c = tile % c_tiles * N + tl.arange(0, N)
    return m, tap, c


@triton.jit
def _multiplied(
    g_ptr, x_ptr, g_at, g_ok, channel, c_ok, image, begin, end, tap, x_row, positions, width, x_height, x_width,
    kw, sh, sw, top, left, dh, dw,
    WINDOW: tl.constexpr, G_GRID: tl.constexpr, G_BITS: tl.constexpr, WIDE: tl.constexpr, FLOAT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Sum over pixels begin .. end, (M, N). x is (C, pixels), or under a WINDOW (pixels, C); its first pixel is `image`.

    Pixels of g are counted through its samples, `positions` each; row `i` of the tile begins with pixel 0 at byte g_at[i].
    """
    if FLOAT:
        total = tl.zeros((M, N), tl.float32)
    elif WIDE:
        total = tl.zeros((M, N), tl.int64)
    else:
        total = tl.zeros((M, N), tl.int32)
    for k in range(begin, end, K):
        g = load_codes(g_ptr, g_at, g_ok, k, end, G_GRID, G_BITS, M, K)
        if WINDOW:
            p = k + tl.arange(0, K)
            h = p % positions // width * sh - top + tap // kw * dh
            w = p % positions % width * sw - left + tap % kw * dw
            inside = (p < end) & (h >= 0) & (h < x_height) & (w >= 0) & (w < x_width)
            pixel = image + (p // positions).to(tl.int64) * (x_height * x_width) + tl.where(inside, h * x_width + w, 0)
            at = pixel[:, None] * x_row + channel[None, :]
            x = tl.load(x_ptr + at, mask=inside[:, None] & c_ok[None, :], other=0.0)
        else:
            x = tl.trans(load_codes(x_ptr, channel.to(tl.int64) * x_row + image, c_ok, k, end, "int", 8, N, K))
        if FLOAT:
            total = tl.dot(g, x, total, max_num_imprecise_acc=K, out_dtype=tl.float32)
        elif WIDE:
            total += tl.dot(g, x, out_dtype=tl.int32).to(tl.int64)
        else:
            total = tl.dot(g, x, total, out_dtype=tl.int32)
    return total


@triton.jit
def _sums(
    g_ptr, x_ptr, sums_ptr, index_ptr, outputs, channels, columns, terms, chunk, g_row, x_row, positions, width,
    x_height, x_width, kw, sh, sw, top, left, dh, dw,
    WINDOW: tl.constexpr, GATHER: tl.constexpr, ALONE: tl.constexpr, G_GRID: tl.constexpr, G_BITS: tl.constexpr,
    WIDE: tl.constexpr, FLOAT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A chunk of the pixels, added to sums (O, K, I), which begin at 0; or, ALONE, written there.

    outputs, channels: of a conv group.
    """
    m, tap, c = _place(columns, channels, N, M)
    m_ok = m < outputs
    o = tl.program_id(1) * outputs + m
    if GATHER:  # the kept channels come first, then -1
        o = tl.load(index_ptr + m, mask=m_ok, other=-1)
        m_ok = o >= 0
        if tl.max(o, axis=0) < 0:
            return
        o = tl.where(m_ok, o, 0)
    begin = tl.program_id(2) * chunk
    end = tl.minimum(begin + chunk, terms)
    total = _multiplied(
        g_ptr, x_ptr, o.to(tl.int64) * g_row, m_ok, tl.program_id(1) * channels + c, c < channels, 0, begin, end, tap, x_row,
        positions, width, x_height, x_width, kw, sh, sw, top, left, dh, dw, WINDOW, G_GRID, G_BITS, False, FLOAT, M, N, K,
    )  # fmt: skip
    at = o.to(tl.int64)[:, None] * columns + (tap * channels + c)[None, :]
    ok = m_ok[:, None] & (c < channels)[None, :]
    # Relaxed order is enough for additions: no program of this launch reads the sums, and the next launch sees them all.
    if ALONE:  # The sum is one chunk, so no other program writes these elements.
        tl.store(sums_ptr + at, total.to(sums_ptr.dtype.element_ty), mask=ok)
    elif WIDE:
        tl.atomic_add(sums_ptr + at, total.to(tl.int64), mask=ok, sem="relaxed")
    else:
        tl.atomic_add(sums_ptr + at, total, mask=ok, sem="relaxed")


@triton.jit
def _finish(
    sums_ptr, y_ptr, g_scale_ptr, x_scale_ptr, g_offset_ptr, x_offset_ptr, g_sums_ptr, x_sums_ptr, terms_ptr, index_ptr,
    rows, outputs, channels, columns,
    GATHER: tl.constexpr, G_AXES: tl.constexpr, G_OFFSET: tl.constexpr, G_CENTRE: tl.constexpr,
    X_OFFSET: tl.constexpr, X_CENTRE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums (O, K, I) to floats. g_sums: (O, K), x_sums: (K, C), terms: (K,) int64, over the pixels that a tap meets."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_ok = m < rows
    o = m
    if GATHER:
        o = tl.load(index_ptr + m, mask=m_ok, other=-1)
        m_ok = o >= 0
        o = tl.where(m_ok, o, 0)
    ok = m_ok[:, None] & (n < columns)[None, :]
    tap = (n // channels)[None, :]
    taps = columns // channels
    channel = (o // outputs * channels)[:, None] + (n % channels)[None, :]
    at = o.to(tl.int64)[:, None] * columns + n[None, :]
    total = tl.load(sums_ptr + at, mask=ok, other=0)
    g_sum = tl.zeros((ROWS, COLUMNS), tl.int64)
    x_sum = tl.zeros((ROWS, COLUMNS), tl.int64)
    terms = tl.zeros((1, COLUMNS), tl.int64)
    if X_OFFSET or X_CENTRE:
        g_sum = tl.load(g_sums_ptr + o[:, None] * taps + tap, mask=ok, other=0)
    if G_OFFSET or G_CENTRE:
        x_sum = tl.load(x_sums_ptr + tap * (rows // outputs * channels) + channel, mask=ok, other=0)
    if (X_OFFSET or X_CENTRE) and (G_OFFSET or G_CENTRE):
        terms = tl.load(terms_ptr + tap, mask=(n < columns)[None, :], other=0)
    g_at = o if G_AXES == "C" else tl.zeros_like(o)
    g_scale = tl.load(g_scale_ptr + g_at, mask=m_ok, other=0.0)[:, None]
    x_scale = tl.load(x_scale_ptr)
    g_offset = g_scale
    x_offset = x_scale
    if G_OFFSET:
        g_offset = tl.load(g_offset_ptr + g_at, mask=m_ok, other=0.0)[:, None]
    if X_OFFSET:
        x_offset = tl.load(x_offset_ptr)
    y = dequantized(total, g_sum, x_sum, terms, g_scale, x_scale, g_offset, x_offset, G_OFFSET, X_OFFSET, G_CENTRE, X_CENTRE)
    tl.store(y_ptr + at, y, mask=ok)


@triton.jit
def _blocks(
    g_ptr, x_ptr, y_ptr, g_scale_ptr, x_scale_ptr, g_offset_ptr, x_offset_ptr, g_sums_ptr, x_sums_ptr, terms_ptr, index_ptr,
    samples, outputs, channels, columns, g_row, g_sample, x_row, positions, width, x_positions, x_height, x_width,
    kw, sh, sw, top, left, dh, dw,
    WINDOW: tl.constexpr, GATHER: tl.constexpr, APART: tl.constexpr, G_AXES: tl.constexpr, G_GRID: tl.constexpr,
    G_BITS: tl.constexpr, G_OFFSET: tl.constexpr, G_CENTRE: tl.constexpr, X_OFFSET: tl.constexpr, X_CENTRE: tl.constexpr,
    WIDE: tl.constexpr, FLOAT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A tile of y (O, K, I), samples in ascending order; or APART, of one sample's term (samples, O, K, I)."""
    m, tap, c = _place(columns, channels, N, M)
    m_ok = m < outputs
    c_ok = c < channels
    ok = m_ok[:, None] & c_ok[None, :]
    o = tl.program_id(1) * outputs + m
    channel = tl.program_id(1) * channels + c
    taps = columns // channels
    all_outputs = outputs * tl.num_programs(1)
    all_channels = channels * tl.num_programs(1)
    y_at = o.to(tl.int64)[:, None] * columns + (tap * channels + c)[None, :]
    y = tl.zeros((M, N), tl.float32)
    x_scale = tl.load(x_scale_ptr)
    first = tl.program_id(2)
    last = first + 1 if APART else samples
    for j in range(first, last):
        sample = tl.zeros((), tl.int32) + j
        if GATHER:  # the kept samples come first, then -1
            sample = tl.load(index_ptr + j)
        if sample >= 0:
            total = _multiplied(
                g_ptr, x_ptr, o.to(tl.int64) * g_row + sample.to(tl.int64) * g_sample, m_ok, channel, c_ok,
                sample.to(tl.int64) * x_positions, 0, positions, tap, x_row, positions, width, x_height, x_width,
                kw, sh, sw, top, left, dh, dw, WINDOW, G_GRID, G_BITS, WIDE, FLOAT, M, N, K,
            )  # fmt: skip
            g_sum = tl.zeros((M, 1), tl.int64)
            x_sum = tl.zeros((1, N), tl.int64)
            terms = tl.zeros((), tl.int64)
            if X_OFFSET or X_CENTRE:
                at = (sample.to(tl.int64) * all_outputs + o) * taps + tap
                g_sum = tl.load(g_sums_ptr + at, mask=m_ok, other=0)[:, None]
            if G_OFFSET or G_CENTRE:
                at = (sample.to(tl.int64) * taps + tap) * all_channels + channel
                x_sum = tl.load(x_sums_ptr + at, mask=c_ok, other=0)[None, :]
            if (X_OFFSET or X_CENTRE) and (G_OFFSET or G_CENTRE):
                terms = tl.load(terms_ptr + tap)
            g_at = o * samples + sample if G_AXES == "NC" else tl.zeros_like(o) + sample
            g_scale = tl.load(g_scale_ptr + g_at, mask=m_ok, other=0.0)[:, None]
            g_offset = g_scale
            x_offset = x_scale
            if G_OFFSET:
                g_offset = tl.load(g_offset_ptr + g_at, mask=m_ok, other=0.0)[:, None]
            if X_OFFSET:
                x_offset = tl.load(x_offset_ptr)
            y += dequantized(
                total, g_sum, x_sum, terms, g_scale, x_scale, g_offset, x_offset, G_OFFSET, X_OFFSET, G_CENTRE, X_CENTRE
            )  # fmt: skip
    if APART:
        y_at += first.to(tl.int64) * all_outputs * columns
    tl.store(y_ptr + y_at, y, mask=ok)


@triton.jit
def _add(terms_ptr, y_ptr, index_ptr, samples, size, GATHER: tl.constexpr, BLOCK: tl.constexpr):
    """The terms of the samples (samples, size), in ascending order; with an index only those of kept ones."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros((BLOCK,), tl.float32)
    for j in range(samples):
        term = tl.load(terms_ptr + (tl.zeros((), tl.int64) + j) * size + e, mask=e < size, other=0.0)
        if GATHER:
            y = tl.where(tl.load(index_ptr + j) >= 0, y + term, y)
        else:
            y += term
    tl.store(y_ptr + e, y, mask=e < size)


def grad_weight(g: QTensor, x: QTensor, geometry: Geometry | None, *, rules: plan.Rules = plan.RULES) -> Tensor:
    """As `fqt.reference.grad_weight`. Pruned samples, or channels, are not multiplied."""
    n, positions, all_outputs = g.shape
    if 0 in (*g.shape, *x.shape):  # nothing to launch
        return reference.grad_weight(g, x, geometry)
    window = geometry or Geometry(positions, 1, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
    taps, groups = window.kernel[0] * window.kernel[1], window.groups
    outputs, channels = all_outputs // groups, x.shape[2] // groups
    blocks, linear, is_float = "N" in g.format.axes, plan.is_linear(window), g.format.is_float
    gathered = g.index is not None and (g.format.axes == "N" or (g.format.axes == "C" and groups == 1))
    terms = positions if blocks else n * positions
    device, rules = g.codes.device, fitted(rules, g.codes)
    wide = plan.bound(terms, g.format, x.format) >= rules.wide
    cuts = n if blocks else plan.ceil_div(terms, 1024)  # into which the sum may be cut
    holds = "wide" if blocks and wide else "added"  # chunks of one sum are cut such that 32 bits hold each
    t = rules.tile(outputs, channels, terms, capability(g.codes), groups * taps * cuts, turned=not linear, holds=holds)
    tiles = plan.ceil_div(outputs, t.m) * taps * plan.ceil_div(channels, t.n)

    x_codes = expanded(x, (2, 0, 1) if linear else (0, 1, 2))
    need_g, need_x = _shifted(x), _shifted(g)
    if need_g or g.format.grouping.in_order or rules.expands(g.format, taps * plan.ceil_div(channels, t.n), groups):
        g_codes, g_bits, g_sample = expanded(g, (2, 0, 1)), 8, positions
        g_row = n * positions
    else:
        g_codes, g_bits = g.codes, g.format.storage_bits
        g_row, g_sample = g_codes.stride(0), g_codes.shape[-1]
    nothing = g.scale
    g_sums = _g_sums(g_codes, g, window, blocks) if need_g else nothing
    x_sums = _x_sums(x_codes, x, window, blocks) if need_x else nothing
    counts = _terms(window, device) * (1 if blocks else n) if need_g and need_x else nothing
    offsets = (nothing if g.offset is None else g.offset, nothing if x.offset is None else x.offset)
    index = g.index if gathered else nothing
    lie = (*_x_lie(x_codes, linear), positions, window.output_size[1])
    where = (
        window.height, window.width, window.kernel[1], *window.stride, window.padding[0], window.padding[2], *window.dilation
    )  # fmt: skip
    meaning = {
        "GATHER": gathered, "G_AXES": g.format.axes, "G_OFFSET": g.offset is not None, "G_CENTRE": plan.centre(g.format),
        "X_OFFSET": x.offset is not None, "X_CENTRE": plan.centre(x.format),
    }  # fmt: skip
    how = {
        "WINDOW": not linear, "G_GRID": g.format.grid, "G_BITS": g_bits, "FLOAT": is_float,
        "WIDE": wide, "M": t.m, "N": t.n, "K": t.k,
        "warps": t.warps, "stages": t.stages,
    }  # fmt: skip
    shape = (all_outputs, taps, channels)
    if blocks:
        apart = rules.samples_apart(tiles * groups, n, all_outputs * taps * channels)
        y = torch.empty((n, *shape) if apart else shape, dtype=torch.float32, device=device)
        launch(
            _blocks, (tiles, groups, n if apart else 1), g_codes, x_codes, y, g.scale, x.scale, *offsets, g_sums, x_sums,
            counts, index, n, outputs, channels, taps * channels, g_row, g_sample, *lie, x.shape[1], *where,
            APART=apart, **meaning, **how,
        )  # fmt: skip
        if not apart:
            return y
        added = torch.empty(shape, dtype=torch.float32, device=device)
        launch(_add, (plan.ceil_div(added.numel(), 1024),), y, added, index, n, added.numel(), GATHER=gathered, BLOCK=1024)
        return added

    cut = rules.split(tiles * groups, terms, t, g.format, x.format) if not is_float else plan.Split(terms, 1)
    dtype = torch.float32 if is_float else torch.int64 if how["WIDE"] else torch.int32
    alone = cut.splits == 1
    sums = (torch.empty if alone else torch.zeros)(shape, dtype=dtype, device=device)  # of pruned channels nothing is read
    launch(
        _sums, (tiles, groups, cut.splits), g_codes, x_codes, sums, index, outputs, channels, taps * channels, terms, cut.chunk,
        g_row, *lie, *where, GATHER=gathered, ALONE=alone, **how,
    )  # fmt: skip
    y = (torch.zeros if gathered else torch.empty)(shape, dtype=torch.float32, device=device)
    launch(
        _finish, (plan.ceil_div(all_outputs, 16), plan.ceil_div(taps * channels, 128)), sums, y, g.scale, x.scale, *offsets,
        g_sums, x_sums, counts, index, all_outputs, outputs, channels, taps * channels, **meaning, ROWS=16, COLUMNS=128,
    )  # fmt: skip
    return y


def _shifted(q: QTensor) -> bool:
    """Whether the product needs sums of the other operand's codes."""
    return q.offset is not None or plan.centre(q.format) != 0


def _x_lie(x_codes: Tensor, linear: bool) -> tuple[int]:
    """Bytes from one row of x to the next: rows are channels, or pixels."""
    return (x_codes.shape[1] * x_codes.shape[2],) if linear else (x_codes.shape[2],)


def _inside(window: Geometry, device: torch.device) -> tuple[Tensor, Tensor]:
    """Whether a tap meets the image, by rows (kh, H') and by columns (kw, W') of the output, float64."""
    sizes = zip(
        window.kernel, window.output_size, window.stride, window.padding[::2], window.dilation, (window.height, window.width),
        strict=True,
    )  # fmt: skip
    found = []
    for kernel, outputs, stride, padding, dilation, size in sizes:
        tap, at = torch.arange(kernel, device=device), torch.arange(outputs, device=device)
        pixel = at * stride - padding + tap.unsqueeze(1) * dilation
        found.append(((pixel >= 0) & (pixel < size)).double())
    return found[0], found[1]


def _terms(window: Geometry, device: torch.device) -> Tensor:
    """(K,) int64: how many pixels of a sample a tap meets."""
    rows, columns = _inside(window, device)
    return (rows.sum(1).unsqueeze(1) * columns.sum(1)).long().flatten()


def _g_sums(g_codes: Tensor, g: QTensor, window: Geometry, blocks: bool) -> Tensor:
    """Sums of g's codes over the pixels that each tap meets: (O, K) int64, or (N, O, K) of each sample."""
    n, positions, outputs = g.shape
    taps = window.kernel[0] * window.kernel[1]
    whole = g_codes.view(outputs, n, positions)
    whole = whole.transpose(0, 1).double() if blocks else whole.sum(1, dtype=torch.int64).double().unsqueeze(0)
    rows, columns = _inside(window, g_codes.device)
    image = whole.reshape(-1, *window.output_size)
    sums = (rows @ image @ columns.T).long().view(-1, outputs, taps)  # exact: integers below 2^53
    return (sums + plan.centre(g.format) * _terms(window, g_codes.device) * (1 if blocks else n)).contiguous()


def _x_sums(x_codes: Tensor, x: QTensor, window: Geometry, blocks: bool) -> Tensor:
    """Sums of x's codes over the pixels that each tap meets: (K, C) int64, or (N, K, C) of each sample."""
    n, _, channels = x.shape
    taps = window.kernel[0] * window.kernel[1]
    if plan.is_linear(window):
        sums = x_codes.sum(2, dtype=torch.int64).t() if blocks else x_codes.sum((1, 2), dtype=torch.int64)
        sums = sums.reshape(-1, 1, channels)
    else:
        images = x_codes if blocks else x_codes.sum(0, keepdim=True, dtype=torch.int32)
        top, bottom, left, right = window.padding
        padded = F.pad(images.view(-1, window.height, window.width, channels), (0, 0, left, right, top, bottom))
        sn, sh, sw, sc = padded.stride()
        (dh, dw), (ah, aw) = window.dilation, window.stride
        windows = padded.as_strided(
            (padded.shape[0], *window.output_size, *window.kernel, channels), (sn, sh * ah, sw * aw, sh * dh, sw * dw, sc)
        )
        sums = windows.sum((1, 2), dtype=torch.int64).reshape(-1, taps, channels)
    return (sums + plan.centre(x.format) * (_terms(window, x_codes.device) * (1 if blocks else n)).unsqueeze(1)).contiguous()
