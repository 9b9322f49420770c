"""Batch normalization for 1-bit layers: the kernels of every instruction set against the specification."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from fqt import ops
from fqt.cpu import library
from fqt.ops import KERNELS, NORM, Kernel
from fqt.reference import norm
from fqt.reference.norm import Windows
from tests.fqt.helpers import case_seeds, random_case
from tests.fqt.random_norm import CHANNELS, KERNEL_SIZES, source

CPU = [row for row in KERNELS if row.operator in NORM and row.device == "cpu"]


def same(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


@pytest.fixture
def best() -> Iterator[int]:
    """The number of the best instruction set of this machine; a test may limit the kernels to any up to it."""
    reason = library.refuses()
    if reason is not None:
        pytest.skip(reason)
    yield library.operators().limit_isa(2)
    library.operators().limit_isa(2)


def arguments(operator: str, draw: random.Random, generator: torch.Generator) -> tuple:
    """Of a random call: sizes, values, codes or floats, windows."""
    height, width = draw.choice((1, 2, 3, 5, 8)), draw.choice((1, 2, 3, 4, 7))
    shape = (draw.choice((0, 1, 2, 3, 20)), height * width, draw.choice(CHANNELS))
    from_ = source(draw, shape, generator)
    affine = torch.randn(4, shape[2], generator=generator)
    windows = Windows(height, width, draw.choice(KERNEL_SIZES))
    if operator == "norm_sums":
        return (from_,)
    if operator == "norm_value":
        return from_, affine, windows
    if operator == "norm_sign":
        return from_, affine, windows, -1.0, draw.choice((1.0, 0.5))
    pooled_y, pooled_x = windows.pooled_size
    g, kept = torch.randn(shape[0], pooled_y * pooled_x, shape[2], generator=generator), None
    if draw.random() < 0.5:
        kept = torch.rand(shape[0], generator=generator) < 0.5
        g[~kept] = 0.0
    if operator == "norm_grad_sums":
        return g, kept, from_, affine, windows
    return g, kept, from_, affine, windows, torch.randn(2, shape[2], generator=generator)


@pytest.mark.parametrize("part", range(6))
@pytest.mark.parametrize("row", CPU, ids=lambda row: row.operator)
@pytest.mark.every(3)
def test_the_kernel_equals_the_specification(row: Kernel, part: int, best: int, rng: np.random.Generator):
    """170 random cases a part, over instruction sets and thread counts. The specification has one thread: that is faster."""
    kernel, specification = ops.load(row.function), getattr(norm, row.operator)
    for seed in case_seeds(rng, 170):
        with random_case(seed) as (draw, generator):
            args = arguments(row.operator, draw, generator)
            expected = specification(*args)
            library.operators().limit_isa(draw.randint(0, best))
            torch.set_num_threads(draw.choice((1, 2, 3, 8)))
            actual = kernel(*args)
            torch.set_num_threads(1)
            for a, e in zip(*((x if isinstance(x, tuple) else (x,)) for x in (actual, expected)), strict=True):
                same(a, e)
