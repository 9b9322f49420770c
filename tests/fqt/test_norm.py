"""Batch normalization for 1-bit layers: the specification against torch, every kernel against the specification."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from fqt import ops
from fqt.cpu import library
from fqt.ops import KERNELS, NORM, Request
from fqt.reference import norm
from fqt.reference.norm import Source, Windows

CPU = [row for row in KERNELS if row.operator in NORM and row.device == "cpu"]
INSTRUCTION_SETS = ("portable", "avx2", "avx512")
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


def call(row: ops.Kernel, function: str, *args: object):
    return ops.load(function)(*args)


def same(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


@pytest.mark.parametrize("row", CPU, ids=lambda row: row.operator)
def test_the_kernel_equals_the_specification(row: ops.Kernel, rng: np.random.Generator):
    """Random cases over sizes, values, codes and floats, windows, instruction sets and thread counts."""
    reason = row.refuses(Request("cpu", ()))
    if reason is not None:
        pytest.skip(reason)
    draw = random.Random(int(rng.integers(2**62)))
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    best = library.operators().limit_isa(2)
    specification = getattr(norm, row.operator)
    try:
        for _ in range(3000):
            library.operators().limit_isa(draw.randint(0, best))
            torch.set_num_threads(draw.choice((1, 2, 3, 8)))
            height, width = draw.choice((1, 2, 3, 5, 8)), draw.choice((1, 2, 3, 4, 7))
            shape = (draw.choice((0, 1, 2, 3, 20)), height * width, draw.choice(CHANNELS))
            from_ = source(draw, shape, generator)
            affine = torch.randn(4, shape[2], generator=generator)
            windows = Windows(height, width, draw.choice(KERNEL_SIZES))
            pooled_y, pooled_x = windows.pooled_size
            g, kept = torch.randn(shape[0], pooled_y * pooled_x, shape[2], generator=generator), None
            if draw.random() < 0.5:
                kept = torch.rand(shape[0], generator=generator) < 0.5
                g[~kept] = 0.0
            args = {
                "norm_sums": (from_,),
                "norm_value": (from_, affine, windows),
                "norm_sign": (from_, affine, windows, -1.0, draw.choice((1.0, 0.5))),
                "norm_grad_sums": (g, kept, from_, affine, windows),
                "norm_grad": (g, kept, from_, affine, windows, torch.randn(2, shape[2], generator=generator)),
            }[row.operator]
            actual, expected = ops.load(row.function)(*args), specification(*args)
            for a, e in zip(*((x if isinstance(x, tuple) else (x,)) for x in (actual, expected)), strict=True):
                same(a, e)
    finally:
        library.operators().limit_isa(2)
