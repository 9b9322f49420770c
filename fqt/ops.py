"""The operators: torch.library schemas and fake kernels, and the choice of the kernel that serves a call.

A QTensor crosses a schema as its four tensors, its format's short name and its logical shape. Every operator looks its kernel
up in `KERNELS`, from fast to slow; the reference comes last and takes everything. The rows stand beside the kernels, in the
`rows.py` of each backend. Where a backend is named, by a call or by FQT_BACKEND, it alone serves or the call is refused:
nothing falls back in silence.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fqt import selfcheck
from fqt.cpu import library
from fqt.cpu import rows as cpu_rows
from fqt.cuda_kernels import rows as cuda_rows
from fqt.formats import Format, Shape3
from fqt.geometry import Geometry
from fqt.qtensor import QTensor, Scales, codes_dtype
from fqt.reference import rows as reference_rows
from fqt.reference.rows import NORM, OPERATORS, PRODUCTS
from fqt.rows import Kernel, Request
from fqt.triton_kernels import rows as triton_rows
from fqt.wording import nearest

__all__ = [
    "KERNELS",
    "NORM",
    "OPERATORS",
    "PRODUCTS",
    "Kernel",
    "Refusal",
    "Request",
    "call",
    "draw_key",
    "named_backend",
    "operator",
    "select",
]

ENVIRONMENT = "FQT_BACKEND"
KERNELS: list[Kernel] = [*cpu_rows.ROWS, *cuda_rows.ROWS, *triton_rows.ROWS, *reference_rows.ROWS]
"""The table of kernels, from fast to slow."""


@dataclass(frozen=True)
class Refusal:
    """Why a row does not serve a request. broken: it would, but its library is not the reference's equal on this machine."""

    row: Kernel
    reason: str
    broken: bool = False

    def __str__(self) -> str:
        return f"{self.row.label}: {self.reason}"


def named_backend(name: str | None = None) -> str:
    """The backend that `name`, else the environment's FQT_BACKEND, names; "" if neither does.

    Raises:
        ValueError: no kernel has a backend of that name.
    """
    chosen = name or os.environ.get(ENVIRONMENT, "")
    known = {kernel.backend: None for kernel in KERNELS} if chosen else {}
    if chosen and chosen not in known:
        where = "" if name else f" in {ENVIRONMENT}"
        raise ValueError(f"unknown backend {chosen!r}{where}{nearest(chosen, known)}; known: {', '.join(known)}")
    return chosen


def select(operator: str, request: Request) -> tuple[Kernel, list[Refusal]]:
    """The first kernel that serves a request, and why each one before it does not.

    A backend named by the request, or by FQT_BACKEND, is the only one asked. `decode` multiplies nothing: only "reference"
    binds it.

    Raises:
        ValueError: the named backend is unknown, or does not serve this.
    """
    wanted = named_backend(request.backend)
    if operator == "decode" and wanted != "reference":
        wanted = ""
    refusals = []
    for kernel in KERNELS:
        if kernel.operator != operator or kernel.device not in ("", request.device) or wanted not in ("", kernel.backend):
            continue
        reason, fault = kernel.refuses(request), None
        if reason is None and kernel.native:
            reason = fault = broken(kernel)
        if reason is None:
            return kernel, refusals
        refusals.append(Refusal(kernel, reason, fault is not None))
    formats = " by ".join(format.name for format in request.formats)
    why = "; ".join(map(str, refusals)) or f"it has no kernel for this device{_elsewhere(operator, wanted)}"
    raise ValueError(
        f"backend {wanted!r} does not serve {operator} of {formats} on {request.device}: {why}. Name no backend, and what "
        f"serves is chosen, or 'reference', which serves everything"
    )


def _elsewhere(operator: str, backend: str) -> str:
    devices = [kernel.device for kernel in KERNELS if (kernel.operator, kernel.backend) == (operator, backend)]
    return f", only for {', '.join(devices)}: move the model there before its conversion" if devices else ""


@functools.cache
def broken(kernel: Kernel) -> str | None:
    """Why a native kernel cannot be used: its library does not load, it is not the reference's equal, or nothing could be
    compared. Asked once a process; said once in the log.

    Raises:
        torch.OutOfMemoryError: the device is full. That says nothing about the kernel, so the next call asks again.
    """
    try:
        count, what = selfcheck.compare(kernel, load(kernel.function)), "cannot be used"
        said = "" if count else "the self-check has no case for it: nothing was compared"
    except AssertionError as error:
        what, said = "differs from the reference", str(error)
    except torch.OutOfMemoryError:
        raise
    except (OSError, AttributeError, RuntimeError) as error:  # what loading and launching raise, no more
        what, said = "cannot be used", str(error.__cause__ or error)  # torch hides the loader's words behind its own
    if not said:
        return None
    remedy = f"build it anew, {library.BUILD}" if kernel.device == "cpu" else "python -m pytest -m gpu says more"
    reason = f"the native {kernel.operator} {what} ({' '.join(said.split())}): {remedy}"
    logging.getLogger("fqt").warning("%s: %s; see python -m fqt doctor", kernel.label, reason)
    return reason


