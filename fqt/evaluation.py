"""A linear layer's output from few rows in an evaluation, by one operator of the CPU's kernels.

Of one token, or of one image in an MLP, what stands around two operators takes longer than their kernels. Quantizing x and
multiplying the codes are one here, and no QTensor of x is made. The bits are those of the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fqt import calls
from fqt.cpu.library import operators
from fqt.formats import Format
from fqt.ops import Request, select
from fqt.qtensor import QTensor
from fqt.quantizers.base import Quantizer

FEW = 16
"""Rows up to which a product reads a weight's codes as they lie (csrc/products/few_rows.h)."""
_MULTIPLY = ("fqt.cpu.integers:output", "fqt.cpu.signs:output")
_library = torch.library.Library("fqt", "FRAGMENT")
_library.define(
    "evaluate(Tensor x, str x_format, str calibrate, float[] limits, Tensor codes, Tensor scale, Tensor? offset,"
    ' str w_format, Tensor? bias, str backend="") -> Tensor'
)


def few_rows(
    x_NPC: Tensor, quantizer: Quantizer, format: Format, w: QTensor, bias: Tensor | None, backend: str
) -> Tensor | None:
    """The output, (N, P, O) float32; None where it is left to the other operators: of more rows, on another device, by scales
    that no kernel finds, in a model that is exported.

    Args:
        quantizer, format: of x, whose rounding is to nearest.
        w: (O, 1, C), not pruned.
        bias: (O,).
        backend: the one that must serve, "" for the fastest that does.
    """
    rows, compiling, calibrate = x_NPC.shape[0] * x_NPC.shape[1], torch.compiler.is_compiling(), quantizer.calibrate
    if x_NPC.device.type != "cpu" or not isinstance(calibrate, str) or quantizer.encodes_alone:
        return None
    if not (_is_few(rows) if compiling else rows <= FEW):
        return None
    if calls.direct(x_NPC):
        if not _serves(format, w.format, backend):
            return None
        return _evaluate(x_NPC, format, calibrate, quantizer.limits, w.codes, w.scale, w.offset, w.format, bias)
    if not compiling or torch.compiler.is_exporting():
        return None
    return torch.ops.fqt.evaluate(
        x_NPC, format.name, calibrate, quantizer.limits, w.codes, w.scale, w.offset, w.format.name, bias, backend
    )


def _is_few(rows: int) -> bool:
    """Whether that is sure while a graph is made: a number of rows that may vary is not to be pinned down."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(rows <= FEW)


def _serves(x: Format, w: Format, backend: str) -> bool:
    """Whether both operators would be served by the CPU's kernels of at most 8 bits."""
    if max(x.bits, w.bits) > 8:
        return False
    quantizes, _ = select("quantize", Request("cpu", (x,), None, backend))
    multiplies, _ = select("output", Request("cpu", (x, w), None, backend))
    return quantizes.function == "fqt.cpu.codes:quantize" and multiplies.function in _MULTIPLY


def _evaluate(
    x_NPC: Tensor,
    x: Format,
    calibrate: str,
    limits: Sequence[float],
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    w: Format,
    bias: Tensor | None,
) -> Tensor:
    """The C++ operator, of an x of any float dtype, (N, P, C), and a weight's codes, scale and offset."""
    x_NPC = x_NPC if x_NPC.dtype in (torch.float32, torch.bfloat16) else x_NPC.float()
    bias = None if bias is None else bias.float().contiguous()
    return operators().evaluate(
        x_NPC, x.grid, x.bits, x.axes, x.offset, calibrate, *limits, codes.contiguous(), w.grid, w.bits, scale, offset, bias
    )


def _decomposed(
    x_NPC: Tensor,
    x_format: str,
    calibrate: str,
    limits: Sequence[float],
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    w_format: str,
    bias: Tensor | None,
    backend: str = "",
) -> Tensor:
    """In a graph the C++ operator itself, which is called without Python, where it serves on this machine; else the two."""
    x, w = Format.parse(x_format), Format.parse(w_format)
    if _serves(x, w, backend):
        return _evaluate(x_NPC, x, calibrate, limits, codes, scale, offset, w, bias)
    *tensors, _ = torch.ops.fqt.quantize(
        x_NPC, None, None, None, None, x_format, calibrate, limits, False, "", 1, 0, (), backend=backend
    )
    q = QTensor(codes, scale, offset, None, w, (codes.shape[0], 1, x_NPC.shape[2]))
    shape = list(x_NPC.shape)
    return torch.ops.fqt.output(tensors, x_format, shape, q.tensors(), w_format, q.shape, bias, [], backend=backend)


_library.impl("evaluate", _decomposed, "CompositeImplicitAutograd")
