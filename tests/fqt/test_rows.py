"""What a row of the table of kernels serves is data, and what checks it follows from that."""

from __future__ import annotations

import random

import pytest

from fqt.formats import Format
from fqt.geometry import Geometry
from fqt.ops import KERNELS, Kernel, Request
from fqt.rows import SIGN, UNSIGNED, WINDOW, Codes, Serves, at_most, by_product

ROWS = [row for row in KERNELS if isinstance(row.refuses, Serves) and row.refuses.operands]
IDS = [f"{row.operator}-{row.label}" for row in ROWS]
GROUPED = Geometry(5, 4, (3, 3), (2, 1), (1, 1, 1, 1), (1, 1), 2)


def data(row: Kernel) -> Serves:
    assert isinstance(row.refuses, Serves)
    return row.refuses


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_the_examples_hold_every_grid_at_its_fewest_and_most_bits_and_every_group(row: Kernel) -> None:
    examples = list(row.examples())
    assert len(set(examples)) == len(examples) < 120, "the check before a kernel first serves has to stay quick"
    for i, codes in enumerate(data(row).operands):
        shown = [formats[i] for formats, _ in examples]
        assert {(grid, bits) for grid, limits in codes.grids.items() for bits in limits} <= {(f.grid, f.bits) for f in shown}
        assert {format.axes for format in shown} == set(codes.axes)
        if "uint" in codes.grids:
            assert {format.offset for format in shown if format.grid == "uint"} == {False, True}
    assert {geometry for _, geometry in examples} == ({None, WINDOW} if len(data(row).operands) == 2 else {None})


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_examples_and_draws_are_served(row: Kernel) -> None:
    chance = random.Random(0)
    drawn = [(data(row).draw(chance, geometry), geometry) for geometry in (None, WINDOW) for _ in range(100)]
    assert len(set(drawn)) > 8 or all(codes.grids == SIGN for codes in data(row).operands)
    for formats, geometry in (*row.examples(), *drawn):
        assert data(row).unfit(formats, geometry) is None, (formats, geometry)


@pytest.mark.parametrize(
    ("operator", "names"),
    [
        ("quantize", ["sign"]), ("quantize", ["uint4+:N"]), ("quantize", ["uint6+:NC"]), ("quantize", ["fixed29"]),
        ("decode", ["int13:NP"]), ("output", ["sign", "sign:O"]), ("output", ["sign:N", "sign"]),
        ("output", ["int8:N", "int8:O"]), ("output", ["uint2", "fixed16"]),
        ("grad_input", ["uint4+:N", "sign"]), ("grad_input", ["int8:N", "fixed12"]), ("grad_weight", ["uint4+:C", "sign"]),
        ("grad_weight", ["uint4+:NC", "int4"]), ("accumulate", ["sign", "sign:O"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " by ".join(value),
)  # fmt: skip
def test_the_formats_of_recipes_are_examples(operator: str, names: list[str]) -> None:
    formats = tuple(map(Format.parse, names))
    rows = [row for row in KERNELS if row.operator == operator and row.native and row.device == "cpu"]
    geometries = (None,) if len(names) == 1 else (None, WINDOW)
    assert all(any((formats, geometry) in row.examples() for row in rows) for geometry in geometries)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_blocks_and_grids_that_a_row_does_not_list_are_refused_by_name(row: Kernel) -> None:
    plain, geometry = next(row.examples())
    for i, format in enumerate(plain):
        block = Format(format.grid, format.bits, format.axes, format.offset, 32)
        asked = (*plain[:i], block, *plain[i + 1 :])
        reason = data(row).unfit(asked, geometry)
        assert reason == f"the kernel has no scales of blocks, and {block.name} has one for every 32 elements"
        missing = next(
            f for f in map(Format.parse, ("e4m3", "fixed32")) if f.grid not in data(row).operands[i].grids or f.bits > 8
        )
        if not data(row).operands[i].has_grid(missing):
            asked = (*plain[:i], missing, *plain[i + 1 :])
            reason = data(row).unfit(asked, geometry)
            assert reason is not None and reason.endswith(f", not {' by '.join(f.name for f in asked)}")


def test_every_limit_refuses_with_its_reason() -> None:
    operands = by_product("output", at_most(16, uint=8), {**SIGN, **UNSIGNED, "fixed": (1, 16)})
    serves = Serves(operands, "adds up words", beyond=8, together=30, conv_groups=False, letters="xw")
    for names, geometry, reason in (
        (("fixed12", "sign:O"), None, None),
        (("uint9", "sign"), None, "the kernel adds up words, not uint9 by sign"),
        (("int8", "uint8"), None, "the kernel is for words of more than 8 bits, not int8 by uint8"),
        (("fixed16", "fixed15"), None, "sums of fixed16 by fixed15 overflow 32 bits at once: 30 bits in both together"),
        (("fixed12:NP", "sign"), None, None),
        (("fixed12:NP", "sign"), WINDOW, "scales 'NP' of x and '' of w vary along the summed axes"),
        (("fixed12", "sign"), GROUPED, "a convolution of 2 groups has too few bits a group to fill an instruction"),
    ):
        assert serves(Request("cpu", tuple(map(Format.parse, names)), geometry)) == reason
    one = Serves((Codes(SIGN, ("", "N")),), "is for signs")
    assert one.unfit((Format("sign", 1, "C"),), None) == "the kernel knows the scale axes '', 'N', not those of sign:C"
    with pytest.raises(ValueError, match="the kernel serves nothing under Geometry.* groups has too few bits"):
        Serves(by_product("output", SIGN, SIGN), "multiplies signs", conv_groups=False).draw(random.Random(0), GROUPED)


def test_what_a_machine_lacks_is_asked_last() -> None:
    asked = []
    serves = Serves(by_product("output", SIGN, SIGN), "multiplies signs", available=lambda: asked.append(1) or "no library")
    assert serves(Request("cpu", (Format("int", 8), Format("sign", 1)))) == "the kernel multiplies signs, not int8 by sign"
    assert not asked
    assert serves(Request("cpu", (Format("sign", 1), Format("sign", 1)))) == "no library"
    assert Serves(available=lambda: "no library")(Request("cpu", ())) == "no library"


def test_a_row_names_its_operators_operands() -> None:
    serves = Serves(by_product("grad_weight", UNSIGNED, SIGN), "multiplies codes")
    row = Kernel("grad_weight", "mine", "cpu", "a:b", serves)
    reason = row.refuses(Request("cpu", (Format.parse("uint4:NP"), Format.parse("sign"))))
    assert reason == "scales 'NP' of g and '' of x vary along the summed axes"
    assert list(row.examples()) and not list(Kernel("grad_weight", "mine", "cpu", "a:b", lambda request: None).examples())