@functools.cache
def load(function: str) -> Callable:
    """The function that a row names. An import error surfaces: there is no fallback by exception."""
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)


def call(operator: str, request: Request, *args: object, **kwargs: object):
    kernel, _ = select(operator, request)
    function = load(kernel.function)
    if torch.is_autocast_enabled(request.device):  # it would round the products within an operator to its dtype
        with torch.autocast(request.device, enabled=False):
            return function(*args, **kwargs)
    return function(*args, **kwargs)


def _shape3(sizes: Sequence[int]) -> Shape3:
    return (sizes[0], sizes[1], sizes[2])


_library = torch.library.Library("fqt", "DEF")


def operator(schema: str, *, tags: Sequence[torch.Tag] = ()) -> Callable:
    """Define `schema`, implemented by the decorated function on every device."""

    def register(function: Callable) -> Callable:
        _library.define(schema, tags=tuple(tags))
        _library.impl(schema.split("(")[0], function, "CompositeExplicitAutograd")
        return function

    return register


@operator("draw_key(Tensor like) -> Tensor", tags=[torch.Tag.nondeterministic_seeded])
def draw_key(like: Tensor) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=like.device)


@torch.library.register_fake("fqt::draw_key")
def _(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.int64)


@operator(
    "quantize(Tensor x, Tensor? fold, Tensor? key, Tensor? low, Tensor? high, str format, str calibrate, float[] limits,"
    ' bool stochastic, str prune, int keep_one_in, int stream, float[] pass_range, str backend="")'
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _quantize(
    x: Tensor,
    fold: Tensor | None,
    key: Tensor | None,
    low: Tensor | None,
    high: Tensor | None,
    format: str,
    calibrate: str,
    limits: list[float],
    stochastic: bool,
    prune: str,
    keep_one_in: int,
    stream: int,
    pass_range: list[float],
    backend: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    parsed = Format.parse(format)
    q, mask = call(
        "quantize",
        Request(x.device.type, (parsed,), backend=backend),
        x,
        parsed,
        calibrate=calibrate,
        limits=(limits[0], limits[1]),
        stochastic=stochastic,
        prune=prune,
        keep_one_in=keep_one_in,
        fold=fold,
        key=key,
        stream=stream,
        pass_range=(pass_range[0], pass_range[1]) if pass_range else None,
        ranges=None if low is None or high is None else (low, high),
    )
    codes, scale, offset, index = q.tensors()
    return codes, scale, offset, index, codes.new_empty(0, dtype=torch.uint8) if mask is None else mask


@torch.library.register_fake("fqt::quantize")
def _(x, fold, key, low, high, format, calibrate, limits, stochastic, prune, keep_one_in, stream, pass_range, backend=""):
    parsed, shape = Format.parse(format), _shape3(x.shape)
    groups = parsed.groups(shape)
    mask_shape = Format("sign", 1).packed_shape(shape) if pass_range else (0,)
    return (
        x.new_empty(parsed.packed_shape(shape), dtype=codes_dtype(parsed)),
        x.new_empty(groups, dtype=torch.float32),
        x.new_empty(groups if parsed.offset else 0, dtype=torch.float32),
        x.new_empty(groups if prune else 0, dtype=torch.int32),
        x.new_empty(mask_shape, dtype=torch.uint8),
    )


@operator(
    "calibrate(Tensor x, Tensor? fold, Tensor? key, Tensor? low, Tensor? high, str format, str calibrate, float[] limits,"
    ' str prune, int keep_one_in, int stream, str backend="") -> (Tensor, Tensor, Tensor, Tensor, Tensor)'
)
def _calibrate(
    x: Tensor,
    fold: Tensor | None,
    key: Tensor | None,
    low: Tensor | None,
    high: Tensor | None,
    format: str,
    calibrate: str,
    limits: list[float],
    prune: str,
    keep_one_in: int,
    stream: int,
    backend: str = "",
) -> tuple[Tensor, ...]:
    parsed = Format.parse(format)
    scales = call(
        "calibrate",
        Request(x.device.type, (parsed,), backend=backend),
        x,
        parsed,
        calibrate=calibrate,
        limits=(limits[0], limits[1]),
        prune=prune,
        keep_one_in=keep_one_in,
        fold=fold,
        key=key,
        stream=stream,
        ranges=None if low is None or high is None else (low, high),
    )
    return tuple(scales.tensors())


@torch.library.register_fake("fqt::calibrate")
def _(x, fold, key, low, high, format, calibrate, limits, prune, keep_one_in, stream, backend=""):
    parsed = Format.parse(format)
    groups = parsed.groups(_shape3(x.shape))
    counts = (groups, groups, groups if parsed.offset else 0, groups if prune else 0)
    scales = tuple(x.new_empty(count, dtype=torch.float32) for count in counts)
    return (*scales, x.new_empty(counts[3], dtype=torch.int32))


@operator('encode(Tensor x, Tensor[] scales, Tensor? fold, Tensor? key, str format, int stream, str backend="") -> Tensor')
def _encode(
    x: Tensor, scales: list[Tensor], fold: Tensor | None, key: Tensor | None, format: str, stream: int, backend: str = ""
) -> Tensor:
    parsed = Format.parse(format)
    request = Request(x.device.type, (parsed,), backend=backend)
    given = Scales.from_tensors(scales, parsed)
    return call("encode", request, x, given, parsed, fold=fold, key=key, stream=stream)


@torch.library.register_fake("fqt::encode")
def _(x, scales, fold, key, format, stream, backend=""):
    parsed = Format.parse(format)
    return x.new_empty(parsed.packed_shape(_shape3(x.shape)), dtype=codes_dtype(parsed))


@operator("decode(Tensor[] q, str format, SymInt[] shape) -> Tensor")
def _decode(q: list[Tensor], format: str, shape: list[int]) -> Tensor:
    parsed = Format.parse(format)
    return call("decode", Request(q[0].device.type, (parsed,)), QTensor.from_tensors(q, parsed, _shape3(shape)))


@torch.library.register_fake("fqt::decode")
def _(q, format, shape):
    return q[0].new_empty(shape, dtype=torch.float32)


_OPERANDS = "Tensor[] a, str a_format, SymInt[] a_shape, Tensor[] b, str b_format, SymInt[] b_shape"


def _operands(
    a: list[Tensor], a_format: str, a_shape: list[int], b: list[Tensor], b_format: str, b_shape: list[int]
) -> tuple[QTensor, QTensor]:
    """Two operands; kernels address their tensors by numbers, so these are made contiguous."""
    return (
        QTensor.from_tensors([t.contiguous() for t in a], Format.parse(a_format), _shape3(a_shape)),
        QTensor.from_tensors([t.contiguous() for t in b], Format.parse(b_format), _shape3(b_shape)),
    )


def _request(a: QTensor, b: QTensor, geometry: Geometry | None, backend: str) -> Request:
    return Request(a.codes.device.type, (a.format, b.format), geometry, backend)


@operator(f'output({_OPERANDS}, Tensor? bias, SymInt[] geometry, str backend="") -> Tensor')
def _output(a, a_format, a_shape, b, b_format, b_shape, bias, geometry, backend="") -> Tensor:
    x, w = _operands(a, a_format, a_shape, b, b_format, b_shape)
    window = Geometry.unflatten(geometry)
    return call("output", _request(x, w, window, backend), x, w, bias, window).contiguous()


@torch.library.register_fake("fqt::output")
def _(a, a_format, a_shape, b, b_format, b_shape, bias, geometry, backend=""):
    window = Geometry.unflatten(geometry)
    positions = a_shape[1] if window is None else window.output_size[0] * window.output_size[1]
    return a[1].new_empty(a_shape[0], positions, b_shape[0])


@operator(f'grad_input({_OPERANDS}, Tensor mask, SymInt[] x_shape, SymInt[] geometry, str backend="") -> Tensor')
def _grad_input(a, a_format, a_shape, b, b_format, b_shape, mask, x_shape, geometry, backend="") -> Tensor:
    g, w = _operands(a, a_format, a_shape, b, b_format, b_shape)
    window = Geometry.unflatten(geometry)
    mask = mask if mask.numel() else None
    return call("grad_input", _request(g, w, window, backend), g, w, mask, window, _shape3(x_shape)).contiguous()


@torch.library.register_fake("fqt::grad_input")
def _(a, a_format, a_shape, b, b_format, b_shape, mask, x_shape, geometry, backend=""):
    return a[1].new_empty(x_shape)


@operator(f'grad_weight({_OPERANDS}, SymInt[] geometry, str backend="") -> Tensor')
def _grad_weight(a, a_format, a_shape, b, b_format, b_shape, geometry, backend="") -> Tensor:
    g, x = _operands(a, a_format, a_shape, b, b_format, b_shape)
    window = Geometry.unflatten(geometry)
    return call("grad_weight", _request(g, x, window, backend), g, x, window).contiguous()


@torch.library.register_fake("fqt::grad_weight")
def _(a, a_format, a_shape, b, b_format, b_shape, geometry, backend=""):
    window = Geometry.unflatten(geometry)
    taps, groups = (1, 1) if window is None else (window.kernel[0] * window.kernel[1], window.groups)
    return a[1].new_empty(a_shape[2], taps, b_shape[2] // groups)


@operator(f'accumulate({_OPERANDS}, SymInt[] geometry, str backend="") -> Tensor')
def _accumulate(a, a_format, a_shape, b, b_format, b_shape, geometry, backend="") -> Tensor:
    x, w = _operands(a, a_format, a_shape, b, b_format, b_shape)
    window = Geometry.unflatten(geometry)
    return call("accumulate", _request(x, w, window, backend), x, w, window)


@torch.library.register_fake("fqt::accumulate")
def _(a, a_format, a_shape, b, b_format, b_shape, geometry, backend=""):
    window = Geometry.unflatten(geometry)
    positions = a_shape[1] if window is None else window.output_size[0] * window.output_size[1]
    return a[1].new_empty(a_shape[0], positions, b_shape[0], dtype=torch.int16)
