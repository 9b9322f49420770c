"""Rows of the table of kernels: what each one serves, as data. From it follow refusals, self-checks, fuzz and benchmarks.

    Kernel("output", "cpu", "cpu", "fqt.cpu.signs:output", Serves(SIGNS, SIGNS_BY_CHANNEL, what="signs by signs"), native=True)

Each backend's rows stand beside its kernels, in its own `rows.py`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fqt.formats import GRIDS, Format
from fqt.geometry import Geometry

LETTERS = {
    "output": "xw", "accumulate": "xw", "grad_input": "gw", "grad_weight": "gx",
}  # fmt: skip
"""Product -> its operands."""
WINDOW = Geometry(5, 4, (3, 3), (2, 1), (1, 1, 1, 1), (1, 1), 1)
"""A small convolution that meets borders, for examples."""


@dataclass(frozen=True)
class Request:
    """What a call asks of a kernel. `backend`: the one that must serve, "" for the fastest that does."""

    device: str
    formats: tuple[Format, ...]
    geometry: Geometry | None = None
    backend: str = ""


@dataclass(frozen=True, eq=False)
class Codes:
    """The formats of one operand that a kernel serves.

    Attributes:
        grids: grid -> fewest and most bits.
        axes: scale axes, those of a linear layer.
        window_axes: those under a window; None: the same.
    """

    grids: Mapping[str, tuple[int, int]]
    axes: tuple[str, ...]
    window_axes: tuple[str, ...] | None = None

    def has_grid(self, format: Format) -> bool:
        """Whether it serves the grid at these bits."""
        fewest, most = self.grids.get(format.grid, (1, 0))
        return fewest <= format.bits <= most

    def has_axes(self, format: Format, geometry: Geometry | None) -> bool:
        """Whether it serves the groups."""
        axes = self.axes if geometry is None or self.window_axes is None else self.window_axes
        return format.axes in axes and not format.block

    def formats(self, geometry: Geometry | None) -> Iterator[Format]:
        """Every format that it serves."""
        axes = self.axes if geometry is None or self.window_axes is None else self.window_axes
        for grid, (fewest, most) in self.grids.items():
            for bits, axis in itertools.product(range(fewest, most + 1), axes):
                yield Format(grid, bits, axis)
                if grid == "uint":
                    yield Format(grid, bits, axis, offset=True)


@dataclass(frozen=True, eq=False)
class Serves:
    """The requests that a kernel serves. Called with one, it returns the reason why it cannot serve it, or None.

    Attributes:
        operands: of a product left and right; of quantizing and decoding the one tensor; none of the others.
        what: what the kernel does with codes, for the reason: "multiplies signs by signs".
        letters: of the operands, for the reason.
        wider: bits that at least one operand has to have more than: for words that other rows leave.
        together: most bits of both operands.
        conv_groups: whether a convolution may have groups.
        available: the reason why nothing can be served on this machine, or None.
        further: what is no matter of formats: the reason why a request cannot be served, or None.
    """

    operands: tuple[Codes, ...] = ()
    what: str = ""
    letters: str = ""
    wider: int = 0
    together: int = 64
    conv_groups: bool = True
    available: Callable[[], str | None] = lambda: None
    further: Callable[[Request], str | None] = lambda request: None

    def __call__(self, request: Request) -> str | None:
        if not self.operands:
            return self.available()
        formats, geometry = request.formats, request.geometry
        named = " by ".join(format.name for format in formats)
        if not all(codes.has_grid(format) for codes, format in zip(self.operands, formats, strict=True)):
            return f"the kernel {self.what}, not {named}"
        if self.wider and max(format.bits for format in formats) <= self.wider:
            return f"the kernel is for words of more than {self.wider} bits, not {named}"
        if sum(format.bits for format in formats) > self.together:
            return f"sums of {named} overflow 32 bits at once: {self.together} bits in both together"
        if not all(codes.has_axes(format, geometry) for codes, format in zip(self.operands, formats, strict=True)):
            if len(formats) == 1:
                return f"the kernel has no groups of scale axes {formats[0].axes!r}, block {formats[0].block}: {named}"
            groups = " and ".join(f"{_groups(f)} of {letter}" for f, letter in zip(formats, self.letters, strict=True))
            return f"scales {groups} vary along the summed axes"
        if geometry is not None and geometry.groups > 1 and not self.conv_groups:
            return f"a convolution of {geometry.groups} groups has too few bits a group to fill an instruction"
        return self.further(request) or self.available()

    def serves(self, request: Request) -> bool:
        """Whether formats and geometry are served, wherever that is available."""
        return Serves(**{**self.__dict__, "available": lambda: None})(request) is None

    def examples(self, most: int = 24) -> Iterator[tuple[tuple[Format, ...], Geometry | None]]:
        """Formats and geometries that are served: at most so many, spread over all of them, the same every time."""
        for geometry in (None, WINDOW) if len(self.operands) == 2 else (None,):
            spread = [_spread([*codes.formats(geometry)], most) for codes in self.operands]
            pairs = list(itertools.product(*spread)) if len(spread) == 1 else _pairs(*spread) if spread else [()]
            served = [pair for pair in pairs if self.serves(Request("", pair, geometry))]
            yield from ((pair, geometry) for pair in _spread(served, most))

    def draw(self, chance: random.Random, geometry: Geometry | None) -> tuple[Format, ...]:
        """Formats of the operands at random: a grid, bits, axes of each; served but for what concerns both operands."""
        pair = []
        for codes in self.operands:
            grid = chance.choice([*codes.grids])
            axes = codes.axes if geometry is None or codes.window_axes is None else codes.window_axes
            offset = grid == "uint" and chance.random() < 0.7
            pair.append(Format(grid, chance.randint(*codes.grids[grid]), chance.choice(axes), offset))
        return tuple(pair)


def _groups(format: Format) -> str:
    return repr(format.axes) + (f" in blocks of {format.block}" if format.block else "")


def _spread(items: list, most: int) -> list:
    """At most so many of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]


