from dataclasses import replace

import numpy as np
import pytest
import torch

from fqt import reference
from fqt.formats import Format
from fqt.qtensor import QTensor, check
from tests.fqt import oracle_products

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SHAPE = (3, 2, 5)
NAMES = ["sign", "ternary:O", "uint4+:N", "int3:NP", "uint16+:C", "fixed24:NC", "e4m3:C", "fixed32"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep", [None, 0.5], ids=["whole", "pruned"])
def test_the_four_tensors_of_a_schema_lead_back(name, keep, rng):
    q = oracle_products.random_operand(rng, Format.parse(name), SHAPE, keep).q
    check(q)
    tensors = q.tensors()
    assert [t.dtype for t in tensors] == [q.codes.dtype, torch.float32, torch.float32, torch.int32]
    back = QTensor.from_tensors(tensors, q.format, q.shape)
    assert (back.offset is None) == (q.offset is None)
    assert (back.index is None) == (q.index is None)
    for one, other in zip(back.tensors(), tensors, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_decode_is_scale_times_code_plus_offset(name, rng):
    operand = oracle_products.random_operand(rng, Format.parse(name), SHAPE)
    values = operand.q.decode()
    assert values.dtype == torch.float32
    assert values.is_contiguous()
    assert values.shape == SHAPE
    np.testing.assert_array_equal(values.numpy(), operand.values)


@pytest.mark.parametrize(
    ("name", "pruned", "nbytes"),
    [
        ("sign", False, 6 * 1 + 4),
        ("uint4+:N", False, 6 * 3 + 3 * 8),
        ("uint4+:N", True, 6 * 3 + 3 * 12),
        ("uint4+:C", False, 5 * 3 + 5 * 8),
        ("fixed17", False, 30 * 4 + 4),
        ("int9:NC", False, 30 * 2 + 15 * 4),
    ],
)
def test_nbytes_counts_codes_scales_offsets_and_index(name, pruned, nbytes, rng):
    assert oracle_products.random_operand(rng, Format.parse(name), SHAPE, 0.5 if pruned else None).q.nbytes == nbytes


def broken(rng: np.random.Generator, what: str) -> QTensor:
    q = oracle_products.random_operand(rng, Format("uint", 4, "N", True), (5, 2, 3)).q
    assert q.offset is not None
    index = torch.tensor([0, 2, -1, -1, -1], dtype=torch.int32)
    pruned_scale = q.scale * torch.tensor([1.0, 0, 1, 0, 0])
    return {
        "codes of another dtype": replace(q, codes=q.codes.int()),
        "codes of another shape": replace(q, codes=q.codes[..., :1]),
        "too few scales": replace(q, scale=q.scale[:4]),
        "scale of another dtype": replace(q, scale=q.scale.double()),
        "no offset": replace(q, offset=None),
        "too few offsets": replace(q, offset=q.offset[:1]),
        "offset of a format without": replace(q, format=Format("uint", 4, "N")),
        "index of another dtype": replace(q, index=index.long(), scale=pruned_scale),
        "index too short": replace(q, index=index[:3], scale=pruned_scale),
        "index not ascending": replace(q, index=index[[1, 0, 2, 3, 4]], scale=pruned_scale),
        "index with a hole": replace(q, index=index[[0, 2, 1, 3, 4]], scale=pruned_scale),
        "index twice": replace(q, index=torch.tensor([0, 0, 2, -1, -1], dtype=torch.int32), scale=pruned_scale),
        "pruned group with a scale": replace(q, index=index),
    }[what]


@pytest.mark.parametrize(
    "what",
    [
        "codes of another dtype", "codes of another shape", "too few scales", "scale of another dtype", "no offset",
        "too few offsets", "offset of a format without", "index of another dtype", "index too short",
        "index not ascending", "index with a hole", "index twice", "pruned group with a scale",
    ],
)  # fmt: skip
def test_check_refuses_what_breaks_an_invariant(what, rng):
    with pytest.raises(AssertionError):
        check(broken(rng, what))


@pytest.mark.parametrize("prune", ["", "bernoulli", "topk"])
@pytest.mark.parametrize("name", ["uint4+:N", "uint1+:C", "int8:NC", "uint9+:NP", "uint4+"])
def test_what_quantize_makes_keeps_the_invariants(name, prune, rng):
    x = torch.from_numpy(rng.normal(size=(6, 2, 9)).astype(np.float32))
    format = Format.parse(name)
    calibrate = "minmax" if format.offset else "absmax"
    q, mask = reference.quantize(
        x, format, calibrate=calibrate, prune=prune, keep_one_in=3 if prune else 1, stochastic=True, key=torch.tensor(8)
    )
    check(q)
    assert mask is None
    assert (q.index is None) == (prune == "")
