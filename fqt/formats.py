"""Format: what codes mean, and nothing about how they were made.

    value = scale * code + offset

A tensor is seen as three logical axes, whatever layer it belongs to:

    activations x and output gradients g    (N, P, C)   sample, position (pixel or token), channel
    weights w                               (O, K, I)   output channel, tap of the window, input channel

`axes` names the logical axes that have a scale of their own. They cut the tensor into *groups*; every group has one
scale (and, if `offset` is set, one offset). Groups and the elements within them are counted in a fixed order, which the
packed layout and the random numbers share:

    axes      granularity       groups in order of   elements of a group in order of
    ""        tensor            one                  N, P, C   (O, K, I)
    "N" "O"   sample, channel   N  (O)               P, C      (K, I)
    "NP"      token             N, P                 C
    "C"       channel           C                    N, P
    "NC"      sample_channel    C, N                 P
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

Shape3 = tuple[int, int, int]

GRIDS = ("sign", "ternary", "int", "uint", "fixed", "e4m3", "e5m2")
"""sign {-1, +1}; ternary {-1, 0, +1}; int -(2^(b-1)-1) .. 2^(b-1)-1; uint 0 .. 2^b-1; fixed -2^(b-1) .. 2^(b-1)-1
(two's complement, fixed point); e4m3 and e5m2: the 8-bit floats of the OCP standard."""

BITS = {
    "sign": (1, 1),
    "ternary": (2, 2),
    "int": (2, 16),
    "uint": (1, 16),
    "fixed": (1, 32),
    "e4m3": (8, 8),
    "e5m2": (8, 8),
}
FLOAT8_MAX = {"e4m3": 448.0, "e5m2": 57344.0}

GRANULARITY_AXES = {
    "activation": {"tensor": "", "sample": "N", "token": "NP", "channel": "C", "sample_channel": "NC"},
    "weight": {"tensor": "", "channel": "O"},
}
_AXES = ("", "N", "O", "NP", "C", "NC")
_NAME = re.compile(r"(sign|ternary|int|uint|fixed|e4m3|e5m2)((?:[1-9][0-9]*)?)(\+?)(?::([A-Z]+))?")


@dataclass(frozen=True)
class Format:
    """The meaning of a tensor of codes. Hashable; `name` is its short name, `Format.parse` the way back.

    Args:
        grid: one of `GRIDS`.
        bits: bits a code. Fixed by the grid for sign (1), ternary (2), e4m3 and e5m2 (8).
        axes: logical axes with a scale of their own, see the module's table.
        offset: whether every group has an offset beside its scale. Only for `uint` codes.

    Raises:
        ValueError: unknown grid or axes, bits out of the grid's range, an offset on a grid that has none.
    """

    grid: str
    bits: int
    axes: str = ""
    offset: bool = False

    def __post_init__(self) -> None:
        if self.grid not in GRIDS:
            raise ValueError(f"unknown grid {self.grid!r}: choose one of {', '.join(GRIDS)}")
        if type(self.bits) is not int:
            raise ValueError(f"bits are an integer, not {self.bits!r}")
        low, high = BITS[self.grid]
        if not low <= self.bits <= high:
            hint = "; for 1 bit use the grid 'sign'" if self.grid == "int" and self.bits == 1 else ""
            wanted = str(low) if low == high else f"{low} to {high}"
            raise ValueError(f"grid {self.grid!r} has {wanted} bits, not {self.bits}{hint}")
        if self.axes not in _AXES:
            raise ValueError(f"scale axes {self.axes!r} are not one of {_AXES}")
        if self.offset and self.grid != "uint":
            raise ValueError(f"an offset belongs to the grid 'uint', not to {self.grid!r}")

    @property
    def name(self) -> str:
        bits = "" if self.grid in ("sign", "ternary", "e4m3", "e5m2") else str(self.bits)
        return f"{self.grid}{bits}{'+' if self.offset else ''}{':' + self.axes if self.axes else ''}"

    @staticmethod
    @functools.cache
    def parse(name: str) -> Format:
        """`Format.parse(f.name) == f` for every format. Raises ValueError on anything else."""
        match = _NAME.fullmatch(name)
        if not match or (match[2] == "") != (match[1] in ("sign", "ternary", "e4m3", "e5m2")):
            raise ValueError(f"{name!r} is not a format name such as 'sign', 'int8:O' or 'uint4+:N'")
        bits = int(match[2]) if match[2] else BITS[match[1]][0]
        return Format(match[1], bits, match[4] or "", bool(match[3]))

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code (for float8: the largest finite values)."""
        if self.grid in ("sign", "ternary"):
            return -1, 1
        if self.grid in FLOAT8_MAX:
            return -int(FLOAT8_MAX[self.grid]), int(FLOAT8_MAX[self.grid])
        if self.grid == "uint":
            return 0, 2**self.bits - 1
        high = 2 ** (self.bits - 1) - 1
        return (-high - 1 if self.grid == "fixed" else -high), high

    @property
    def storage_bits(self) -> int:
        """Bits a code takes in memory: 1, 2, 4, 8, 16 or 32."""
        return next(s for s in (1, 2, 4, 8, 16, 32) if s >= self.bits)

    @property
    def channel_major(self) -> bool:
        """Whether groups are counted channel first, so that codes are stored (C, N, P)."""
        return "C" in self.axes

    def groups(self, shape: Shape3) -> int:
        """Number of groups of a tensor of logical `shape`."""
        n, p, c = shape
        return {"": 1, "N": n, "O": n, "NP": n * p, "C": c, "NC": n * c}[self.axes]

    def rows(self, shape: Shape3) -> Shape3:
        """`shape` in storage order: (N, P, C), or (C, N, P) when channel-major."""
        n, p, c = shape
        return (c, n, p) if self.channel_major else (n, p, c)

    def packed_shape(self, shape: Shape3) -> tuple[int, ...]:
        """Shape of the stored codes: uint8 bytes up to 8 bits, else int16 or int32, one a code.

        The packed axis is the channel, and each (sample, position) begins a byte; channel-major codes are packed along
        the whole group instead: (C, N*P) for "C", (C, N, P) for "NC". Bits beyond the last code are zero.
        """
        a, b, c = self.rows(shape)
        if self.axes == "C":
            a, b, c = a, 1, b * c
        last = c if self.storage_bits > 8 else -(-c * self.storage_bits // 8)
        return (a, b, last)
