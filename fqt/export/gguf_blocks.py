"""GGUF's types of weights that hold integer codes, and codes as their blocks.

A block is so many neighbouring weights of a row, a scale in half precision and the packed codes: value = d * code.

    type    block  codes        bytes  layout
    Q1_0    128    -1, 1        18     d; bit j % 8 of byte j / 8 is 1 for +1
    TQ2_0   256    -1 .. 1      66     code + 1 in 2 bits: byte j of a half holds its weights j, j + 32, j + 64, j + 96; d
    Q4_0    32     -8 .. 7      18     d; code + 8 in 4 bits: byte j holds the weights j and j + 16
    Q8_0    32     -127 .. 127  34     d; a byte each

(ggml/src/ggml-common.h of llama.cpp, and the package gguf, whose `dequantize` reads them back in the tests.) The scale is the
codes' own, rounded to half precision: that is all in which the value differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fqt.formats import Format
from fqt.qtensor import QTensor
from fqt.reference import spread, unpack


@dataclass(frozen=True)
class BlockType:
    """A type of GGUF.

    Attributes:
        name: of `gguf.GGMLQuantizationType`.
        block: weights in a block.
        codes: that it holds.
        pack: codes (blocks, block) int16 to their packed bytes, (blocks, bytes).
        scale_last: whether a block's scale stands behind its codes.
    """

    name: str
    block: int
    codes: frozenset[int]
    pack: Callable[[np.ndarray], np.ndarray]
    scale_last: bool = False

    def holds(self, format: Format) -> bool:
        """Whether every code of a format is one of the type's, with no offset to be added."""
        if format.offset or format.is_float or format.bits > 8:
            return False
        low, high = (int(end) for end in format.code_range)
        return ({-1, 1} if format.grid == "sign" else set(range(low, high + 1))) <= self.codes

    def encode(self, codes_RE: np.ndarray, scales_RB: np.ndarray) -> np.ndarray:
        """Rows as (R, bytes of a row) uint8.

        Args:
            codes_RE: (R, E) int16, E a multiple of the block.
            scales_RB: (R, E / block) float16.
        """
        packed = self.pack(codes_RE.reshape(-1, self.block)).astype(np.uint8)
        scales = np.ascontiguousarray(scales_RB.reshape(-1, 1)).view(np.uint8)
        both = [packed, scales] if self.scale_last else [scales, packed]
        return np.concatenate(both, 1).reshape(codes_RE.shape[0], -1)


def _signs(codes: np.ndarray) -> np.ndarray:
    return np.packbits(codes > 0, axis=1, bitorder="little")


def _lanes(codes: np.ndarray, shape: tuple[int, ...], bits: int) -> np.ndarray:
    """Codes of which those along the last axis but one of `shape` share a byte, the first in its lowest bits."""
    lanes = codes.reshape(-1, *shape).astype(np.int32)
    shifts = bits * np.arange(lanes.shape[-2]).reshape(-1, 1)
    return (lanes << shifts).sum(-2).reshape(len(codes), -1)


TYPES = (
    BlockType("Q1_0", 128, frozenset((-1, 1)), _signs),
    BlockType("TQ2_0", 256, frozenset(range(-1, 2)), lambda c: _lanes(c + 1, (2, 4, 32), 2), scale_last=True),
    BlockType("Q4_0", 32, frozenset(range(-8, 8)), lambda c: _lanes(c + 8, (2, 16), 4)),
    BlockType("Q8_0", 32, frozenset(range(-127, 128)), lambda c: c.astype(np.int8).view(np.uint8)),
)
"""From few bits a weight to many."""


@dataclass(frozen=True)
class Rows:
    """A quantized weight as the rows of a matrix, (output channels, terms of a sum), terms in the order tap, input channel.

    Attributes:
        codes: (R, E) float32 integers.
        scale: (R, E) float32, of each code, expanded.
    """

    codes: Tensor
    scale: Tensor

    @staticmethod
    def of(q: QTensor) -> Rows:
        """The rows of a weight (O, K, I), on the CPU."""
        codes = unpack(q.codes, q.format, q.shape)
        scale = spread(q.scale, q).expand(codes.shape)
        return Rows(codes.flatten(1).cpu(), scale.flatten(1).cpu())

    def permuted(self, order: Tensor) -> Rows:
        """With the rows in another order."""
        return Rows(self.codes[order], self.scale[order])

    def block_scales(self, block: int) -> Tensor | None:
        """(R, E / block) float32; None where blocks do not divide a row, or hold more than one scale."""
        if self.codes.shape[1] % block:
            return None
        blocks = self.scale.unflatten(1, (-1, block))
        return blocks[..., 0] if bool((blocks == blocks[..., :1]).all()) else None


def packed(rows: Rows, type: BlockType) -> tuple[np.ndarray, float] | None:
    """Bytes (R, bytes of a row) and the largest relative error of a scale in half precision.

    Returns:
        None if blocks do not fit the rows, or a scale exceeds half precision (65,504).
    """
    scales = rows.block_scales(type.block)
    if scales is None:
        return None
    half = scales.half()
    if not bool(half.isfinite().all()):
        return None
    error = (half.float() - scales).abs() / torch.where(scales == 0, 1.0, scales)
    return type.encode(rows.codes.to(torch.int16).numpy(), half.numpy()), float(error.amax()) if error.numel() else 0.0
