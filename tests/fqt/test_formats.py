import re

import pytest
import torch

from fqt import reference
from fqt.formats import Format
from tests.fqt import oracle

GRID_BITS = (
    [("sign", 1), ("ternary", 2), ("e4m3", 8), ("e5m2", 8)]
    + [("int", b) for b in range(2, 17)]
    + [("uint", b) for b in range(1, 17)]
    + [("fixed", b) for b in range(1, 33)]
)
AXES = ["", "N", "O", "NP", "C", "NC"]
ALL = [Format(grid, bits, axes) for grid, bits in GRID_BITS for axes in AXES]
ALL += [Format("uint", bits, axes, True) for bits in range(1, 17) for axes in AXES]


def test_every_format_has_a_name_of_its_own_and_the_name_leads_back():
    assert len({f.name for f in ALL}) == len(ALL) == (4 + 15 + 16 + 32 + 16) * 6
    for f in ALL:
        assert Format.parse(f.name) == f


@pytest.mark.parametrize(
    ("format", "name"),
    [
        (Format("sign", 1), "sign"),
        (Format("ternary", 2, "O"), "ternary:O"),
        (Format("int", 8, "O"), "int8:O"),
        (Format("uint", 4, "N", True), "uint4+:N"),
        (Format("uint", 16), "uint16"),
        (Format("fixed", 32, "NC"), "fixed32:NC"),
        (Format("e4m3", 8, "NP"), "e4m3:NP"),
    ],
)
def test_names_are_the_published_ones(format, name):
    assert format.name == name


MALFORMED_NAMES = [
    "", "int", "uint", "fixed", "sign1", "e4m38", "int8 ", " int8", "int8:", "int8:o", "int-8", "int08", "int8.0",
    "int8++", "uint4:N+", "INT8", "int٨", "uint4+:N\n", "sign:O:O", "float8", "None",
]  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED_NAMES)
def test_what_is_no_name_is_an_error_that_shows_it(name):
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        Format.parse(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int1", "grid 'int' has 2 to 16 bits, not 1; for 1 bit use the grid 'sign'"),
        ("int17", "grid 'int' has 2 to 16 bits, not 17"),
        ("uint17", "grid 'uint' has 1 to 16 bits, not 17"),
        ("fixed33", "grid 'fixed' has 1 to 32 bits, not 33"),
        ("int8:P", "scale axes 'P' are not one of"),
        ("int8:ON", "scale axes 'ON' are not one of"),
        ("int8+", "an offset belongs to the grid 'uint', not to 'int'"),
        ("sign+", "an offset belongs to the grid 'uint', not to 'sign'"),
    ],
)
def test_a_name_of_a_format_that_does_not_exist_says_why(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Format.parse(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("float", 8), "unknown grid 'float': choose one of sign, ternary, int, uint, fixed, e4m3, e5m2"),
        ((None, 8), "unknown grid None"),
        (("sign", 2), "grid 'sign' has 1 bits, not 2"),
        (("ternary", 1), "grid 'ternary' has 2 bits, not 1"),
        (("e4m3", 7), "grid 'e4m3' has 8 bits, not 7"),
        (("e5m2", 16), "grid 'e5m2' has 8 bits, not 16"),
        (("int", 0), "grid 'int' has 2 to 16 bits, not 0"),
        (("uint", 0), "grid 'uint' has 1 to 16 bits, not 0"),
        (("uint", -1), "grid 'uint' has 1 to 16 bits, not -1"),
        (("fixed", 0), "grid 'fixed' has 1 to 32 bits, not 0"),
        (("uint", 4.0), "bits are an integer, not 4.0"),
        (("uint", "4"), "bits are an integer, not '4'"),
        (("uint", True), "bits are an integer, not True"),
        (("uint", None), "bits are an integer, not None"),
        (("int", 8, "P"), "scale axes 'P' are not one of"),
        (("int", 8, None), "scale axes None are not one of"),
        (("fixed", 8, "", True), "an offset belongs to the grid 'uint', not to 'fixed'"),
        (("e4m3", 8, "N", True), "an offset belongs to the grid 'uint', not to 'e4m3'"),
    ],
)
def test_a_malformed_format_is_a_clear_error(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Format(*arguments)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("sign", -1, 1), ("ternary", -1, 1), ("int2", -1, 1), ("int3", -3, 3), ("int4", -7, 7), ("int8", -127, 127),
        ("int16", -32767, 32767), ("uint1", 0, 1), ("uint2", 0, 3), ("uint4+:N", 0, 15), ("uint8", 0, 255),
        ("uint16", 0, 65535), ("fixed1", -1, 0), ("fixed2", -2, 1), ("fixed8", -128, 127),
        ("fixed32", -(2**31), 2**31 - 1), ("e4m3", -448, 448), ("e5m2", -57344, 57344),
    ],
)  # fmt: skip
def test_code_ranges(name, low, high):
    assert Format.parse(name).code_range == (low, high)


