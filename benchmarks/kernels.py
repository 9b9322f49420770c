"""How fast are the kernels, against torch's float32 on the same shapes, in the same run?

    python -m benchmarks.kernels [--threads T] [--batch 16] [--json F] [--quick]

Products: a matrix product of 1024^3 and VGG-16's 3x3 layers, each against torch (of a convolution the faster of NCHW and
channels_last). Quantizers: layers' activations (channels_last, --batch and 128 images) and weights, against a copy of the same
tensor (`to.copy_(x)`). Both sides are called in turns and the fastest
call of each counts: other processes only ever add. Before anything is measured every kernel is compared with the reference, bit
for bit: if one differs, no figure.
On a processor with AVX-512 both sides use it: to see the machines without, set
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 in the environment.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import coded, covering
from benchmarks.common import table, write_json
from fqt import ops, reference
from fqt.cpu import library
from fqt.formats import Format, Shape3
from fqt.geometry import Geometry
from fqt.quantizers import build
from fqt.quantizers import quantize as encode
from fqt.testing import assert_same_codes, assert_same_values

VGG16 = ((64, 64, 32), (64, 128, 16), (128, 128, 16), (128, 256, 8), (256, 256, 8), (256, 512, 4), (512, 512, 4), (512, 512, 2))
PRODUCTS = (
    ("output", "sign", "sign:O", 1.0),
    ("grad_input", "uint4+:N", "sign", 1.0),
    ("grad_input", "uint4+:N", "sign", 0.25),
    ("grad_input", "uint6+:N", "sign", 1.0),
    ("grad_weight", "uint4+:C", "sign", 1.0),
    ("grad_weight", "uint4+:C", "sign", 0.25),
    ("grad_weight", "uint6+:C", "sign", 1.0),
    ("grad_weight", "uint4+:NC", "sign", 1.0),
    ("output", "int8:N", "int8:O", 1.0),
    ("grad_input", "int8:N", "int8", 1.0),
    ("grad_weight", "int8:C", "int8", 1.0),
    ("output", "fixed12", "fixed12", 1.0),
    ("output", "fixed16", "fixed16", 1.0),
    ("grad_input", "int8:N", "fixed16", 1.0),
    ("grad_weight", "int8:C", "fixed16", 1.0),
    ("output", "uint2", "sign", 1.0),
    ("grad_weight", "uint6+:N", "uint2", 1.0),
)
QUANTIZERS = (
    ("x", "xnor_activation", {}),
    ("x", "dorefa_activation", {"bits": 2}),
    ("x", "uniform", {"bits": 8}),
    ("x", "fixed_point", {"word_length": 16, "fraction_length": 8}),
    ("x", "fixed_point", {"word_length": 32, "fraction_length": 24}),
    ("g", "uniform", {"bits": 8, "granularity": "sample"}),
    ("g", "uniform", {"bits": 8, "granularity": "channel"}),
    ("g", "uniform", {"bits": 8, "granularity": "sample", "stochastic": True}),
    ("g", "psq", {"bits": 4, "granularity": "sample"}),
    ("g", "psq", {"bits": 4, "granularity": "sample_channel"}),
    ("g", "agp", {"bits": 4, "granularity": "sample", "mode": "bernoulli"}),
    ("g", "agp", {"bits": 4, "granularity": "channel", "mode": "bernoulli"}),
    ("w", "xnor_weight", {}),
    ("w", "uniform", {"bits": 8, "granularity": "channel"}),
)
ACTIVATIONS = ((1024, 64), (256, 128), (64, 256), (16, 512))  # positions, channels of a sample of VGG-16's
WEIGHTS = ("512 x 3x3 x 512", "512 x 3x3 x 512, contiguous", "4096 x 4096", "64 x 64")


def fastest(functions: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Milliseconds of the fastest call of each, called in turns for some seconds (at least 5 times) after a warm-up."""
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    start = time.perf_counter()
    while len(times[0]) < 5 or time.perf_counter() - start < seconds:
        for function, spent in zip(functions, times, strict=True):
            begin = time.perf_counter()
            function()
            spent.append(1e3 * (time.perf_counter() - begin))
    return [min(spent) for spent in times]


