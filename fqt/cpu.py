"""The CPU backend: the C++ kernels of fqt/csrc behind the signatures of the reference.

The extension is optional: where it was not built every row refuses with the reason, and the reference serves.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from fqt.formats import FLOAT8_MAX, Format
from fqt.qtensor import QTensor
from fqt.reference import absmean, calibrate_groups, group_rows, keep_groups, pruned

_LIBRARY = Path(__file__).parent / "_cpu.so"
_BIT = Format("sign", 1)


def refuses_quantize(formats: tuple[Format, ...]) -> str | None:
    """Why `quantize` cannot serve a request, or None."""
    if not _LIBRARY.exists():
        return "the C++ kernels are not built: python setup.py build_ext --inplace"
    (format,) = formats
    if format.bits > 8 or format.grid in FLOAT8_MAX:
        return "codes of more than 8 bits and float8 are not vectorized"
    return None


@functools.cache
def _operators():
    torch.ops.load_library(_LIBRARY)
    return torch.ops.fqt_cpu


def quantize(
    x_NPC: Tensor,
    format: Format,
    *,
    calibrate: str,
    limits: tuple[float, float] = (-1.0, 1.0),
    stochastic: bool = False,
    prune: str = "",
    keep_one_in: int = 1,
    fold: Tensor | None = None,
    key: Tensor | None = None,
    stream: int = 0,
    pass_range: tuple[float, float] | None = None,
) -> tuple[QTensor, Tensor | None]:
    """As `fqt.reference.quantize`: one pass for each group's range, the reference's own arithmetic on those few numbers,
    one pass to encode and pack."""
    shape = (x_NPC.shape[0], x_NPC.shape[1], x_NPC.shape[2])
    groups = format.groups(shape)
    x_NPC = x_NPC.float()
    fold = None if fold is None else fold.float().expand(shape)
    low, high = x_NPC.new_zeros(groups), x_NPC.new_zeros(groups)
    codes = torch.zeros(format.packed_shape(shape), dtype=torch.uint8)
    mask = None if pass_range is None else torch.zeros(_BIT.packed_shape(shape), dtype=torch.uint8)
    if x_NPC.numel():
        _operators().group_range(x_NPC, fold, format.axes, low, high)
        if mask is not None:
            low_high = map(float, pass_range or ())
            _operators().encode(x_NPC, None, None, None, None, None, 0, "inside", *low_high, 1, "", mask)

    mean = None
    if calibrate == "absmean":
        mean = absmean(group_rows(x_NPC if fold is None else x_NPC * fold, format))
    scale, inverse, offset = calibrate_groups(low, high, mean, format, calibrate, limits)
    keep, kept, factor = ~scale.isnan(), None, None
    if prune:
        kept, factor = keep_groups(low, high, prune, keep_one_in, key, stream + 1)
        keep &= factor > 0
    if x_NPC.numel():
        _operators().encode(
            x_NPC, fold, inverse, offset, keep, key if stochastic else None, stream,
            "sign" if format.grid == "sign" else "uniform", *map(float, format.code_range), format.storage_bits,
            format.axes, codes,
        )  # fmt: skip
    q = QTensor(codes, scale, offset, None, format, shape)
    return q if kept is None or factor is None else pruned(q, kept, factor), mask
