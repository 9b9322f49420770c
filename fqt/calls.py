"""The operators as the library calls them: with QTensors and formats, not with lists of tensors and names.

Where nothing has to see the operator, a call goes straight to its kernel; else through `torch.ops.fqt` of `fqt.ops`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fqt.formats import Format, Shape3
from fqt.geometry import Geometry
from fqt.ops import Request, call, draw_key
from fqt.qtensor import QTensor, Scales


def direct(tensor: Tensor) -> bool:
    """Whether nothing is active that has to see operators: a compiler, a mode, a profiler, a tensor subclass, a transform of
    torch.func. Then a call goes straight to its kernel, which spares the dispatcher and the schema: a third of a small layer's
    time."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not tensor.is_meta
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and not torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    )


def key_for(x: Tensor) -> Tensor:
    """The operator `draw_key`: a Philox key from torch's default generator of the tensor's device."""
    return draw_key(x) if direct(x) else torch.ops.fqt.draw_key(x)


def quantize(
    x: Tensor,
    format: Format,
    *,
    calibrate: str,
    limits: tuple[float, float],
    stochastic: bool,
    prune: str,
    keep_one_in: int,
    fold: Tensor | None,
    key: Tensor | None,
    stream: int,
    pass_range: tuple[float, float] | None,
    ranges: tuple[Tensor, Tensor] | None,
    backend: str,
) -> tuple[QTensor, Tensor]:
    """The operator `quantize`: codes, and the estimator's mask (empty without a `pass_range`)."""
    if direct(x):
        q, mask = call(
            "quantize", Request(x.device.type, (format,), None, backend), x, format, calibrate=calibrate, limits=limits,
            stochastic=stochastic, prune=prune, keep_one_in=keep_one_in, fold=fold, key=key, stream=stream,
            pass_range=pass_range, ranges=ranges,
        )  # fmt: skip
        return q, q.codes.new_empty(0, dtype=torch.uint8) if mask is None else mask
    low, high = ranges or (None, None)
    *tensors, mask = torch.ops.fqt.quantize(
        x, fold, key, low, high, format.name, calibrate, limits, stochastic, prune, keep_one_in, stream, pass_range or (),
        backend=backend,
    )  # fmt: skip
    return QTensor.from_tensors(tensors, format, (x.shape[0], x.shape[1], x.shape[2])), mask


def calibrate(
    x: Tensor,
    format: Format,
    *,
    calibrate: str,
    limits: tuple[float, float],
    prune: str,
    keep_one_in: int,
    fold: Tensor | None,
    key: Tensor | None,
    stream: int,
    ranges: tuple[Tensor, Tensor] | None,
) -> Scales:
    """The operator `calibrate`, by the reference."""
    if direct(x):
        return call(
            "calibrate", Request(x.device.type, (format,), None, "reference"), x, format, calibrate=calibrate, limits=limits,
            prune=prune, keep_one_in=keep_one_in, fold=fold, key=key, stream=stream, ranges=ranges,
        )  # fmt: skip
    low, high = ranges or (None, None)
    tensors = torch.ops.fqt.calibrate(
        x, fold, key, low, high, format.name, calibrate, limits, prune, keep_one_in, stream, backend="reference"
    )
    return Scales.from_tensors(tensors, format)


def encode(
    x: Tensor, scales: Scales, format: Format, *, fold: Tensor | None, key: Tensor | None, stream: int, backend: str
) -> QTensor:
    """The operator `encode`, with the scales of its codes."""
    if direct(x):
        request = Request(x.device.type, (format,), None, backend)
        codes = call("encode", request, x, scales, format, fold=fold, key=key, stream=stream)
    else:
        codes = torch.ops.fqt.encode(x, scales.tensors(), fold, key, format.name, stream, backend=backend)
    return scales.of(codes, format, (x.shape[0], x.shape[1], x.shape[2]))


def output(x: QTensor, w: QTensor, bias: Tensor | None, geometry: Geometry | None, backend: str) -> Tensor:
    """The operator `output`."""
    if direct(x.codes):
        return call("output", _asked(x, w, geometry, backend), x, w, bias, geometry).contiguous()
    return torch.ops.fqt.output(*_schema(x), *_schema(w), bias, _flat(geometry), backend=backend)


def accumulate(x: QTensor, w: QTensor, geometry: Geometry | None, backend: str) -> Tensor:
    """The operator `accumulate`."""
    if direct(x.codes):
        return call("accumulate", _asked(x, w, geometry, backend), x, w, geometry)
    return torch.ops.fqt.accumulate(*_schema(x), *_schema(w), _flat(geometry), backend=backend)


def grad_input(g: QTensor, w: QTensor, mask: Tensor, geometry: Geometry | None, x_shape: Shape3, backend: str) -> Tensor:
    """The operator `grad_input`; an empty mask is none."""
    if direct(g.codes):
        given = mask if mask.numel() else None
        return call("grad_input", _asked(g, w, geometry, backend), g, w, given, geometry, x_shape).contiguous()
    return torch.ops.fqt.grad_input(*_schema(g), *_schema(w), mask, x_shape, _flat(geometry), backend=backend)


def grad_weight(g: QTensor, x: QTensor, geometry: Geometry | None, backend: str) -> Tensor:
    """The operator `grad_weight`."""
    if direct(g.codes):
        return call("grad_weight", _asked(g, x, geometry, backend), g, x, geometry).contiguous()
    return torch.ops.fqt.grad_weight(*_schema(g), *_schema(x), _flat(geometry), backend=backend)


def _schema(q: QTensor) -> tuple[list[Tensor], str, Shape3]:
    """A QTensor as the three arguments that stand for it in an operator's schema."""
    return q.tensors(), q.format.name, q.shape


def _flat(geometry: Geometry | None) -> list[int]:
    return [] if geometry is None else geometry.flat()


def _asked(a: QTensor, b: QTensor, geometry: Geometry | None, backend: str) -> Request:
    return Request(a.codes.device.type, (a.format, b.format), geometry, backend)
