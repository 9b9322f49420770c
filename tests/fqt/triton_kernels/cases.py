"""Random cases of the Triton kernels against the reference on the CPU, on a device: "cpu" under the interpreter, or "cuda".

    TRITON_INTERPRET=1 python -m tests.fqt.triton_kernels.cases SEED quantize=COUNT ...

Triton decides when it is imported whether it interprets, so the interpreter has a process of its own. It computes with numpy:
rounding, wrapping and Philox are the same; races, alignment, registers and 8-bit tensor cores are not seen.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from fqt import convert, load_recipe, ops, reference
from fqt.formats import Format
from fqt.ops import NORM, PRODUCTS
from fqt.qtensor import QTensor, Scales
from fqt.quantizers import build
from fqt.reference import norm
from fqt.reference.norm import Source, Windows
from fqt.rows import Serves
from fqt.testing import assert_same_codes, assert_same_scales, assert_same_values
from fqt.triton_kernels import gather, plan, weight
from fqt.triton_kernels import norm as norm_kernels
from fqt.triton_kernels.decode import decode
from fqt.triton_kernels.quantize import calibrate, encode, quantize
from fqt.triton_kernels.rows import ROWS
from tests.fqt import random_cases, random_norm

_SMALL = (plan.Tile(16, 16, 32, 4, 2), plan.Tile(32, 16, 32, 4, 2))
"""Tiles of which small operands take several."""


def _quantizers() -> list:
    """The recipes' and the uniform ones, as the C++ kernels are tested with, and those that these have not."""
    found = [(quantizer, quantizer.format(operand)) for operand, quantizer in random_cases.built_in()]
    wide = [
        build("uniform", "g", bits=12, granularity="sample", stochastic=True),
        build("affine", "g", bits=16, granularity="channel"),
    ]
    floats = [
        build("float8", "g", grid=grid, granularity=granularity, stochastic=stochastic)
        for grid, granularity, stochastic in itertools.product(("e4m3", "e5m2"), ("tensor", "channel", "sample"), (False, True))
    ]
    found += [(quantizer, quantizer.format("g")) for quantizer in wide + 3 * floats]
    return [(quantizer, format) for quantizer, format in found if ROWS[0].refuses(ops.Request("cuda", (format,))) is None]


def fuzz_quantize(device: str, seed: int, count: int) -> None:
    """Random quantizers, shapes, values, layouts, folds, masks and given ranges."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    quantizers = _quantizers()
    for case in range(count):
        quantizer, format = draw.choice(quantizers)
        shape = (draw.choice((0, 1, 2, 5, 9)), draw.choice((0, 1, 2, 7, 9, 33)), draw.choice((0, 1, 3, 4, 8, 17, 65, 130)))
        x = random_cases.tensor(shape, draw.choice(random_cases.FILLS), draw.choice(random_cases.LAYOUTS), generator)
        options = random_cases.quantize_options(draw, generator, quantizer, x, format)
        expected, expected_mask = reference.quantize(x, format, **options)
        with _told(f"case {case}: {format.name}, {shape} {x.stride()} {x.dtype}, {options}"), _another_default():
            actual, mask = quantize(x.to(device), format, **{name: _to(value, device) for name, value in options.items()})
            assert_same_codes(actual, expected)
            assert_same_values(decode(actual), reference.decode(expected))
            assert (mask is None) == (expected_mask is None)
            assert expected_mask is None or torch.equal(mask.cpu(), expected_mask), "masks differ"


def fuzz_scales(device: str, seed: int, count: int) -> None:
    """Calibrating alone, and encoding by what it finds or by scales that no calibration makes."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    quantizers = _quantizers()
    for case in range(count):
        quantizer, format = draw.choice(quantizers)
        shape = (draw.choice((0, 1, 2, 5)), draw.choice((0, 1, 2, 7, 33)), draw.choice((0, 1, 3, 4, 17, 130)))
        x = random_cases.tensor(shape, draw.choice(random_cases.FILLS), draw.choice(random_cases.LAYOUTS), generator)
        options = random_cases.quantize_options(draw, generator, quantizer, x, format)
        asked = random_cases.calibration_options(options)
        made = reference.calibrate(x, format, **asked)
        given = made if draw.random() < 0.5 else random_cases.scales(x, format, options["fold"], draw, generator)
        key = options["key"] if options["stochastic"] else None
        expected = reference.encode(x, given, format, fold=options["fold"], key=key, stream=options["stream"])
        with _told(f"case {case}: {format.name}, {shape} {x.stride()} {x.dtype}, {options}, {given}"), _another_default():
            there = {name: _to(value, device) for name, value in asked.items()}
            assert_same_scales(calibrate(x.to(device), format, **there), made)
            there = {"fold": there["fold"], "key": _to(key, device), "stream": options["stream"]}
            actual = encode(x.to(device), _to(given, device), format, **there)
            assert_same_codes(given.of(actual.cpu(), format, shape), given.of(expected, format, shape))


