"""Random sources and windows of batch normalization: what the fuzz of its kernels is made of."""

from __future__ import annotations

import random

import torch

from fqt.reference.norm import Source

CHANNELS = (0, 1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129)
KERNEL_SIZES = ((1, 1), (2, 2), (2, 2), (3, 3), (1, 2), (3, 1))


def source(draw: random.Random, shape: tuple[int, int, int], generator: torch.Generator) -> Source:
    """Floats, or codes with their scale and perhaps an offset; of a few values, so that maxima are often equal."""
    if draw.random() < 0.5:
        codes = torch.randint(-9, 9, shape, generator=generator).short()
        if draw.random() < 0.2 and codes.numel():
            codes.view(-1)[0] = draw.choice((-32768, 32767))
        scale = torch.randn(shape[2], generator=generator)
        return Source(codes, scale, torch.randn(shape[2], generator=generator) if draw.random() < 0.5 else None)
    y = torch.randn(shape, generator=generator)
    y = {"equal": torch.full(shape, 0.25), "coarse": y.round(), "large": y * 1e30, "small": y * 1e-30}.get(
        draw.choice(("normal", "equal", "coarse", "large", "small")), y
    )
    if draw.random() < 0.2 and y.numel():
        y.view(-1)[draw.randrange(y.numel())] = draw.choice((float("nan"), float("inf"), -0.0))
    return Source(y)
