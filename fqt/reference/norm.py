"""The specification of batch normalization as 1-bit layers use it, in plain PyTorch; kernels equal it bit for bit.

Behind a BatchNorm (and max-pooling) a 1-bit layer reads two bits an element: the sign, and whether the estimator passes. So
neither the normalized tensor nor, behind a 1-bit convolution, its float output need exist. What is normalized is

    y = code * scale + offset       codes: int16 accumulators of a product, scale and offset by channel; or y is float

and then, every operation one float32 rounding, sums in float64, over blocks of `BLOCK_ROWS` rows (sample and position) in order
and over the blocks in order:

    mean = sum(y) / M;   var = sum(y * y) / M - mean^2, M rows
    inv = 1 / sqrt(var + eps) in float64;   a = gamma * inv;   b = beta - mean * a
    z = y * a + b, of which max-pooling takes the first largest of each window
    sign: z >= 0;   mask: low <= z <= high

    x = (y - mean) * inv;   dz = g where z was chosen, else 0
    sum_g = sum(g);   sum_gx = sum(g * x)           = the gradients of beta and gamma
    dy = ((dz - sum_g / M) - x * (sum_gx / M)) * a

A NaN among z makes the scale of the signs NaN and their bits 0, as for any group (`fqt.reference.codes`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fqt.formats import Format
from fqt.reference import pack

BLOCK_ROWS = 256
_BIT = Format("sign", 1)


@dataclass(frozen=True)
class Windows:
    """Max-pooling of images of `height` x `width` by windows of `kernel` that do not overlap; those at the end may be cut off.
    A kernel of (1, 1) pools nothing."""

    height: int
    width: int
    kernel: tuple[int, int] = (1, 1)

    @property
    def pooled_size(self) -> tuple[int, int]:
        return -(-self.height // self.kernel[0]), -(-self.width // self.kernel[1])

    def flat(self) -> list[int]:
        """As the integers that cross an operator's schema."""
        return [self.height, self.width, *self.kernel]


@dataclass(frozen=True)
class Source:
    """What is normalized.

    Attributes:
        y: (N, P, C) contiguous, float32, or int16 codes.
        scale: (C,) float32 of the codes; None where y is float.
        offset: (C,) float32 or None.
    """

    y: Tensor
    scale: Tensor | None = None
    offset: Tensor | None = None

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.y, self.scale, self.offset


def value(source: Source) -> Tensor:
    """y as float32, (N, P, C)."""
    if source.scale is None:
        return source.y
    y = source.y.float() * source.scale
    return y if source.offset is None else y + source.offset


def norm_sums(source: Source) -> Tensor:
    """(2, C) float64: the sums of y and of its squares."""
    y_MC = value(source).flatten(0, 1).double()
    return torch.stack([_sum(y_MC), _sum(y_MC * y_MC)])


def norm_value(source: Source, affine: Tensor, windows: Windows) -> Tensor:
    """z, pooled, (N, P', C) float32. affine: (4, C) float32, rows a, b, mean, inv."""
    return _largest(source, affine, windows)[0]


