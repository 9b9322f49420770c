"""Random tensors, quantizers, layers and codes: what the fuzz of kernels is made of."""

from __future__ import annotations

import itertools
import random

import torch
from torch import Tensor

from fqt import reference
from fqt.formats import Format, Shape3
from fqt.geometry import Geometry
from fqt.qtensor import QTensor, Scales, codes_dtype
from fqt.quantizers import Quantizer, build
from fqt.recipe import LEFT_RIGHT
from fqt.recipe_yaml import load_recipe, recipes
from fqt.reference import pack
from fqt.reference.pruning import kept_index

SIZES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65)
QUANTIZE_SIZES = (0, *SIZES, 32, 127, 128, 129)
FILLS = ("normal", "nan", "inf", "tiny", "constant", "zeros", "huge", "negative zero")
LAYOUTS = ("contiguous", "channels_first", "one position", "one channel", "sliced", "transposed", "part", "bfloat16")


def narrow_recipes(bits: int = 8) -> list[str]:
    """Built-in recipes whose products all have operands of at most so many bits: those that GPUs multiply in codes."""
    found = []
    for name in recipes():
        recipe = load_recipe(name).everywhere()
        quantizers = [recipe.quantizer(product, letter) for product, letters in LEFT_RIGHT.items() for letter in letters]
        if any(quantizers) and all(quantizer is None or quantizer.bits <= bits for quantizer in quantizers):
            found.append(name)
    return found


def built_in() -> list[tuple[str, Quantizer]]:
    """Each quantizer of each recipe, and each width and granularity of the uniform ones: (operand, quantizer)."""
    found = {
        (letter, quantizer)
        for recipe in map(load_recipe, recipes())
        for product, letters in LEFT_RIGHT.items()
        for letter in letters
        if (quantizer := recipe.quantizer(product, letter)) is not None
    }
    granularities = ("tensor", "sample", "token", "channel", "sample_channel")
    for name, bits, granularity, stochastic in itertools.product(
        ("uniform", "affine"), range(1, 9), granularities, (False, True)
    ):
        if (name, bits) != ("uniform", 1):
            found.add(("g", build(name, "g", bits=bits, granularity=granularity, stochastic=stochastic)))
    for name, bits, granularity, stochastic in itertools.product(
        ("uniform", "affine"), (9, 12, 16), granularities, (False, True)
    ):
        found.add(("g", build(name, "g", bits=bits, granularity=granularity, stochastic=stochastic)))
    for word_length, stochastic in itertools.product((1, 5, 8, 9, 13, 16, 17, 22, 23, 24, 25, 31, 32), (False, True)):
        for fraction_length in (3, word_length - 2):
            x = {"word_length": word_length, "fraction_length": fraction_length, "stochastic": stochastic}
            found.add(("x", build("fixed_point", "x", **x)))
    found.add(("w", build("ternary_weight", "w")))
    return sorted(found, key=str)


def tensor(shape: Shape3, fill: str, layout: str, generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, shape[2], generator=generator) * 3
    if fill in ("nan", "inf") and x.numel():
        x.view(-1)[int(torch.randint(x.numel(), (), generator=generator))] = float(fill)
    x = {"tiny": x * 1e-33, "constant": torch.full_like(x, 0.3), "zeros": torch.zeros_like(x), "huge": x * 2e37}.get(fill, x)
    x = x.clamp(max=0) * -0.0 if fill == "negative zero" else x
    if layout == "channels_first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "one position":
        return x[:, :1].expand(shape)
    if layout == "one channel":
        return x[:, :, :1].expand(shape)
    if layout == "sliced":
        return torch.stack([x, x + 1], 3).flatten(2)[:, :, ::2]
    if layout == "transposed":
        return x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    if layout == "part":
        return torch.cat([x, x + 1], 2)[:, :, : shape[2]]
    return x.bfloat16() if layout == "bfloat16" else x


def quantize_options(
    draw: random.Random, generator: torch.Generator, quantizer: Quantizer, x: torch.Tensor, format: Format
) -> dict:
    """Random keywords of `reference.quantize` beside the quantizer's own."""
    shape = x.shape
    fold_shape = draw.choice([None, None, (1, 1, shape[2]), (shape[0], 1, 1), (shape[0], shape[1], 1)])
    options = {
        "calibrate": quantizer.calibrate,
        "limits": quantizer.limits,
        "stochastic": quantizer.stochastic,
        "prune": quantizer.prune,
        "keep_one_in": quantizer.keep_one_in,
        "pass_range": draw.choice([None, (-1.0, 1.0), (0.0, 0.5)]),
        "fold": None if fold_shape is None else torch.rand(fold_shape, generator=generator),
        "key": torch.randint(-(2**63), 2**63 - 1, (), generator=generator),
        "stream": draw.randrange(0, 16, 2),
    }
    if draw.random() < 0.3:
        folded = x.float() if fold_shape is None else x.float() * options["fold"]
        options["ranges"] = reference.group_range(reference.group_rows(folded, format))
    return options


