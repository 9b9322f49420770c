"""Random products for the CUDA kernels, for the emulator and for a GPU."""

from __future__ import annotations

import math
import random

import torch

from fqt.cuda_kernels import plan
from fqt.cuda_kernels.rows import ROWS
from fqt.formats import Format
from fqt.rows import Kernel, Serves
from tests.fqt.random_cases import coded, layer

OPERATORS = tuple(row.operator for row in ROWS)
TILES = (*plan.MMA, *plan.WGMMA)


def row(operator: str) -> Kernel:
    """The row of the table of an operator."""
    return next(row for row in ROWS if row.operator == operator)


def case(operator: str, draw: random.Random, generator: torch.Generator, shapes=None) -> tuple:
    """Arguments of a product of random operands: a random layer that the row serves, or the given one (x, w, g, geometry)."""
    serves = row(operator).refuses
    assert isinstance(serves, Serves), "its formats are drawn from what it serves"
    while True:
        x_shape, w_shape, g_shape, geometry = shapes or layer(draw)
        small = math.prod(g_shape) * w_shape[1] * w_shape[2] < 3e5 and g_shape[0] <= 40
        if shapes or (small and (geometry is None or geometry.groups == 1)):
            break
    left, right = serves.draw(draw, geometry)
    pruned = draw.random() < 0.4
    if operator in ("output", "accumulate"):
        operands = coded(left, x_shape, draw, generator), coded(right, w_shape, draw, generator)
        bias = draw.choice((None, torch.randn(w_shape[0], generator=generator)))
        return (*operands, bias, geometry) if operator == "output" else (*operands, geometry)
    if operator == "grad_input":
        mask_shape = Format("sign", 1).packed_shape(x_shape)
        mask = draw.choice((None, torch.randint(256, mask_shape, generator=generator, dtype=torch.uint8)))
        return coded(left, g_shape, draw, generator, pruned), coded(right, w_shape, draw, generator), mask, geometry, x_shape
    return coded(left, g_shape, draw, generator, pruned), coded(right, x_shape, draw, generator), geometry