def fuzz_prune(device: str, seed: int, count: int) -> None:
    """Pruning of few and many groups: equal ranges, a few wide ones, ranges of 0 and such that are not finite."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for case in range(count):
        groups, mode, b = draw.choice((1, 2, 7, 64, 65, 1100)), draw.choice(("bernoulli", "topk")), draw.choice((2, 3, 4, 8))
        kind = draw.choice(("heavy tails", "equal", "zeros", "infinite"))
        x = torch.randn(groups, 1, 3, generator=generator)
        if kind == "heavy tails":
            x = x * torch.randn(groups, 1, 1, generator=generator).mul(3).exp()
        elif kind == "equal":
            x = torch.ones_like(x)
        elif kind == "zeros":
            x[: groups // 2] = 0.0
        else:
            x[:: groups // 3 + 1] = float("inf")
        format, key = Format("uint", 4, "N", True), torch.tensor(case)
        options = {"calibrate": "minmax", "prune": mode, "keep_one_in": b, "stream": 4}
        with _told(f"case {case}: {groups} groups, {mode}, one in {b}, {kind}"), _another_default():
            actual, _ = quantize(x.to(device), format, key=key.to(device), **options)
            assert_same_codes(actual, reference.quantize(x, format, key=key, **options)[0])


def fuzz_products(device: str, seed: int, count: int) -> None:
    """Random layers, formats, pruning, masks and biases; tiles, cuts and sums of 64 bits where they would not be needed."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    served = 0
    while served < count:
        x_shape, w_shape, g_shape, geometry = random_cases.layer(draw)
        operator = draw.choice((*PRODUCTS, "accumulate"))
        serves = next(row.refuses for row in ROWS if (row.operator, row.variant) == (operator, ""))
        assert isinstance(serves, Serves)
        left, right = serves.draw(draw, geometry)
        terms = g_shape[1] * w_shape[1] * w_shape[2] * g_shape[2]
        if x_shape[0] * terms > 3e5:
            continue
        pruned = draw.random() < 0.4
        if operator == "grad_input":
            mask_shape = Format("sign", 1).packed_shape(x_shape)
            mask = draw.choice((None, torch.randint(256, mask_shape, generator=generator, dtype=torch.uint8)))
            coded = (
                random_cases.coded(left, g_shape, draw, generator, pruned),
                random_cases.coded(right, w_shape, draw, generator),
            )
            args = (*coded, mask, geometry, x_shape)
        elif operator == "grad_weight":
            coded = (
                random_cases.coded(left, g_shape, draw, generator, pruned),
                random_cases.coded(right, x_shape, draw, generator),
            )
            args = (*coded, geometry)
        else:
            bias = draw.choice((None, torch.randn(w_shape[0], generator=generator)))
            coded = random_cases.coded(left, x_shape, draw, generator), random_cases.coded(right, w_shape, draw, generator)
            args = (*coded, bias, geometry) if operator == "output" else (*coded, geometry)
        expected = getattr(reference, operator)(*args)
        rules = plan.Rules(
            tiles=draw.choice((_SMALL[:1], _SMALL[1:], plan.TILES)),
            processors=draw.choice((1, 132)),
            expand_from=draw.choice((0, 3, 10**9)),
            wide=draw.choice((plan.WIDE, 1 << 22)),
        )
        where = f"{operator} {left.name} x {right.name}, {x_shape}, {w_shape}, {geometry}, pruned {pruned}, {rules}"
        with _told(f"case {served}: {where}"), _another_default():
            kernel = getattr(weight if operator == "grad_weight" else gather, operator)
            assert_same_values(kernel(*(_to(arg, device) for arg in args), rules=rules), expected)
        served += 1


