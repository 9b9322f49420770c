"""The parts of `gpu_check` that time kernels, as tasks: a name, and a function that yields rows.

Each kernel is compared with the reference on small operands before it is timed, with the tile that the large ones take.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Product, coded, covering
from benchmarks.gpu_asked import ASKED
from benchmarks.gpu_machine import Machine
from fqt import ops, reference, selfcheck
from fqt.formats import Format, Shape3
from fqt.geometry import Geometry
from fqt.ops import Kernel, Request
from fqt.quantizers import build
from fqt.testing import assert_same_codes, assert_same_values

SIZES = (8192, 4096, 1024)
QUANTIZERS = (
    ("x", "xnor_activation", {}),
    ("x", "dorefa_activation", {"bits": 2}),
    ("x", "uniform", {"bits": 8, "granularity": "sample"}),
    ("g", "uniform", {"bits": 8, "granularity": "channel", "stochastic": True}),
    ("g", "psq", {"bits": 4, "granularity": "sample"}),
    ("g", "psq", {"bits": 4, "granularity": "sample_channel"}),
    ("g", "agp", {"bits": 4, "granularity": "sample"}),
    ("g", "agp", {"bits": 4, "granularity": "channel"}),
    ("g", "float8", {"grid": "e5m2"}),
)
PRODUCTS = (
    ("output", "sign", "sign:O", 1.0),
    ("grad_input", "uint4+:N", "sign", 1.0),
    ("grad_input", "uint4+:N", "sign", 0.25),
    ("grad_weight", "uint4+:C", "sign", 1.0),
    ("output", "uint4", "int4:O", 1.0),
    ("output", "int8:N", "int8:O", 1.0),
    ("grad_input", "int8:N", "int8", 1.0),
    ("grad_weight", "int8:C", "int8", 1.0),
    ("output", "e4m3", "e4m3:O", 1.0),
    ("grad_input", "e5m2:N", "e4m3", 1.0),
)
# model, inputs, outputs, size of the image, window, stride
LAYERS = (
    ("VGG-16", 128, 128, 112, 3, 1),
    ("VGG-16", 256, 256, 56, 3, 1),
    ("VGG-16", 512, 512, 28, 3, 1),
    ("ResNet-50", 64, 64, 56, 3, 1),
    ("ResNet-50", 128, 128, 56, 3, 2),
    ("ResNet-50", 256, 1024, 14, 1, 1),
    ("ResNet-50", 512, 512, 7, 3, 1),
)
LAYER_FORMATS = {
    "fqt_1bit": (("sign", "sign:O"), ("uint4+:N", "sign"), ("uint4+:C", "sign")),
    "int8": (("int8:N", "int8:O"), ("int8:N", "int8"), ("int8:C", "int8")),
}
WINDOW = Geometry(12, 12, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1)
CHECKED = 256  # a size of operands that Triton compiles no other program for than for larger ones
Row = dict[str, object]
Task = tuple[str, Callable[[], Iterator[Row]]]


def serving(operator: str, device: str, formats: tuple[Format, ...], geometry: Geometry | None = None) -> list[Kernel]:
    """Every row of the table that serves this, the reference left out."""
    request = Request(device, formats, geometry)
    rows = [row for row in ops.KERNELS if row.operator == operator and row.device == device and row.backend != "reference"]
    return [row for row in rows if row.refuses(request) is None]


def checked(geometry: Geometry | None) -> tuple[Shape3, Shape3, Shape3]:
    """Shapes of x, w and g on which a product is compared with the reference."""
    if geometry is None:
        return ((CHECKED, 1, CHECKED),) * 3
    outputs = geometry.output_size[0] * geometry.output_size[1]
    taps = geometry.kernel[0] * geometry.kernel[1]
    return (2, geometry.height * geometry.width, 64), (64, taps, 64), (2, outputs, 64)


def operands(
    operator: str,
    left: str,
    right: str,
    keep: float,
    shapes: tuple[Shape3, ...],
    geometry: Geometry | None,
    device: str = "cpu",
) -> tuple:
    """A product's arguments. shapes: of x, w and g."""
    x, w, g = shapes
    first, second = {"grad_input": (g, w), "grad_weight": (g, x)}.get(operator, (x, w))
    rest = {"output": (None, geometry), "grad_input": (None, geometry, x)}.get(operator, (geometry,))
    return (coded(left, first, keep, device), coded(right, second, device=device), *rest)