def norm_sign(source: Source, affine: Tensor, windows: Windows, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """The signs of z and the mask low <= z <= high, each (N, P', ceil(C/8)) uint8, and the signs' scale, (1,) float32."""
    z = norm_value(source, affine, windows)
    bad = z.isnan().any()
    shape = (z.shape[0], z.shape[1], z.shape[2])
    codes = pack(((z >= 0) & ~bad).to(torch.uint8), _BIT, shape)
    mask = pack(((z >= low) & (z <= high)).to(torch.uint8), _BIT, shape)
    return codes, mask, torch.where(bad, torch.nan, 1.0).reshape(1)


def norm_grad_sums(g: Tensor, kept: Tensor | None, source: Source, affine: Tensor, windows: Windows) -> Tensor:
    """(2, C) float64: sum_g and sum_gx of the pooled gradient g (N, P', C).

    Args:
        kept: (N,) bool or None: where it is False g was pruned to zero, and the sample adds nothing.
    """
    _, y, _ = _largest(source, affine, windows)
    x = (y - affine[2]) * affine[3]
    x = x if kept is None else torch.where(kept.view(-1, 1, 1), x, 0.0)
    g_MC, x_MC = g.flatten(0, 1).double(), x.flatten(0, 1).double()
    return torch.stack([_sum(g_MC), _sum(g_MC * x_MC)])


def norm_grad(
    g: Tensor, kept: Tensor | None, source: Source, affine: Tensor, windows: Windows, means: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dy, (N, P, C) float32, and its smallest and largest values by sample and channel, (N, C); NaN where there is one.

    Args:
        means: (2, C) float32, sum_g / M and sum_gx / M.
    """
    _, _, number = _largest(source, affine, windows)
    chosen = torch.arange(windows.kernel[0] * windows.kernel[1], device=g.device).view(-1, 1) == number.unsqueeze(2)
    dz = _together(torch.where(chosen, g.unsqueeze(2), 0.0), windows)
    x = (value(source) - affine[2]) * affine[3]
    dy = ((dz - means[0]) - x * means[1]) * affine[0]
    return dy, dy.amin(1), dy.amax(1)


def _sum(v_MC: Tensor) -> Tensor:
    blocks = -(-v_MC.shape[0] // BLOCK_ROWS)
    v_BRC = F.pad(v_MC, (0, 0, 0, blocks * BLOCK_ROWS - v_MC.shape[0])).view(blocks, BLOCK_ROWS, v_MC.shape[1])
    sums_BC = torch.zeros_like(v_BRC[:, 0])
    for row in range(BLOCK_ROWS):
        sums_BC += v_BRC[:, row]
    total = torch.zeros_like(sums_BC.sum(0))
    for block in sums_BC:
        total += block
    return total


def _largest(source: Source, affine: Tensor, windows: Windows) -> tuple[Tensor, Tensor, Tensor]:
    """z of each window's first largest pixel (a NaN is larger than all), its y, and its number in the window."""
    y = value(source)
    y_NPKC = _apart(y, windows, 0.0)
    z_NPKC = _apart(y * affine[0] + affine[1], windows, -torch.inf)
    best, best_y = z_NPKC[:, :, 0], y_NPKC[:, :, 0]
    number = torch.zeros_like(best, dtype=torch.int64)
    for k in range(1, z_NPKC.shape[2]):
        better = (z_NPKC[:, :, k] > best) | z_NPKC[:, :, k].isnan()
        best = torch.where(better, z_NPKC[:, :, k], best)
        best_y = torch.where(better, y_NPKC[:, :, k], best_y)
        number = torch.where(better, k, number)
    return best, best_y, number


def _apart(v_NPC: Tensor, windows: Windows, fill: float) -> Tensor:
    """(N, H*W, C) as (N, H'*W', pixels of a window, C)."""
    n, _, c = v_NPC.shape
    (kh, kw), (ph, pw) = windows.kernel, windows.pooled_size
    v_NHWC = v_NPC.reshape(n, windows.height, windows.width, c)
    v_NHWC = F.pad(v_NHWC, (0, 0, 0, pw * kw - windows.width, 0, ph * kh - windows.height), value=fill)
    return v_NHWC.view(n, ph, kh, pw, kw, c).transpose(2, 3).reshape(n, ph * pw, kh * kw, c)


def _together(v_NPKC: Tensor, windows: Windows) -> Tensor:
    """The inverse of `_apart`."""
    n, _, _, c = v_NPKC.shape
    (kh, kw), (ph, pw) = windows.kernel, windows.pooled_size
    v_NHWC = v_NPKC.view(n, ph, pw, kh, kw, c).transpose(2, 3).reshape(n, ph * kh, pw * kw, c)
    return v_NHWC[:, : windows.height, : windows.width].reshape(n, windows.height * windows.width, c)