def fuzz_float8(device: str, seed: int, count: int) -> None:
    """Products of 8-bit floats: exact where every sum fits a float16's mantissa, else within 2^-10 of the sum of magnitudes."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for case in range(count):
        x_shape, w_shape, g_shape, geometry = random_cases.layer(draw)
        if 0 in (*x_shape, *w_shape, *g_shape) or x_shape[0] * g_shape[1] * w_shape[1] * w_shape[2] * g_shape[2] > 3e5:
            continue
        small = draw.random() < 0.5 and max(w_shape[1] * max(w_shape[2], w_shape[0]), g_shape[0] * g_shape[1]) < 1000
        formats = Format(draw.choice(("e4m3", "e5m2")), 8), Format(draw.choice(("e4m3", "e5m2")), 8)
        x, w, g = (_float8(formats[i], shape, small, generator) for i, shape in ((0, x_shape), (1, w_shape), (0, g_shape)))
        x_right = _float8(formats[1], x_shape, small, generator)
        calls = {
            "output": (x, w, None, geometry),
            "grad_input": (g, w, None, geometry, x_shape),
            "grad_weight": (g, x_right, geometry),
        }
        for operator, args in calls.items():
            kernel = getattr(weight if operator == "grad_weight" else gather, operator)
            with _told(
                f"case {case}: {operator} {formats[0].name} x {formats[1].name}, {x_shape}, {w_shape}, {geometry}, {small}"
            ):
                actual, expected = kernel(*(_to(arg, device) for arg in args)).cpu(), getattr(reference, operator)(*args)
                if small:
                    assert_same_values(actual, expected)
                else:
                    magnitudes = getattr(reference, operator)(*(_magnitude(arg) for arg in args))
                    assert bool(((actual - expected).abs() <= magnitudes * 2.0**-10).all()), (actual - expected).abs().max()


def _float8(format: Format, shape: tuple[int, int, int], small: bool, generator: torch.Generator) -> QTensor:
    x = torch.randn(shape, generator=generator)
    x = x.sign() * (x.abs() > 0.5) if small else x
    limits = (-1.0, 1.0) if small else (-4.0, 4.0)
    q, _ = reference.quantize(x, format, calibrate="none", limits=tuple(limit * format.code_range[1] for limit in limits))
    return replace(q, scale=torch.ones_like(q.scale))


def _magnitude(value: object) -> object:
    if not isinstance(value, QTensor):
        return value
    return replace(value, codes=value.codes & 127)


def fuzz_norm(device: str, seed: int, count: int) -> None:
    """Random sizes, values, codes and floats, windows, and samples that pruning emptied."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for case in range(count):
        operator = NORM[case % len(NORM)]
        height, width = draw.choice((1, 2, 3, 5, 8)), draw.choice((1, 2, 3, 4, 7))
        shape = (draw.choice((0, 1, 2, 3, 7)), height * width, draw.choice(random_norm.CHANNELS))
        source = random_norm.source(draw, shape, generator)
        affine, means = torch.randn(4, shape[2], generator=generator), torch.randn(2, shape[2], generator=generator)
        windows = Windows(height, width, draw.choice(random_norm.KERNEL_SIZES))
        down, across = windows.pooled_size
        g, kept = torch.randn(shape[0], down * across, shape[2], generator=generator), None
        if draw.random() < 0.5:
            kept = torch.rand(shape[0], generator=generator) < 0.5
            g[~kept] = 0.0
        args = {
            "norm_sums": (source,),
            "norm_value": (source, affine, windows),
            "norm_sign": (source, affine, windows, -1.0, draw.choice((1.0, 0.5))),
            "norm_grad_sums": (g, kept, source, affine, windows),
            "norm_grad": (g, kept, source, affine, windows, means),
        }[operator]
        expected = getattr(norm, operator)(*args)
        with _told(f"case {case}: {operator}, {shape}, {windows}, {source.y.dtype}"), _another_default():
            actual = getattr(norm_kernels, operator)(*(_to(arg, device) for arg in args))
            for one, other in zip(*(v if isinstance(v, tuple) else (v,) for v in (actual, expected)), strict=True):
                assert_same_values(one, other)


def fuzz_steps(device: str, seed: int, count: int) -> None:
    """Steps of a small network by random recipes, fused or not, through the operators: every gradient, bit for bit.

    Only under the interpreter: the rows of the table are taken for ones of the CPU.
    """
    assert device == "cpu"
    draw, rows = random.Random(seed), list(ops.KERNELS)
    ops.KERNELS[:] = [replace(row, device="cpu") if row.backend == "triton" else row for row in rows]
    try:
        for _ in range(count):
            name, fuse = draw.choice(random_cases.narrow_recipes()), draw.random() < 0.5
            actual, expected = (_step(name, backend, fuse) for backend in ("triton", "reference"))
            for one, other in zip(actual, expected, strict=True):
                with _told(f"{name}, fuse={fuse}"):
                    assert_same_values(one, other)
    finally:
        ops.KERNELS[:] = rows


def _step(name: str, backend: str, fuse: bool) -> list[Tensor]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.MaxPool2d(2), nn.Conv2d(16, 24, 1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(24 * 9, 10))
    x = torch.randn(3, 8, 6, 6).requires_grad_()
    model = convert(model, load_recipe(name).everywhere(), backend=backend, fuse=fuse)
    y = model(x)
    y.square().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@contextmanager
def _told(text: str) -> Iterator[None]:
    """Adds what was asked to an error."""
    try:
        yield
    except Exception as error:
        error.add_note(text)
        raise


@contextmanager
def _another_default() -> Iterator[None]:
    """What a kernel writes has the dtype that it says, whatever torch's default is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _to(value: object, device: str) -> object:
    """Tensors, and what holds some, on a device; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, QTensor | Scales | Source):
        return replace(value, **{name: _to(part, device) for name, part in vars(value).items()})
    if isinstance(value, tuple):
        return tuple(_to(part, device) for part in value)
    return value


FAMILIES = {
    "quantize": fuzz_quantize, "scales": fuzz_scales, "prune": fuzz_prune, "products": fuzz_products, "float8": fuzz_float8,
    "norm": fuzz_norm, "steps": fuzz_steps,
}  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(1)
    seed_ = int(sys.argv[1])
    for asked in sys.argv[2:]:
        family, _, count_ = asked.partition("=")
        FAMILIES[family]("cpu", seed_, int(count_))
        print(f"{family}: {count_} cases equal the reference", flush=True)
