"""Format: what codes mean, and nothing about how they were made.

    value = scale * code + offset

A tensor is seen as three logical axes, whatever layer it belongs to:

    activations x and output gradients g    (N, P, C)   sample, position (pixel or token), channel
    weights w                               (O, K, I)   output channel, tap of the window, input channel

A `Grouping` cuts the tensor into *groups*; every group has one scale (and, if `offset` is set, one offset). Its `axes` name
the logical axes that have a scale of their own. With a `block`, the elements that share those coordinates are cut further,
in their order, into blocks of so many. Groups and the elements within them are counted in a fixed order, which the packed
layout and the random numbers share:

    axes         granularity       groups in order of   elements of a group in order of
    ""           tensor            one                  N, P, C   (O, K, I)
    "N"  "O"     sample, channel   N  (O)               P, C      (K, I)
    "NP" "OK"    token             N, P  (O, K)         C         (I)
    "C"          channel           C                    N, P
    "NC"         sample_channel    C, N                 P
    "KI"         (weights)         K, I                 O
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

Shape3 = tuple[int, int, int]


@dataclass(frozen=True)
class Grid:
    """A set of values that codes stand for.

    Attributes:
        name: its word in the names of formats.
        fewest, most: bits that a code may have.
        exponent, mantissa: of a small float: bits of each, beside the sign; codes are then values of the grid, stored as the
            bits sign, exponent, mantissa, with subnormals. 0 and 0: the codes are integers.
        largest: the largest finite value of a small float.
    """

    name: str
    fewest: int
    most: int
    exponent: int = 0
    mantissa: int = 0
    largest: float = 0.0

    @property
    def is_float(self) -> bool:
        """Whether it is a grid of small floats."""
        return self.exponent > 0

    @property
    def bias(self) -> int:
        """What is added to a small float's exponent before it is stored."""
        return 2 ** (self.exponent - 1) - 1


_grids = {
    grid.name: grid
    for grid in (
        Grid("sign", 1, 1),
        Grid("ternary", 2, 2),
        Grid("int", 2, 16),
        Grid("uint", 1, 16),
        Grid("fixed", 1, 32),
        Grid("e4m3", 8, 8, 4, 3, 448.0),
        Grid("e5m2", 8, 8, 5, 2, 57344.0),
    )
}
GRIDS: Mapping[str, Grid] = MappingProxyType(_grids)
"""sign {-1, +1}; ternary {-1, 0, +1}; int -(2^(b-1)-1) .. 2^(b-1)-1; uint 0 .. 2^b-1; fixed -2^(b-1) .. 2^(b-1)-1
(two's complement, fixed point); e4m3 and e5m2: the 8-bit floats of the OCP standard; and what `register_grid` added."""


def register_grid(grid: Grid) -> None:
    """Add a grid of small floats. The reference serves it; a kernel serves it where its row says so.

    Raises:
        ValueError: its name is taken or is not a word, or it is not a small float of at most 8 bits.
    """
    if grid.name in _grids:
        raise ValueError(f"a grid named {grid.name!r} exists already: choose another name")
    if not re.fullmatch(r"[a-z][a-z0-9]*[a-z0-9]", grid.name):
        raise ValueError(f"a grid's name is a word of small letters and digits, not {grid.name!r}")
    bits = 1 + grid.exponent + grid.mantissa
    if not (grid.exponent > 0 and grid.mantissa >= 0 and bits == grid.fewest == grid.most <= 8 and grid.largest > 0):
        raise ValueError(
            f"grid {grid.name!r} is {grid}: expected a small float of at most 8 bits, fewest = most = 1 + exponent + mantissa"
        )
    _grids[grid.name] = grid
    Format.parse.cache_clear()


# --- groups ----------------------------------------------------------------------------------------------------------

GRANULARITY_AXES = {
    "activation": {"tensor": "", "sample": "N", "token": "NP", "channel": "C", "sample_channel": "NC"},
    "weight": {"tensor": "", "channel": "O"},
}