def layer(n: int, inputs: int, outputs: int, size: int) -> tuple[Shape3, Shape3, Shape3, Geometry | None]:
    """Shapes of x, w and g: of a linear layer where size is 0, else of a 3x3 convolution of size x size images."""
    if size == 0:
        return (n, 1, inputs), (outputs, 1, inputs), (n, 1, outputs), None
    geometry = Geometry(size, size, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1)
    return (n, size**2, inputs), (outputs, 9, inputs), (n, size**2, outputs), geometry


def low_bit(
    operator: str, left: str, right: str, keep: float, shapes: tuple[Shape3, Shape3, Shape3, Geometry | None]
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The kernel that serves a product, and the reference, on the same random codes."""
    x_shape, w_shape, g_shape, geometry = shapes
    if operator == "output":
        args = (coded(left, x_shape), coded(right, w_shape), None, geometry)
    elif operator == "grad_input":
        mask = torch.randint(256, Format("sign", 1).packed_shape(x_shape), dtype=torch.uint8)
        args = (coded(left, g_shape, keep), coded(right, w_shape), mask, geometry, x_shape)
    else:
        args = (coded(left, g_shape, keep), coded(right, x_shape), geometry)
    kernel, reasons = ops.select(operator, ops.Request("cpu", (Format.parse(left), Format.parse(right)), geometry))
    if kernel.backend == "reference":
        sys.exit(f"{operator} of {left} and {right} is not served by a kernel: {'; '.join(map(str, reasons))}")
    return lambda: ops.load(kernel.function)(*args), lambda: getattr(reference, operator)(*args)


def floats(operator: str, n: int, inputs: int, outputs: int, size: int) -> list[Callable[[], object]]:
    """The same product by torch in float32."""
    if size == 0:
        x, w, g = torch.randn(n, inputs), torch.randn(outputs, inputs), torch.randn(n, outputs)
        return [{"output": lambda: x @ w.T, "grad_input": lambda: g @ w, "grad_weight": lambda: g.T @ x}[operator]]
    functions: list[Callable[[], object]] = []
    wanted = (operator == "grad_input", operator == "grad_weight", False)
    for memory in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(n, inputs, size, size).to(memory_format=memory)
        w = torch.randn(outputs, inputs, 3, 3).to(memory_format=memory)
        g = torch.randn(n, outputs, size, size).to(memory_format=memory)
        if operator == "output":
            functions.append(lambda x=x, w=w: F.conv2d(x, w, None, 1, 1))
        else:
            functions.append(
                lambda x=x, w=w, g=g: torch.ops.aten.convolution_backward(
                    g, x, w, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, wanted
                )
            )
    return functions


def activations(batch: int) -> dict[str, Tensor]:
    """(N, P, C) tensors of VGG-16's layers by name."""
    return {f"{n} x {p} x {c}": torch.randn(n, p, c) for n in sorted({batch, 128}) for p, c in ACTIVATIONS}


def weights() -> dict[str, Tensor]:
    """(O, K, I) tensors by the names of `WEIGHTS`, a convolution's as layers hand them over."""
    image = torch.randn(512, 512, 3, 3)
    found = (image.to(memory_format=torch.channels_last), image, torch.randn(4096, 4096, 1), torch.randn(64, 64, 1))
    return {name: w.flatten(2).transpose(1, 2) for name, w in zip(WEIGHTS, found, strict=True)}


def check() -> None:
    """Every kernel that is measured equals the reference, on every shape, two images of each (raises AssertionError)."""
    for inputs, outputs, size in ((1024, 1024, 0), *VGG16):
        shapes = layer(64 if size == 0 else 2, inputs, outputs, size)
        for operator, left, right, keep in covering(PRODUCTS, "cpu"):
            kernel, expected = low_bit(operator, left, right, keep, shapes)
            assert_same_values(kernel(), expected())
    x, key = torch.randn(16, 64, 64), torch.tensor(1)
    for operand, name, options in QUANTIZERS:
        quantizer = build(name, operand, **options)
        assert quantizer is not None
        q, mask = encode(x, quantizer, operand, key=key)
        wanted, wanted_mask = reference.quantize(
            x, q.format, calibrate=quantizer.calibrate, limits=quantizer.limits, stochastic=quantizer.stochastic,
            prune=quantizer.prune, keep_one_in=quantizer.keep_one_in, key=key, pass_range=quantizer.pass_range,
        )  # fmt: skip
        assert_same_codes(q, wanted)
        assert wanted_mask is None or torch.equal(mask, wanted_mask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=16, help="of VGG-16's layers")
    parser.add_argument("--quick", action="store_true", help="the matrix product and two layers, briefly")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    reason = library.refuses()
    if reason is not None:
        sys.exit(reason)
    used = library.operators().instruction_set()
    check()
    print(f"all kernels equal the reference; {used}, {args.threads} threads\n")
    seconds = 0.02 if args.quick else 1.0
    layers = ((1024, 1024, 0), *(VGG16[::6] if args.quick else VGG16))
    rows: list[dict[str, object]] = []
    for inputs, outputs, size in layers:
        n = 1024 if size == 0 else args.batch
        shapes = layer(n, inputs, outputs, size)
        macs = n * inputs * outputs * (9 * size**2 if size else 1)
        name = f"{n} x {inputs} -> {outputs}" + (f", 3x3 on {size}x{size}" if size else "")
        for operator, left, right, keep in covering(PRODUCTS, "cpu"):
            if size == 0 and operator == "grad_weight" and left.endswith((":N", ":NC")):
                continue  # a sample is one row: its block has nothing to sum
            kernel, _ = low_bit(operator, left, right, keep, shapes)
            ms, *floats_ms = fastest([kernel, *floats(operator, n, inputs, outputs, size)], seconds)
            fp32_ms = min(floats_ms)
            rows.append(
                {"product": operator, "layer": name, "left": left, "right": right, "kept": keep, "threads": args.threads,
                 "instruction_set": used, "ms": ms, "fp32_ms": fp32_ms, "gmacs": macs / ms / 1e6,
                 "fp32_gmacs": macs / fp32_ms / 1e6, "ratio": fp32_ms / ms}
            )  # fmt: skip
    print(
        table(
            ["product", "layer", "formats", "kept", "ms", "G madds/s", "fp32 ms", "fp32 G madds/s", "times fp32"],
            [
                [row["product"], row["layer"], f"{row['left']} x {row['right']}", row["kept"], f"{row['ms']:.2f}",
                 f"{row['gmacs']:.0f}", f"{row['fp32_ms']:.2f}", f"{row['fp32_gmacs']:.0f}", f"{row['ratio']:.1f}"]
                for row in rows
            ],
        )
    )  # fmt: skip
    passes = []
    key = torch.tensor(1)
    tensors = {"x": activations(args.batch), "g": activations(args.batch), "w": weights()}
    for operand, name, options in QUANTIZERS:
        quantizer = build(name, operand, **options)
        assert quantizer is not None
        for size, x in list(tensors[operand].items())[:: 7 if args.quick else 1]:
            to = torch.empty_like(x)
            run = functools.partial(encode, x, quantizer, operand, key=key)
            ms, copy_ms = fastest([run, functools.partial(to.copy_, x)], seconds / 4)
            passes.append(
                {"quantizer": name, "format": quantizer.format(operand).name,
                 "rounding": "stochastic" if quantizer.stochastic else "nearest", "kept": 1 / quantizer.keep_one_in,
                 "size": size, "threads": args.threads, "instruction_set": used,
                 "ms": ms, "copy_ms": copy_ms, "gbytes": x.numel() * 4 / ms / 1e6, "ratio": ms / copy_ms}
            )  # fmt: skip
    print()
    print(
        table(
            ["quantizer", "format", "rounding", "kept", "size", "ms", "GB/s read", "copy ms", "times a copy"],
            [
                [row["quantizer"], row["format"], row["rounding"], row["kept"], row["size"], f"{row['ms']:.3f}",
                 f"{row['gbytes']:.1f}", f"{row['copy_ms']:.3f}", f"{row['ratio']:.2f}"]
                for row in passes
            ],
        )
    )  # fmt: skip
    if args.json:
        write_json(args.json, [*rows, *passes])


if __name__ == "__main__":
    main()
