"""The parts of `gpu_check`: rows of what is compared with the reference and timed, on any device and with any clock."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fqt
from benchmarks.cases import coded, covering
from benchmarks.gpu_models import MODELS
from fqt import ops, reference
from fqt.formats import Format, Shape3
from fqt.geometry import Geometry
from fqt.ops import Kernel, Request
from fqt.qtensor import QTensor
from fqt.quantizers import build
from fqt.testing import assert_same_codes, assert_same_values

SIZES = (1024, 2048, 4096, 8192, 16384)
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
STEPS = ("resnet50", "vit_b_16", "resnet18", "vgg16", "gpt2_small")
RECIPES = ("int8", "fqt_1bit", "fqt_w1a1g4")
Row = dict[str, object]
Bench = Callable[[Callable[[], object]], float]
"""Milliseconds of a call."""


def serving(operator: str, device: str, formats: tuple[Format, ...], geometry: Geometry | None = None) -> list[Kernel]:
    """Every row of the table that serves this, the reference left out."""
    request = Request(device, formats, geometry)
    rows = [row for row in ops.KERNELS if row.operator == operator and row.device == device]
    return [row for row in rows if row.refuses(request) is None and not (row.native and ops.broken(row))]


def moved(q: QTensor, device: str) -> QTensor:
    codes, scale, offset, index = (None if t is None else t.to(device) for t in (q.codes, q.scale, q.offset, q.index))
    assert codes is not None and scale is not None
    return QTensor(codes, scale, offset, index, q.format, q.shape)


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
    first, second = {"output": (x, w), "grad_input": (g, w), "grad_weight": (g, x)}[operator]
    rest = {"output": (None, geometry), "grad_input": (None, geometry, x), "grad_weight": (geometry,)}[operator]
    return (coded(left, first, keep, device), coded(right, second, device=device), *rest)


def wrong(row: Kernel, args: tuple, device: str, **options: object) -> str:
    """The first difference of a product from the reference on the CPU, or "". options: further ones of the kernel."""
    there = (moved(arg, device) if isinstance(arg, QTensor) else arg for arg in args)
    actual, expected = ops.load(row.function)(*there, **options).cpu(), getattr(reference, row.operator)(*args)
    try:
        if row.exact:
            assert_same_values(actual, expected)
        else:
            scale = expected.abs().amax().item()
            torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2 * scale)
    except AssertionError as error:
        return " ".join(str(error).split())[:200]
    return ""


# --- parts -----------------------------------------------------------------------------------------------------------


def quantizers(device: str, bench: Bench, shape: Shape3 = (256, 1024, 256)) -> Iterator[Row]:
    """Quantizers against the bandwidth of a copy."""
    x, key = torch.randn(shape, device=device), torch.tensor(1)
    to = torch.empty_like(x)
    copy_ms = bench(lambda: to.copy_(x))
    bandwidth = 2 * x.nbytes / copy_ms  # bytes a millisecond
    yield {"part": "quantize", "name": "copy", "ms": copy_ms, "gbytes": bandwidth / 1e6}
    small = torch.randn(9, 65, 72)
    for operand, name, options in QUANTIZERS:
        quantizer = build(name, operand, **options)
        assert quantizer is not None
        format = quantizer.format(operand)
        asked = {
            "calibrate": quantizer.calibrate, "limits": quantizer.limits, "stochastic": quantizer.stochastic,
            "prune": quantizer.prune, "keep_one_in": quantizer.keep_one_in, "pass_range": quantizer.pass_range,
        }  # fmt: skip
        for kernel in serving("quantize", device, (format,)):
            row: Row = {"part": "quantize", "name": f"{name} {format.name}", "backend": kernel.label}
            function = ops.load(kernel.function)
            try:
                actual, _ = function(small.to(device), format, key=key.to(device), stream=2, **asked)
                assert_same_codes(actual, reference.quantize(small, format, key=key, stream=2, **asked)[0])
            except AssertionError as error:
                yield row | {"wrong": " ".join(str(error).split())[:200]}
                continue
            here = key.to(device)
            q, mask = function(x, format, key=here, stream=2, **asked)
            moves = x.nbytes + q.nbytes + (0 if mask is None else mask.nbytes)
            ms = bench(functools.partial(function, x, format, key=here, stream=2, **asked))
            yield row | {"ms": ms, "share": moves / ms / bandwidth}


def matmuls(device: str, bench: Bench, sizes: tuple[int, ...] = SIZES) -> Iterator[Row]:
    """torch's own products, then every kernel's."""
    bf16: dict[int, float] = {}
    for size in sizes:
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        bf16[size] = bench(functools.partial(torch.matmul, a, b))
        yield {"part": "products", "formats": "bf16 x bf16", "backend": "torch", "operator": "", "size": size, "ms": bf16[size]}
        for name, call in _own(size, device).items():
            row: Row = {"part": "products", "formats": name, "backend": "torch", "operator": "", "size": size}
            try:
                ms = bench(call)
                yield row | {"ms": ms, "ratio": bf16[size] / ms}
            except (RuntimeError, ValueError, NotImplementedError) as error:
                yield row | {"failed": " ".join(str(error).split())[:120]}
    for operator, left, right, keep in covering(PRODUCTS, device):
        formats = (Format.parse(left), Format.parse(right))
        named = f"{left} x {right}" + (f" kept {keep}" if keep < 1 else "")
        for kernel in serving(operator, device, formats):
            row = {"part": "products", "operator": operator, "formats": named, "backend": kernel.label}
            check = ((96, 1, 264), (160, 1, 264), (96, 1, 160))
            found = wrong(kernel, operands(operator, left, right, keep, check, None), device)
            if found:
                yield row | {"wrong": found}
                continue
            for size in sizes:
                args = operands(operator, left, right, keep, ((size, 1, size),) * 3, None, device)
                ms = bench(functools.partial(ops.load(kernel.function), *args))
                yield row | {"size": size, "ms": ms, "ratio": bf16[size] / ms}


def _own(size: int, device: str) -> dict[str, Callable[[], object]]:
    """torch's 8-bit products by name."""

    def scaled() -> object:
        return torch._scaled_mm(f8, f8.t(), one, one, out_dtype=torch.bfloat16)

    int8 = torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device)
    f8 = torch.randn(size, size, device=device).to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)
    return {"torch._int_mm": lambda: torch._int_mm(int8, int8.t()), "torch._scaled_mm": scaled}