_ORDERS = {
    "": ((0, 1, 2), 0), "N": ((0, 1, 2), 1), "O": ((0, 1, 2), 1), "NP": ((0, 1, 2), 2), "OK": ((0, 1, 2), 2),
    "C": ((2, 0, 1), 1), "NC": ((2, 0, 1), 2), "KI": ((1, 2, 0), 2),
}  # fmt: skip
"""Axes -> the logical axes (0, 1, 2) in the order in which a tensor is stored, and how many of them number the groups."""


@dataclass(frozen=True)
class Grouping:
    """How a tensor is cut into groups that have a scale each.

    Args:
        axes: logical axes with a scale of their own, see the module's table.
        block: elements of a block; 0 leaves the elements that share the axes' coordinates together.

    Raises:
        ValueError: unknown axes, or a block that is no positive number.
    """

    axes: str = ""
    block: int = 0

    def __post_init__(self) -> None:
        if self.axes not in _ORDERS:
            raise ValueError(f"scale axes {self.axes!r} are not one of {tuple(_ORDERS)}")
        if type(self.block) is not int or self.block < 0:
            raise ValueError(f"a block has a positive number of elements, not {self.block!r}; 0 stands for no blocks")

    @property
    def order(self) -> Shape3:
        """The axes (0, 1, 2) in the order in which a tensor is stored: those of the groups first."""
        return _ORDERS[self.axes][0]

    @property
    def lead(self) -> int:
        """How many axes in `order` are those of the groups."""
        return _ORDERS[self.axes][1]

    @property
    def in_order(self) -> bool:
        """Whether a tensor is stored in the order of its own axes."""
        return self.order == (0, 1, 2)

    @property
    def apart(self) -> bool:
        """Whether the first two stored axes number the rows of codes, each of which begins a byte; else the first alone."""
        return self.in_order or self.lead == 2

    def stored(self, shape: Shape3) -> Shape3:
        """`shape` in the order in which it is stored."""
        a, b, c = self.order
        return (shape[a], shape[b], shape[c])

    def rows(self, shape: Shape3) -> Shape3:
        """The stored shape as rows of codes that are packed together, see `Format.packed_shape`."""
        a, b, c = self.stored(shape)
        return (a, b, c) if self.apart else (a, 1, b * c)

    def together(self, shape: Shape3) -> int:
        """Elements that share the coordinates of `axes`."""
        return math.prod(self.stored(shape)[self.lead :])

    def blocks(self, shape: Shape3) -> int:
        """Blocks in each of these."""
        return -(-self.together(shape) // self.block) if self.block else 1

    def groups(self, shape: Shape3) -> int:
        """Number of groups of a tensor of logical `shape`."""
        return math.prod(self.stored(shape)[: self.lead]) * self.blocks(shape)


# --- formats ---------------------------------------------------------------------------------------------------------

_NAME = re.compile(r"([a-z][a-z0-9]*?)(\+?)(?::((?=[A-Z/])[A-Z]*)(?:/([1-9][0-9]*))?)?")


@dataclass(frozen=True)
class Format:
    """The meaning of a tensor of codes. Hashable; `name` is its short name, `Format.parse` the way back.

    Args:
        grid: one of `GRIDS`.
        bits: bits a code. Fixed by the grid for sign (1), ternary (2) and small floats.
        axes: logical axes with a scale of their own, see the module's table.
        offset: whether every group has an offset beside its scale. Only for `uint` codes.
        block: elements of a block that has a scale of its own, 0 for no blocks.

    Attributes:
        name: grid, bits where the grid leaves a choice, "+" for an offset, axes and block: "uint4+:N", "e2m1:NP/32".
        grouping: how the tensor is cut into groups.

    Raises:
        ValueError: unknown grid or axes, bits out of the grid's range, an offset on a grid that has none.
    """

    grid: str
    bits: int
    axes: str = ""
    offset: bool = False
    block: int = 0
    name: str = field(init=False, repr=False, compare=False)
    grouping: Grouping = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.grid not in GRIDS:
            raise ValueError(f"unknown grid {self.grid!r}: choose one of {', '.join(GRIDS)}")
        if type(self.bits) is not int:
            raise ValueError(f"bits are an integer, not {self.bits!r}")
        low, high = GRIDS[self.grid].fewest, GRIDS[self.grid].most
        if not low <= self.bits <= high:
            hint = "; for 1 bit use the grid 'sign'" if self.grid == "int" and self.bits == 1 else ""
            wanted = str(low) if low == high else f"{low} to {high}"
            raise ValueError(f"grid {self.grid!r} has {wanted} bits, not {self.bits}{hint}")
        if self.offset and self.grid != "uint":
            raise ValueError(f"an offset belongs to the grid 'uint', not to {self.grid!r}")
        object.__setattr__(self, "grouping", Grouping(self.axes, self.block))
        digits = "" if low == high else str(self.bits)
        groups = f":{self.axes}" if self.axes or self.block else ""
        name = f"{self.grid}{digits}{'+' if self.offset else ''}{groups}{f'/{self.block}' if self.block else ''}"
        object.__setattr__(self, "name", name)

    @property
    def is_float(self) -> bool:
        """Whether codes are small floats."""
        return GRIDS[self.grid].is_float

    @staticmethod
    @functools.cache
    def parse(name: str) -> Format:
        """`Format.parse(f.name) == f` for every format. Raises ValueError on anything else."""
        match = _NAME.fullmatch(name)
        if not match:
            raise ValueError(f"{name!r} is not a format name such as 'sign', 'int8:O' or 'uint4+:N'")
        for grid in GRIDS.values():
            fixed = grid.fewest == grid.most
            word = re.fullmatch(grid.name + ("" if fixed else "([1-9][0-9]*)"), match[1])
            if word:
                bits = grid.fewest if fixed else int(word[1])
                return Format(grid.name, bits, match[3] or "", bool(match[2]), int(match[4] or 0))
        raise ValueError(f"{name!r} is not a format name such as 'sign', 'int8:O' or 'uint4+:N'")

    @property
    def code_range(self) -> tuple[float, float]:
        """Smallest and largest code (of small floats: the largest finite values)."""
        if self.grid in ("sign", "ternary"):
            return -1, 1
        if self.is_float:
            largest = GRIDS[self.grid].largest
            return -largest, largest
        if self.grid == "uint":
            return 0, 2**self.bits - 1
        high = 2 ** (self.bits - 1) - 1
        return (-high - 1 if self.grid == "fixed" else -high), high

    @property
    def storage_bits(self) -> int:
        """Bits a code takes in memory: 1, 2, 4, 8, 16 or 32."""
        return next(s for s in (1, 2, 4, 8, 16, 32) if s >= self.bits)

    def groups(self, shape: Shape3) -> int:
        """Number of groups of a tensor of logical `shape`."""
        return self.grouping.groups(shape)

    def nbytes(self, shape: Shape3) -> int:
        """Bytes of a tensor of logical `shape`: codes, scales and offsets."""
        codes = math.prod(self.packed_shape(shape)) * max(self.storage_bits, 8) // 8
        return codes + self.groups(shape) * (8 if self.offset else 4)

    def packed_shape(self, shape: Shape3) -> Shape3:
        """Shape of the stored codes: uint8 bytes up to 8 bits, else int16 or int32, one a code.

        Stored in the order of the tensor's own axes, codes are packed along the last of them, and each (sample, position)
        begins a byte. Stored in another order they are packed along all elements that share the groups' axes: (C, 1, N*P) for
        "C", (C, N, P) for "NC". Bits beyond the last code are zero.
        """
        a, b, c = self.grouping.rows(shape)
        storage = self.storage_bits
        return (a, b, c if storage > 8 else -(-c * storage // 8))
