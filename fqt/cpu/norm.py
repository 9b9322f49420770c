"""Batch normalization as 1-bit layers use it, on a CPU: as `fqt.reference.norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from fqt.cpu.library import empty, operators
from fqt.reference.norm import Source, Windows


def norm_sums(source: Source) -> Tensor:
    """As `fqt.reference.norm.norm_sums`."""
    sums = torch.empty(2, source.y.shape[2], dtype=torch.float64)
    operators().norm_sums(*source.tensors(), sums)
    return sums


def norm_value(source: Source, affine: Tensor, windows: Windows) -> Tensor:
    """As `fqt.reference.norm.norm_value`."""
    height, width = windows.pooled_size
    z = empty(source.y.shape[0], height * width, source.y.shape[2])
    operators().norm_value(*source.tensors(), affine, windows.flat(), z)
    return z


def norm_sign(source: Source, affine: Tensor, windows: Windows, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `fqt.reference.norm.norm_sign`."""
    height, width = windows.pooled_size
    codes, mask = torch.empty(2, source.y.shape[0], height * width, -(-source.y.shape[2] // 8), dtype=torch.uint8)
    if operators().norm_sign(*source.tensors(), affine, windows.flat(), low, high, codes, mask):
        return codes.zero_(), mask, torch.full((1,), torch.nan, dtype=torch.float32)
    return codes, mask, torch.ones(1, dtype=torch.float32)


def norm_grad_sums(g: Tensor, kept: Tensor | None, source: Source, affine: Tensor, windows: Windows) -> Tensor:
    """As `fqt.reference.norm.norm_grad_sums`."""
    sums = torch.empty(2, g.shape[2], dtype=torch.float64)
    operators().norm_grad_sums(g, kept, *source.tensors(), affine, windows.flat(), sums)
    return sums


def norm_grad(
    g: Tensor, kept: Tensor | None, source: Source, affine: Tensor, windows: Windows, means: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fqt.reference.norm.norm_grad`."""
    dy = empty(*source.y.shape)
    low, high = torch.empty(2, source.y.shape[0], source.y.shape[2], dtype=torch.float32)
    operators().norm_grad(g, kept, *source.tensors(), affine, windows.flat(), means, dy, low, high)
    return dy, low, high