def calibration_options(options: dict) -> dict:
    """Those keywords of `quantize_options` that `reference.calibrate` takes."""
    return {name: value for name, value in options.items() if name not in ("stochastic", "pass_range")}


def scales(x: Tensor, format: Format, fold: Tensor | None, draw: random.Random, generator: torch.Generator) -> Scales:
    """Scales of a tensor that no built-in calibration makes, as of a learned step: one step for all groups or one for each,
    offsets anywhere, groups without a range, groups left out. A group that holds a NaN cannot be encoded."""
    rows_GE = reference.group_rows(x.float() if fold is None else x.float() * fold, format)
    groups = rows_GE.shape[0]
    scale = torch.rand(1 if draw.random() < 0.5 else groups, generator=generator).expand(groups) * 0.3 + 0.01
    inverse = 1 / scale
    offset = torch.randn(groups, generator=generator) if format.offset else None
    flat = rows_GE.isfinite().all(1) & (torch.rand(groups, generator=generator) < 0.1)
    scale, inverse = torch.where(flat, 0.0, scale), torch.where(flat, 0.0, inverse)
    bad = rows_GE.isnan().any(1)
    scale, inverse = torch.where(bad, torch.nan, scale), torch.where(bad, 0.0, inverse)
    if draw.random() < 0.6:
        return Scales(scale, inverse, offset)
    kept = torch.rand(groups, generator=generator) < draw.choice((0.0, 0.4, 1.0))
    factor = torch.where(kept, 1 + torch.rand(groups, generator=generator), 0.0)
    return Scales(scale, inverse, offset, factor, kept_index(kept.nonzero().flatten(), groups))


def coded(format: Format, shape: Shape3, draw: random.Random, generator: torch.Generator, pruned: bool = False) -> QTensor:
    """A quantized tensor of random codes and scales, now and then NaN; pruned: only some of its groups, at times none, kept."""
    groups = format.groups(shape)
    elements = shape[0] * shape[1] * shape[2] // max(groups, 1)
    low, high = format.code_range
    codes = torch.randint(low, high + 1, (groups, elements), generator=generator)
    if draw.random() < 0.3:
        codes = torch.where(codes < (low + high) / 2, low, high)
    stored = (codes + 1) // 2 if format.grid == "sign" else codes % 2 ** min(format.storage_bits, 8)
    stored = (codes if format.storage_bits > 8 else stored).to(codes_dtype(format))
    scale = torch.rand(groups, generator=generator) + 0.1
    offset = torch.randn(groups, generator=generator) if format.offset else None
    if groups and draw.random() < 0.1:
        scale[draw.randrange(groups)] = float("nan")
    index = None
    if pruned:
        keep = torch.rand(groups, generator=generator) < draw.choice((0.0, 0.3, 0.6, 1.0))
        kept = keep.nonzero().flatten()
        index = torch.full((groups,), -1, dtype=torch.int32)
        index[: kept.numel()] = kept.int()
        scale = torch.where(keep, scale, 0.0)
        offset = None if offset is None else torch.where(keep, offset, 0.0)
    return QTensor(pack(stored, format, shape), scale, offset, index, format, shape)


def layer(draw: random.Random) -> tuple[Shape3, Shape3, Shape3, Geometry | None]:
    """Shapes of x, w and g of a random linear layer or convolution, and its geometry."""
    n = draw.choice((0, 1, 1, 2, 3, 5, 17))
    if draw.random() < 0.3:
        sizes = (0, *SIZES, 127, 128, 129)
        p, i, o = draw.choice((0, 1, 1, 2, 5, 33)), draw.choice(sizes), draw.choice(sizes)
        n, p = draw.choice([(n, p)] * 30 + [(2100, 1), (1, 1500), (40, 33)])
        return (n, p, i), (o, 1, i), (n, p, o), None
    groups = draw.choice((1, 1, 1, 2, 3, 17))
    sizes = SIZES if groups == 1 else (1, 2, 5, 8, 9) if groups < 10 else (1, 2)
    i, o = draw.choice(sizes), draw.choice(sizes)
    while True:
        kernel = draw.choice([(1, 1), (1, 3), (3, 1), (2, 2), (4, 2), (5, 5), *[(3, 3)] * 4])
        geometry = Geometry(
            draw.randint(1, 9),
            draw.randint(1, 9),
            kernel,
            (draw.randint(1, 3), draw.randint(1, 3)),
            (draw.randint(0, 3), draw.randint(0, 3), draw.randint(0, 3), draw.randint(0, 3)),
            (draw.randint(1, 2), draw.randint(1, 3)),
            groups,
        )
        if min(geometry.output_size) > 0:
            break
    pixels, outputs = geometry.height * geometry.width, geometry.output_size[0] * geometry.output_size[1]
    if n * outputs * kernel[0] * kernel[1] * i * o > 5e5:
        n = 1
    return (n, pixels, i * groups), (o * groups, kernel[0] * kernel[1], i), (n, outputs, o * groups), geometry