def test_storage_is_the_next_power_of_two():
    storage = {f"{f.grid}{f.bits}": f.storage_bits for f in ALL}
    assert [storage[f"uint{b}"] for b in range(1, 17)] == [1, 2, 4, 4, 8, 8, 8, 8] + [16] * 8
    assert [storage[f"fixed{b}"] for b in range(1, 33)] == [1, 2, 4, 4, 8, 8, 8, 8] + [16] * 8 + [32] * 16
    assert (storage["sign1"], storage["ternary2"], storage["e4m38"], storage["e5m28"]) == (1, 2, 8, 8)
    assert all(f.storage_bits == oracle.storage(f) for f in ALL)


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 1, 1), (3, 1, 17), (0, 2, 3), (2, 3, 0)])
@pytest.mark.parametrize("axes", AXES)
def test_groups_are_as_many_as_the_table_says(axes, shape):
    assert Format("int", 4, axes).groups(shape) == len(oracle.group_places(Format("int", 4, axes), shape))


@pytest.mark.parametrize("axes", AXES)
def test_groups_and_their_elements_are_counted_in_the_order_of_the_table(axes):
    shape = (2, 3, 5)
    format = Format("int", 8, axes)
    numbered = torch.arange(30).view(shape)
    expected = [[int(numbered[place]) for place in places] for places in oracle.group_places(format, shape)]
    assert reference.group_rows(numbered, format).tolist() == expected


@pytest.mark.parametrize(
    ("name", "shape", "packed"),
    [
        ("sign", (2, 3, 17), (2, 3, 3)),
        ("sign:N", (2, 3, 16), (2, 3, 2)),
        ("ternary:O", (2, 3, 5), (2, 3, 2)),
        ("uint4+:C", (2, 3, 5), (5, 1, 3)),
        ("uint4+:NC", (2, 3, 5), (5, 2, 2)),
        ("int3:NP", (2, 3, 5), (2, 3, 3)),
        ("int8:C", (2, 3, 5), (5, 1, 6)),
        ("int9:C", (2, 3, 5), (5, 1, 6)),
        ("int9:NC", (2, 3, 5), (5, 2, 3)),
        ("fixed17", (2, 3, 5), (2, 3, 5)),
        ("sign:NC", (0, 3, 5), (5, 0, 1)),
        ("sign:C", (0, 3, 5), (5, 1, 0)),
        ("sign", (2, 3, 0), (2, 3, 0)),
    ],
)
def test_packed_shapes(name, shape, packed):
    assert Format.parse(name).packed_shape(shape) == packed


def test_formats_are_hashable_and_frozen():
    assert len({Format("int", 8), Format("int", 8), Format("int", 8, "N")}) == 2
    with pytest.raises(AttributeError):
        Format("int", 8).bits = 4  # type: ignore[misc]