def layers(device: str, bench: Bench, batch: int = 64, layers: tuple = LAYERS) -> Iterator[Row]:
    """Convolutions of two models, three products each, against torch's in bf16 and channels_last."""
    for model, inputs, outputs, size, window, stride in layers:
        pad = window // 2
        geometry = Geometry(size, size, (window, window), (stride, stride), (pad,) * 4, (1, 1), 1)
        out = geometry.output_size[0]
        name = f"{model} {window}x{window} {inputs}->{outputs} @{size}" + (f" /{stride}" if stride > 1 else "")
        row: Row = {"part": "layers", "name": name}
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
                    small, large = (
                        ((n, size**2, inputs), (outputs, window**2, inputs), (n, out**2, outputs)) for n in (2, batch)
                    )
                    found = wrong(kernel, operands(operator, left, right, 1.0, small, geometry), device)
                    if found:
                        yield here | {"wrong": found}
                        continue
                    args = operands(operator, left, right, 1.0, large, geometry, device)
                    ms = bench(functools.partial(ops.load(kernel.function), *args))
                    yield here | {"ms": ms, "torch_ms": torch_ms[operator], "ratio": torch_ms[operator] / ms}


def steps(device: str, bench: Bench, models: tuple[str, ...] = STEPS, recipes: tuple[str, ...] = RECIPES) -> Iterator[Row]:
    """Forward and backward of whole models, each recipe against bf16 autocast with torch.compile, and torchao where it is."""
    for name in models:
        row: Row = {"part": "steps", "name": name}
        try:
            plain, make_batch, loss = MODELS[name]()
        except ImportError as error:
            yield row | {"failed": f"absent: {error}"}
            continue
        plain, batch = plain.to(device), make_batch(device)
        baseline = copy.deepcopy(plain)
        bf16 = bench(_step(torch.compile(baseline) if device == "cuda" else baseline, batch, loss, device))
        yield row | {"recipe": "bf16 autocast" + " + compile" * (device == "cuda"), "ms": bf16}
        del baseline
        torch.compiler.reset()
        for recipe in recipes:
            here = row | {"recipe": recipe}
            try:
                model = fqt.convert(copy.deepcopy(plain), recipe)
                step = _step(model, batch, loss, device)
                eager = bench(step)
                ms = bench(_captured(step)) if device == "cuda" else eager
                backends = sorted({r.backend for r in fqt.summary(model).rows} - {"torch"})
                yield here | {"ms": ms, "eager_ms": eager, "ratio": bf16 / ms, "backend": " ".join(backends)}
            except (RuntimeError, ValueError) as error:
                yield here | {"failed": " ".join(str(error).split())[:160]}
        for peer, function in _torchao().items():
            try:
                model = function(copy.deepcopy(plain).bfloat16())
                ms = bench(_step(torch.compile(model), batch, loss, device))
                yield row | {"recipe": peer, "ms": ms, "ratio": bf16 / ms}
            except Exception as error:  # noqa: BLE001  whatever another library raises
                yield row | {"recipe": peer, "failed": " ".join(str(error).split())[:160]}


def _step(model: nn.Module, batch: tuple[Tensor, ...], loss: Callable, device: str) -> Callable[[], object]:
    def step() -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        with torch.autocast(device, torch.bfloat16):
            value = loss(model, *batch)
        value.backward()

    return step


def _captured(step: Callable[[], object]) -> Callable[[], object]:
    """The step as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _torchao() -> dict[str, Callable[[nn.Module], nn.Module]]:
    """torchao's trainings by name; none where it is not installed."""
    try:
        from torchao.float8 import convert_to_float8_training  # type: ignore[import-not-found]
        from torchao.prototype.quantized_training import int8_mixed_precision_training  # type: ignore[import-not-found]
        from torchao.quantization import quantize_  # type: ignore[import-not-found]
    except ImportError:
        return {}

    def int8(model: nn.Module) -> nn.Module:
        quantize_(model, int8_mixed_precision_training())
        return model

    return {"torchao int8": int8, "torchao float8": convert_to_float8_training}
