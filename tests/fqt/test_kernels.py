"""Every row of the table of kernels that this machine supports equals the reference, bit for bit."""

import itertools
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from fqt import ops, reference
from fqt.formats import Format
from fqt.ops import KERNELS, Kernel, Request
from fqt.quantizers import Quantizer, build, quantize
from fqt.recipe import LEFT_RIGHT, load_recipe, recipes
from fqt.testing import assert_same_codes

QUANTIZE = [row for row in KERNELS if row.operator == "quantize" and row.backend != "reference"]
SIZES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65)
FILLS = ("normal", "nan", "inf", "tiny", "constant", "zeros", "huge")
LAYOUTS = ("contiguous", "channels_first", "expanded", "sliced", "bfloat16")


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
    for word_length, stochastic in ((1, False), (5, True), (8, True), (8, False)):
        found.add(("x", build("fixed_point", "x", word_length=word_length, fraction_length=3, stochastic=stochastic)))
    found.add(("w", build("ternary_weight", "w")))
    return sorted(found, key=str)


def tensor(shape: tuple[int, int, int], fill: str, layout: str, generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, shape[2], generator=generator) * 3
    if fill in ("nan", "inf") and x.numel():
        x.view(-1)[int(torch.randint(x.numel(), (), generator=generator))] = float(fill)
    x = {"tiny": x * 1e-33, "constant": torch.full_like(x, 0.3), "zeros": torch.zeros_like(x), "huge": x * 2e37}.get(fill, x)
    if layout == "channels_first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "expanded":
        return x[:, :1].expand(shape)
    if layout == "sliced":
        return torch.stack([x, x + 1], 3).flatten(2)[:, :, ::2]
    return x.bfloat16() if layout == "bfloat16" else x


@pytest.mark.parametrize("row", QUANTIZE, ids=lambda row: row.backend)
def test_quantize_equals_the_reference(row: Kernel, rng: np.random.Generator):
    """A few thousand random cases over quantizers, sizes, values, layouts, folds, masks and thread counts."""
    draw = random.Random(int(rng.integers(2**62)))
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    cases = [(operand, quantizer) for operand, quantizer in built_in() for _ in range(12)]
    served = 0
    for operand, quantizer in cases:
        format = quantizer.format(operand)
        if row.refuses(Request("cpu", (format,))) is not None:
            continue
        shape = (draw.choice((0, 1, 2, 5, 16)), draw.choice(SIZES), draw.choice(SIZES))
        x = tensor(shape, draw.choice(FILLS), draw.choice(LAYOUTS), generator)
        fold_shape = draw.choice([None, (1, 1, shape[2]), (shape[0], 1, 1), (shape[0], shape[1], 1)])
        fold = None if fold_shape is None else torch.rand(fold_shape, generator=generator)
        key = torch.randint(-(2**63), 2**63 - 1, (), generator=generator)
        options = {
            "calibrate": quantizer.calibrate,
            "limits": quantizer.limits,
            "stochastic": quantizer.stochastic,
            "prune": quantizer.prune,
            "keep_one_in": quantizer.keep_one_in,
            "pass_range": draw.choice([None, (-1.0, 1.0), (0.0, 0.5)]),
            "fold": fold,
            "key": key,
            "stream": draw.randrange(0, 16, 2),
        }
        torch.set_num_threads(draw.choice((1, 2, 3, 8)))
        actual, actual_mask = ops.load(row.function)(x, format, **options)
        expected, expected_mask = reference.quantize(x, format, **options)
        assert_same_codes(actual, expected)
        assert (actual_mask is None) == (expected_mask is None)
        assert expected_mask is None or torch.equal(actual_mask, expected_mask)
        served += 1
    if served == 0:
        pytest.skip(f"{row.backend} serves nothing here: {row.refuses(Request('cpu', (Format('sign', 1),)))}")
    assert served > 1000


@pytest.mark.parametrize("row", QUANTIZE, ids=lambda row: row.backend)
@pytest.mark.parametrize("shape", [(3, 5000, 33), (2, 257, 512), (700, 3, 17), (1, 1, 4099)], ids=str)
def test_quantize_equals_the_reference_across_chunks_and_threads(
    row: Kernel, shape: tuple[int, int, int], rng: np.random.Generator
):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(int(rng.integers(2**62))))
    for granularity in ("tensor", "sample", "token", "channel", "sample_channel"):
        quantizer = build("psq", "g", bits=3, granularity=granularity)
        assert quantizer is not None
        format = quantizer.format("g")
        reason = row.refuses(Request("cpu", (format,)))
        if reason is not None:
            pytest.skip(f"{row.backend}: {reason}")
        options = {"calibrate": "minmax", "stochastic": True, "key": torch.tensor(-7), "stream": 2}
        assert_same_codes(ops.load(row.function)(x, format, **options)[0], reference.quantize(x, format, **options)[0])


def test_a_key_is_needed_to_draw():
    for quantizer in (build("psq", "g", bits=4), build("agp", "g", bits=4)):
        assert quantizer is not None
        with pytest.raises(ValueError, match="draws random numbers: give it a key"):
            quantize(torch.randn(2, 3, 4), quantizer, "g")