def wrong(row: Kernel, args: tuple, device: str, **options: object) -> str:
    """The first difference of a product from the reference on the CPU, or "". options: further ones of the kernel."""
    actual = ops.load(row.function)(*selfcheck.moved(args, device), **options).cpu()
    expected = getattr(reference, row.operator)(*args)
    try:
        if row.exact:
            assert_same_values(actual, expected)
        else:
            scale = expected.abs().amax().item()
            torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2 * scale)
    except AssertionError as error:
        return " ".join(str(error).split())[:200]
    return ""


def asked_of(quantizer) -> dict[str, Any]:
    """What a quantizer asks of the operator `quantize`."""
    names = ("calibrate", "limits", "stochastic", "prune", "keep_one_in", "pass_range")
    return {name: getattr(quantizer, name) for name in names}


def quantizers(machine: Machine) -> Iterator[Task]:
    """Quantizers against the bandwidth of a copy."""
    x = torch.randn((4, 16, 16) if machine.small else (256, 1024, 256), device=machine.device)
    yield "copy", functools.partial(_copied, machine, x)
    for operand, name, options in QUANTIZERS:
        quantizer = build(name, operand, **options)
        assert quantizer is not None
        label = f"{name} {quantizer.format(operand).name}"
        yield label, functools.partial(_quantized, machine, x, label, quantizer, quantizer.format(operand))


def _copied(machine: Machine, x: Tensor) -> Iterator[Row]:
    to = torch.empty_like(x)
    ms = machine.bench(lambda: to.copy_(x))
    yield {"name": "copy", "ms": ms, "bytes": 2 * x.nbytes}


def _quantized(machine: Machine, x: Tensor, label: str, quantizer, format: Format) -> Iterator[Row]:
    small = torch.randn((3, 9, 20) if machine.small else (9, 65, 72))
    key, asked = torch.tensor(1), asked_of(quantizer)
    for kernel in serving("quantize", machine.device, (format,)):
        row: Row = {"name": label, "backend": kernel.label}
        call = functools.partial(ops.load(kernel.function), format=format, key=key.to(machine.device), stream=2, **asked)
        try:
            assert_same_codes(
                call(small.to(machine.device))[0], reference.quantize(small, format, key=key, stream=2, **asked)[0]
            )
        except AssertionError as error:
            yield row | {"wrong": " ".join(str(error).split())[:200]}
            continue
        q, mask = call(x)
        bytes = x.nbytes + q.nbytes + (0 if mask is None else mask.nbytes)
        yield row | {"ms": machine.bench(functools.partial(call, x)), "bytes": bytes}


def products(machine: Machine, asked: Sequence[Product] = PRODUCTS) -> Iterator[Task]:
    """torch's own products of a size, then every kernel's; the largest size first."""
    for size in (32,) if machine.small else SIZES:
        yield f"torch {size}", functools.partial(_torch_products, machine, size)
        for product in covering(asked, machine.device):
            operator, left, right, keep = product
            named = f"{left} x {right}" + (f" kept {keep}" if keep < 1 else "")
            for kernel in serving(operator, machine.device, (Format.parse(left), Format.parse(right))):
                row: Row = {"operator": operator, "formats": named, "backend": kernel.label, "size": size}
                task = functools.partial(_multiplied, machine, kernel, product, row)
                yield f"{operator} {named} {kernel.label} {size}", task


def _torch_products(machine: Machine, size: int) -> Iterator[Row]:
    a, b = (torch.randn(size, size, device=machine.device, dtype=torch.bfloat16) for _ in range(2))
    calls = {"bf16 x bf16": functools.partial(torch.matmul, a, b)} | _own(size, machine.device)
    for name, call in calls.items():
        row: Row = {"formats": name, "backend": "torch", "operator": "", "size": size}
        try:
            yield row | {"ms": machine.bench(call)}
        except (RuntimeError, ValueError, NotImplementedError) as error:
            yield row | {"absent": " ".join(str(error).split())[:120]}


