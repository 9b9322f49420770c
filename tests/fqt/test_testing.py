from dataclasses import replace

import numpy as np
import pytest
import torch

from fqt.formats import Format
from fqt.testing import assert_same_codes, assert_same_values
from tests.fqt import oracle, oracle_products


@pytest.fixture
def q(rng):
    return oracle_products.random_operand(rng, Format("uint", 4, "N", True), (3, 2, 5)).q


def test_a_tensor_has_the_same_codes_as_its_copy(q):
    assert_same_codes(q, replace(q, codes=q.codes.clone(), scale=q.scale.clone()))


def test_nan_scales_are_equal(q):
    scale = q.scale.clone()
    scale[1] = torch.nan
    assert_same_codes(replace(q, scale=scale), replace(q, scale=scale.clone()))


def test_one_code_that_differs_is_shown_with_its_place(rng):
    operand = oracle_products.random_operand(rng, Format("int", 4, "C"), (3, 2, 5))
    codes = operand.codes.copy()
    codes[2, 1, 3] = 7 if codes[2, 1, 3] < 7 else -7
    other = replace(operand.q, codes=torch.from_numpy(oracle.pack(codes, operand.q.format).copy()))
    here, there = int(operand.codes[2, 1, 3]), int(codes[2, 1, 3])
    with pytest.raises(AssertionError) as error:
        assert_same_codes(other, operand.q)
    assert str(error.value) == f"codes: 1 of 30 differ:\n  (2, 1, 3): {there}, expected {here}"


def test_of_many_codes_that_differ_ten_are_shown_and_all_counted(q):
    with pytest.raises(AssertionError) as error:
        assert_same_codes(replace(q, codes=q.codes ^ 0x11), q)
    lines = str(error.value).splitlines()
    assert lines[0] == "codes: 30 of 30 differ; the first 10:"
    assert len(lines) == 11


def test_padding_bits_count(q):
    codes = q.codes.clone()
    codes[2, 1, 2] |= 0xA0
    with pytest.raises(AssertionError, match="only bits that pad the last byte differ.*1 of 18"):
        assert_same_codes(replace(q, codes=codes), q)


def test_scale_offset_and_index_count(q):
    one_more = q.scale.clone()
    one_more[2] = torch.nextafter(one_more[2], torch.tensor(9.0))
    with pytest.raises(AssertionError, match=r"^scale: 1 of 3 differ:\n  \(2,\): .*0x.*, expected .*0x"):
        assert_same_codes(replace(q, scale=one_more), q)
    with pytest.raises(AssertionError, match="^offset: 3 of 3 differ"):
        assert_same_codes(replace(q, offset=q.scale + 1), q)
    pruned = replace(q, index=torch.tensor([0, 1, 2], dtype=torch.int32))
    with pytest.raises(AssertionError, match="^index: shape"):
        assert_same_codes(pruned, q)


def test_format_and_shape_count(rng, q):
    with pytest.raises(AssertionError, match="format 'uint4:N', expected 'uint4\\+:N'"):
        assert_same_codes(replace(q, format=Format("uint", 4, "N"), offset=None), q)
    other = oracle_products.random_operand(rng, Format("uint", 4, "N", True), (3, 2, 6)).q
    with pytest.raises(AssertionError, match="shape"):
        assert_same_codes(other, q)


def test_the_actual_tensor_must_keep_its_invariants(q):
    bad = replace(q, scale=q.scale.double())
    with pytest.raises(AssertionError, match="float64"):
        assert_same_codes(bad, bad)


def test_values_are_compared_without_tolerance():
    value = torch.tensor([1.0, torch.nan, 0.0])
    assert_same_values(torch.tensor([1.0, torch.nan, -0.0]), value)
    with pytest.raises(AssertionError, match=r"values: 1 of 3 differ:\n  \(0,\): 1\.0\d+ \(0x1\.0+20+p\+0\), expected 1"):
        assert_same_values(torch.tensor([np.nextafter(np.float32(1), np.float32(2)), torch.nan, 0.0]), value)
    with pytest.raises(AssertionError, match=r"\(1,\): 5, expected nan"):
        assert_same_values(torch.tensor([1.0, 5.0, 0.0]), value)
    with pytest.raises(AssertionError, match="dtype torch.float64, expected torch.float32"):
        assert_same_values(value.double(), value)
    with pytest.raises(AssertionError, match=r"shape \(1, 3\), expected \(3,\)"):
        assert_same_values(value.unsqueeze(0), value)
