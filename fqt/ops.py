"""The operators: torch.library schemas, fake kernels, and the one table of kernels behind them.

A QTensor crosses a schema as its four tensors, its format's short name and its logical shape. Every operator looks its kernel
up in `KERNELS`, from fast to slow; the reference comes last and takes everything. A kernel is added with one row here.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fqt import cpu
from fqt.formats import Format, Shape3
from fqt.geometry import Geometry
from fqt.qtensor import QTensor

OPERATORS = ("quantize", "decode", "output", "grad_input", "grad_weight")
PRODUCTS = ("output", "grad_input", "grad_weight")


@dataclass(frozen=True)
class Request:
    """What a call asks of a kernel."""

    device: str
    formats: tuple[Format, ...]
    geometry: Geometry | None = None


@dataclass(frozen=True)
class Kernel:
    """A row of the table.

    Attributes:
        operator: one of `OPERATORS`.
        backend: the name that `fqt.summary` shows.
        device: torch device type, "" for any.
        function: "module:name", imported when it is first used; its signature is that of the reference's function.
        refuses: the reason why it cannot serve a request, None if it can.
    """

    operator: str
    backend: str
    device: str
    function: str
    refuses: Callable[[Request], str | None]


KERNELS: list[Kernel] = [
    Kernel("quantize", "cpu", "cpu", "fqt.cpu:quantize", lambda request: cpu.refuses_quantize(request.formats)),
    Kernel("output", "cpu", "cpu", "fqt.cpu:output", lambda request: cpu.refuses_output(request.formats, request.geometry)),
    Kernel(
        "grad_input",
        "cpu",
        "cpu",
        "fqt.cpu:grad_input",
        lambda request: cpu.refuses_grad_input(request.formats, request.geometry),
    ),
    Kernel("grad_weight", "cpu", "cpu", "fqt.cpu:grad_weight", lambda request: cpu.refuses_grad_weight(request.formats)),
    *(
        Kernel(
            operator,
            "cpu_int8",
            "cpu",
            f"fqt.cpu:{operator}_integers",
            lambda request, operator=operator: cpu.refuses_integers(operator, request.formats, request.geometry),
        )
        for operator in PRODUCTS
    ),
    *(Kernel(operator, "reference", "", f"fqt.reference:{operator}", lambda request: None) for operator in OPERATORS),
]


def select(operator: str, request: Request) -> tuple[Kernel, list[str]]:
    """The first kernel that serves a request, and why each one before it does not ("backend: reason")."""
    reasons = []
    for kernel in KERNELS:
        if kernel.operator != operator or kernel.device not in ("", request.device):
            continue
        reason = kernel.refuses(request)
        if reason is None:
            return kernel, reasons
        reasons.append(f"{kernel.backend}: {reason}")
    raise AssertionError(f"the reference must serve {operator}")


@functools.cache
def load(function: str) -> Callable:
    """The function that a row names. An import error surfaces: there is no fallback by exception."""
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)


def _call(operator: str, request: Request, *args: object, **kwargs: object):
    kernel, _ = select(operator, request)
    function = load(kernel.function)
    if torch.is_autocast_enabled(request.device):  # it would round the products within an operator to its dtype
        with torch.autocast(request.device, enabled=False):
            return function(*args, **kwargs)
    return function(*args, **kwargs)


def _shape3(sizes: Sequence[int]) -> Shape3:
    return (sizes[0], sizes[1], sizes[2])


_library = torch.library.Library("fqt", "DEF")


def _operator(schema: str, *, tags: Sequence[torch.Tag] = ()) -> Callable:
    """Define `schema`, implemented by the decorated function on every device."""

    def register(function: Callable) -> Callable:
        _library.define(schema, tags=tuple(tags))
        _library.impl(schema.split("(")[0], function, "CompositeExplicitAutograd")
        return function

    return register


@_operator("draw_key(Tensor like) -> Tensor", tags=[torch.Tag.nondeterministic_seeded])
def _draw_key(like: Tensor) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=like.device)


@torch.library.register_fake("fqt::draw_key")
def _(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.int64)


@_operator(
    "quantize(Tensor x, Tensor? fold, Tensor? key, str format, str calibrate, float[] limits, bool stochastic, str prune,"
    " int keep_one_in, int stream, float[] pass_range) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _quantize(
    x: Tensor,
    fold: Tensor | None,
    key: Tensor | None,
    format: str,
    calibrate: str,
    limits: list[float],
    stochastic: bool,
    prune: str,
    keep_one_in: int,
    stream: int,
    pass_range: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    parsed = Format.parse(format)
    q, mask = _call(
        "quantize",
        Request(x.device.type, (parsed,)),
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
    )
    codes, scale, offset, index = q.tensors()
    return codes, scale, offset, index, codes.new_empty(0, dtype=torch.uint8) if mask is None else mask


@torch.library.register_fake("fqt::quantize")
def _(x, fold, key, format, calibrate, limits, stochastic, prune, keep_one_in, stream, pass_range):
    parsed, shape = Format.parse(format), _shape3(x.shape)
    groups = parsed.groups(shape)
    dtype = {16: torch.int16, 32: torch.int32}.get(parsed.storage_bits, torch.uint8)
    mask_shape = Format("sign", 1).packed_shape(shape) if pass_range else (0,)
    return (
        x.new_empty(parsed.packed_shape(shape), dtype=dtype),
        x.new_empty(groups, dtype=torch.float32),
        x.new_empty(groups if parsed.offset else 0, dtype=torch.float32),
        x.new_empty(groups if prune else 0, dtype=torch.int32),
        x.new_empty(mask_shape, dtype=torch.uint8),
    )


@_operator("decode(Tensor[] q, str format, SymInt[] shape) -> Tensor")
def _decode(q: list[Tensor], format: str, shape: list[int]) -> Tensor:
    parsed = Format.parse(format)
    return _call("decode", Request(q[0].device.type, (parsed,)), QTensor.from_tensors(q, parsed, _shape3(shape)))


@torch.library.register_fake("fqt::decode")
def _(q, format, shape):
    return q[0].new_empty(shape, dtype=torch.float32)


_OPERANDS = "Tensor[] a, str a_format, SymInt[] a_shape, Tensor[] b, str b_format, SymInt[] b_shape"


def _operands(
    a: list[Tensor], a_format: str, a_shape: list[int], b: list[Tensor], b_format: str, b_shape: list[int]
) -> tuple[QTensor, QTensor]:
    return (
        QTensor.from_tensors(a, Format.parse(a_format), _shape3(a_shape)),
        QTensor.from_tensors(b, Format.parse(b_format), _shape3(b_shape)),
    )


def _request(a: QTensor, b: QTensor, geometry: Geometry | None) -> Request:
    return Request(a.codes.device.type, (a.format, b.format), geometry)


@_operator(f"output({_OPERANDS}, Tensor? bias, SymInt[] geometry) -> Tensor")
def _output(a, a_format, a_shape, b, b_format, b_shape, bias, geometry) -> Tensor:
    x, w = _operands(a, a_format, a_shape, b, b_format, b_shape)
    window = Geometry.unflatten(geometry)
    return _call("output", _request(x, w, window), x, w, bias, window).contiguous()


@torch.library.register_fake("fqt::output")
def _(a, a_format, a_shape, b, b_format, b_shape, bias, geometry):
    window = Geometry.unflatten(geometry)
    positions = a_shape[1] if window is None else window.output_size[0] * window.output_size[1]
    return a[1].new_empty(a_shape[0], positions, b_shape[0])


@_operator(f"grad_input({_OPERANDS}, Tensor mask, SymInt[] x_shape, SymInt[] geometry) -> Tensor")
def _grad_input(a, a_format, a_shape, b, b_format, b_shape, mask, x_shape, geometry) -> Tensor:
    g, w = _operands(a, a_format, a_shape, b, b_format, b_shape)
    window = Geometry.unflatten(geometry)
    mask = mask if mask.numel() else None
    return _call("grad_input", _request(g, w, window), g, w, mask, window, _shape3(x_shape)).contiguous()


@torch.library.register_fake("fqt::grad_input")
def _(a, a_format, a_shape, b, b_format, b_shape, mask, x_shape, geometry):
    return a[1].new_empty(x_shape)


@_operator(f"grad_weight({_OPERANDS}, SymInt[] geometry) -> Tensor")
def _grad_weight(a, a_format, a_shape, b, b_format, b_shape, geometry) -> Tensor:
    g, x = _operands(a, a_format, a_shape, b, b_format, b_shape)
    window = Geometry.unflatten(geometry)
    return _call("grad_weight", _request(g, x, window), g, x, window).contiguous()


@torch.library.register_fake("fqt::grad_weight")
def _(a, a_format, a_shape, b, b_format, b_shape, geometry):
    window = Geometry.unflatten(geometry)
    taps, groups = (1, 1) if window is None else (window.kernel[0] * window.kernel[1], window.groups)
    return a[1].new_empty(a_shape[2], taps, b_shape[2] // groups)