def _multiplied(machine: Machine, kernel: Kernel, product: Product, row: Row) -> Iterator[Row]:
    operator, left, right, keep = product
    size, function = int(str(row["size"])), ops.load(kernel.function)
    args = operands(operator, left, right, keep, ((size, 1, size),) * 3, None, machine.device)
    options = forced(kernel, function, args)
    found = wrong(kernel, operands(operator, left, right, keep, checked(None), None), machine.device, **options)
    yield row | ({"wrong": found} if found else {"ms": machine.bench(functools.partial(function, *args))})


def forced(kernel: Kernel, function: Callable, args: tuple) -> dict[str, Any]:
    """The option of a kernel that lets any operands take the tile that these take; none for a kernel without tiles."""
    if kernel.backend not in ASKED:
        return {}
    rules = ASKED[kernel.backend]()
    function(*args, rules=rules)
    return {"rules": replace(rules, tiles=(rules.found[0],))}


def _own(size: int, device: str) -> dict[str, Callable[[], object]]:
    """torch's 8-bit products by name."""

    def scaled() -> object:
        return torch._scaled_mm(f8, f8.t(), one, one, out_dtype=torch.bfloat16)

    int8 = torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device)
    f8 = torch.randn(size, size, device=device).to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)
    return {"torch._int_mm": lambda: torch._int_mm(int8, int8.t()), "torch._scaled_mm": scaled}


def layers(machine: Machine, layers: tuple = LAYERS) -> Iterator[Task]:
    """Convolutions of two models, three products each, against torch's in bf16 and channels_last."""
    for model, inputs, outputs, size, window, stride in (("small", 8, 16, 8, 3, 2),) if machine.small else layers:
        name = f"{model} {window}x{window} {inputs}->{outputs} @{size}" + (f" /{stride}" if stride > 1 else "")
        yield name, functools.partial(_layer, machine, name, inputs, outputs, size, window, stride)


def _layer(machine: Machine, name: str, inputs: int, outputs: int, size: int, window: int, stride: int) -> Iterator[Row]:
    device, bench, batch = machine.device, machine.bench, 2 if machine.small else 64
    pad = window // 2
    geometry = Geometry(size, size, (window, window), (stride, stride), (pad,) * 4, (1, 1), 1)
    out = geometry.output_size[0]
    row: Row = {"name": name}
    x = torch.randn(batch, inputs, size, size, device=device, dtype=torch.bfloat16)
    w = torch.randn(outputs, inputs, window, window, device=device, dtype=torch.bfloat16)
    g = torch.randn(batch, outputs, out, out, device=device, dtype=torch.bfloat16)
    x, w, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, w, g))

    fixed = (None, (stride, stride), (pad, pad), (1, 1), False, (0, 0), 1)
    backward = functools.partial(torch.ops.aten.convolution_backward, g, x, w, *fixed)
    torch_ms = {
        "output": bench(functools.partial(F.conv2d, x, w, None, stride, pad)),
        "grad_input": bench(functools.partial(backward, (True, False, False))),
        "grad_weight": bench(functools.partial(backward, (False, True, False))),
    }
    for recipe, pairs in LAYER_FORMATS.items():
        for operator, (left, right) in zip(torch_ms, pairs, strict=True):
            for kernel in serving(operator, device, (Format.parse(left), Format.parse(right)), geometry):
                here = row | {"recipe": recipe, "operator": operator, "backend": kernel.label}
                small, large = (((n, size**2, inputs), (outputs, window**2, inputs), (n, out**2, outputs)) for n in (2, batch))
                function, args = ops.load(kernel.function), operands(operator, left, right, 1.0, large, geometry, device)
                options = forced(kernel, function, args)
                found = wrong(kernel, operands(operator, left, right, 1.0, small, geometry), device, **options)
                if found:
                    yield here | {"wrong": found}
                    continue
                ms = bench(functools.partial(function, *args))
                yield here | {"ms": ms, "torch_ms": torch_ms[operator], "ratio": torch_ms[operator] / ms}