def _pairs(left: list[Format], right: list[Format]) -> list[tuple[Format, Format]]:
    """Each left format with several right ones and each right one with several left ones, without all pairs."""
    count = max(len(left), len(right))
    shifts = range(0, count, max(1, count // 6))
    return list(dict.fromkeys((left[i % len(left)], right[(i + s) % len(right)]) for i in range(count) for s in shifts))


@dataclass(frozen=True)
class Kernel:
    """A row of the table.

    Attributes:
        operator: one of `fqt.ops.OPERATORS`.
        backend: the name by which a user asks for it.
        device: torch device type, "" for any.
        function: "module:name", imported when it is first used; its signature is that of the reference's function.
        refuses: a `Serves`; or any function that returns the reason why the kernel cannot serve a request, or None.
        variant: which of the backend's kernels it is, shown behind its name.
        native: whether it is compiled code, which is compared with the reference before it first serves.
        exact: whether its floats equal the reference's bit for bit; only those of 8-bit floats on tensor cores do not.
    """

    operator: str
    backend: str
    device: str
    function: str
    refuses: Callable[[Request], str | None]
    variant: str = ""
    native: bool = False
    exact: bool = True
    label: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", f"{self.backend} {self.variant}".strip())

    def examples(self, most: int = 24) -> Iterator[tuple[tuple[Format, ...], Geometry | None]]:
        """Those of its `Serves`; none if it has another predicate."""
        if isinstance(self.refuses, Serves):
            yield from self.refuses.examples(most)


INTEGERS: dict[str, tuple[int, int]] = {name: (grid.fewest, grid.most) for name, grid in GRIDS.items() if not grid.is_float}
"""Every grid of integers at all its bits."""


def at_most(bits: int, grids: Mapping[str, tuple[int, int]] = INTEGERS, **narrower: int) -> dict[str, tuple[int, int]]:
    """The grids at no more bits than these; `narrower`: grid -> its own limit."""
    return {name: (fewest, min(most, narrower.get(name, bits))) for name, (fewest, most) in grids.items() if fewest <= bits}


SIGN = {"sign": (1, 1)}
UNSIGNED = {"uint": (1, 8)}
LEAVES: dict[str, Any] = {"axes": ("", "N", "NP"), "window_axes": ("", "N")}
"""Scale axes that leave `output` and `grad_input`: a convolution's window mixes positions."""
SUMMED = ("", "N", "C", "NC")
"""Scale axes of a gradient in `grad_weight`."""


def by_product(operator: str, left: Mapping[str, tuple[int, int]], right: Mapping[str, tuple[int, int]]) -> tuple[Codes, Codes]:
    """The operands of a product whose scales leave it in the usual places."""
    first = Codes(left, SUMMED) if operator == "grad_weight" else Codes(left, **LEAVES)
    return first, Codes(right, ("", "O") if operator in ("output", "accumulate") else ("",))
