"""The library of the C++ kernels, and the memory of their results.

The extension is optional: where it was not built every row refuses with the reason, and the reference serves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fqt.native import refuse_truncated

LIBRARY = Path(__file__).parent.parent / "_cpu.so"
BUILD = "python setup.py build_ext --inplace"
_NOT_BUILT = f"the C++ kernels are not built: {BUILD}"
_large: float = 1 << 20  # bytes from which page faults are felt


@functools.cache
def _exists(library: Path) -> bool:
    """Asked with every call: looked up once."""
    return library.exists()


def refuses() -> str | None:
    """Why no kernel of the library can serve, or None."""
    return None if _exists(LIBRARY) else _NOT_BUILT


@functools.cache
def operators():
    """The extension's own operators. OSError where the file is no library that this torch can load."""
    refuse_truncated(LIBRARY)
    torch.ops.load_library(LIBRARY)
    # A library of another version may lack the operator. The self-check, which calls the operators, then says what is missing.
    if hasattr(torch.ops.fqt_cpu, "evaluate"):
        torch.library.register_fake("fqt_cpu::evaluate", _evaluated)
    return torch.ops.fqt_cpu


def _evaluated(x: Tensor, grid, bits, axes, x_offset, calibrate, first, last, w: Tensor, *rest) -> Tensor:
    """What a graph knows of the output of `evaluate`."""
    return x.new_empty((x.shape[0], x.shape[1], w.shape[0]), dtype=torch.float32)


@contextmanager
def fresh_memory() -> Iterator[None]:
    """Within the block every tensor is new memory from torch."""
    global _large
    before, _large = _large, math.inf
    try:
        yield
    finally:
        _large = before


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """As torch.empty; large tensors are made of memory that was used before, whose pages the system need not bring in again."""
    if math.prod(shape) * dtype.itemsize < _large:
        return torch.empty(shape, dtype=dtype)
    return operators().empty(shape, dtype)
