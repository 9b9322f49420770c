"""Rows of the table of kernels: what each one serves, as data. From it follow refusals, self-checks, fuzz and benchmarks.

    Kernel("output", "cpu", "cpu", "fqt.cpu.signs:output", Serves(by_product("output", SIGN, SIGN), "multiplies signs"))

Each backend's rows stand beside its kernels, in its own `rows.py`.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from fqt.formats import GRIDS, Format
from fqt.geometry import Geometry

Bits = Mapping[str, tuple[int, int]]
"""Grid -> the fewest and the most bits of its codes."""

LETTERS = {"output": "xw", "accumulate": "xw", "grad_input": "gw", "grad_weight": "gx"}
"""Product -> the letters of its operands, left and right."""
WINDOW = Geometry(5, 4, (3, 3), (2, 1), (1, 1, 1, 1), (1, 1), 1)
"""A small convolution whose window reaches beyond the image, for examples."""

_PLAIN = ("sign", "uint2", "int4", "int8", "fixed12", "fixed16")
_GRADIENTS = ("uint1+", "uint4+", "uint6+", "int8")
_FAMILIAR = {
    "xw": ((*_PLAIN, "sign:N", "int8:N"), (*_PLAIN, "sign:O", "int8:O")),
    "gw": ([f"{codes}:N" for codes in _GRADIENTS], _PLAIN),
    "gx": ([f"{codes}:{axes}" for codes in _GRADIENTS for axes in ("C", "NC")], _PLAIN),
    "": (("sign", "sign:O", "ternary", "uint2", "uint4+:N", "uint4+:C", "uint6+:N", "uint6+:NC", "int4:NC", "int8:N", "int8:C",
          "int13:NP", "fixed14", "fixed21", "fixed29"),),
}  # fmt: skip
"""Letters of the operands -> the formats of each that recipes use most; "": of the one tensor of other operators."""


@dataclass(frozen=True)
class Request:
    """What a call asks of a kernel. `backend`: the one that must serve, "" for the fastest that does."""

    device: str
    formats: tuple[Format, ...]
    geometry: Geometry | None = None
    backend: str = ""


Example = tuple[tuple[Format, ...], Geometry | None]
"""The formats of the operands, and the convolution's geometry; None for a linear layer."""


@dataclass(frozen=True, eq=False)
class Codes:
    """The formats of one operand that a kernel serves. None has blocks.

    Attributes:
        grids: the grids, and of each the fewest and the most bits.
        axes: scale axes in a linear layer.
        window_axes: scale axes under a convolution's window; None stands for the same.
    """

    grids: Bits
    axes: tuple[str, ...]
    window_axes: tuple[str, ...] | None = None

    def axes_under(self, geometry: Geometry | None) -> tuple[str, ...]:
        """The scale axes that are served in a linear layer (None) or a convolution."""
        return self.axes if geometry is None or self.window_axes is None else self.window_axes

    def has_grid(self, format: Format) -> bool:
        """Whether it serves the grid at these bits."""
        fewest, most = self.grids.get(format.grid, (1, 0))
        return fewest <= format.bits <= most

    def has_groups(self, format: Format, geometry: Geometry | None) -> bool:
        """Whether it serves the format's groups."""
        return not format.block and format.axes in self.axes_under(geometry)

    def edges(self, geometry: Geometry | None) -> list[Format]:
        """Every grid at its fewest and most bits, with and without an offset, the scale axes in turn: at least each once."""
        kinds = [
            (grid, bits, offset)
            for grid, limits in self.grids.items()
            for bits in dict.fromkeys(limits)
            for offset in ((False, True) if grid == "uint" else (False,))
        ]
        axes = self.axes_under(geometry)
        count = max(len(kinds), len(axes))
        return [Format(*kinds[i % len(kinds)][:2], axes[i % len(axes)], kinds[i % len(kinds)][2]) for i in range(count)]

    def draw(self, chance: random.Random, geometry: Geometry | None) -> Format:
        """A format at random: a grid, then bits, scale axes and an offset."""
        grid = chance.choice([*self.grids])
        offset = grid == "uint" and chance.random() < 0.7
        return Format(grid, chance.randint(*self.grids[grid]), chance.choice(self.axes_under(geometry)), offset)


@dataclass(frozen=True, eq=False)
class Serves:
    """The requests that a kernel serves. Called with one, it returns the reason why the kernel cannot serve it, or None.

    Attributes:
        operands: of a product left and right; the one tensor that is quantized or decoded; none for other operators.
        what: what the kernel does with codes, in words that a refusal begins with: "multiplies signs by signs".
        beyond: bits of which one operand at least has to have more, for a kernel of wide words; 0 for any.
        together: the most bits of both operands together.
        conv_groups: whether a convolution may have groups.
        available: why nothing can be served on this machine, or None: a library that is not built, a device that lacks
            an instruction.
        letters: of the operands in refusals; a `Kernel` puts its operator's here.
    """

    operands: tuple[Codes, ...] = ()
    what: str = ""
    beyond: int = 0
    together: int = 64
    conv_groups: bool = True
    available: Callable[[], str | None] = lambda: None
    letters: str = "ab"

    def __call__(self, request: Request) -> str | None:
        return self.unfit(request.formats, request.geometry) or self.available()

    @functools.cached_property
    def unfit(self) -> Callable[[tuple[Format, ...], Geometry | None], str | None]:
        """Why the kernel is for other formats or another geometry, whatever the machine has; None if it is for these.
        Asked with every call of an operator, so that answers are kept."""
        return functools.lru_cache(maxsize=1024)(self._unfit)

    def _unfit(self, formats: tuple[Format, ...], geometry: Geometry | None) -> str | None:
        if not self.operands:
            return None
        asked = list(zip(self.operands, formats, strict=True))
        for codes, format in asked:
            if not codes.has_grid(format):
                return f"the kernel {self.what}, not {_named(formats)}"
        if self.beyond and max(format.bits for format in formats) <= self.beyond:
            return f"the kernel is for words of more than {self.beyond} bits, not {_named(formats)}"
        if len(formats) == 2 and formats[0].bits + formats[1].bits > self.together:
            return f"sums of {_named(formats)} overflow 32 bits at once: {self.together} bits in both together"
        for codes, format in asked:
            if not codes.has_groups(format, geometry):
                return self._unfit_groups(formats, codes.axes_under(geometry))
        if geometry is not None and geometry.groups > 1 and not self.conv_groups:
            return f"a convolution of {geometry.groups} groups has too few bits a group to fill an instruction"
        return None

    def _unfit_groups(self, formats: tuple[Format, ...], axes: tuple[str, ...]) -> str:
        for format in formats:
            if format.block:
                return f"the kernel has no scales of blocks, and {format.name} has one for every {format.block} elements"
        if len(formats) == 1:
            known = ", ".join(map(repr, axes))
            return f"the kernel knows the scale axes {known}, not those of {formats[0].name}"
        scales = " and ".join(f"{f.axes!r} of {letter}" for f, letter in zip(formats, self.letters, strict=True))
        return f"scales {scales} vary along the summed axes"

    def examples(self) -> Iterator[Example]:
        """What a check of the kernel has to try, the same every time: the familiar formats that it serves, each with each, and
        every grid at its fewest and most bits, with some other operand. A product without and with a window."""
        if not self.operands:
            return
        product = len(self.operands) == 2
        names = itertools.product(*_FAMILIAR.get(self.letters if product else "", ()))
        familiar = [tuple(map(Format.parse, pair)) for pair in names if pair]
        for geometry in (None, WINDOW) if product else (None,):
            for formats in dict.fromkeys((*familiar, *self._edges(geometry))):
                if self.unfit(formats, geometry) is None:
                    yield formats, geometry

    def _edges(self, geometry: Geometry | None) -> Iterator[tuple[Format, ...]]:
        """Each edge of each operand, together with the first edge of the other operand with which it is served."""
        left, *others = (codes.edges(geometry) for codes in self.operands)
        if not others:
            yield from ((format,) for format in left)
            return
        (right,) = others
        for i, a in enumerate(left):
            pairs = ((a, right[(i + step) % len(right)]) for step in range(len(right)))
            yield from itertools.islice((pair for pair in pairs if self.unfit(pair, geometry) is None), 1)
        for i, b in enumerate(right):
            pairs = ((left[(i + step) % len(left)], b) for step in range(len(left)))
            yield from itertools.islice((pair for pair in pairs if self.unfit(pair, geometry) is None), 1)

    def draw(self, chance: random.Random, geometry: Geometry | None = None) -> tuple[Format, ...]:
        """Formats of the operands at random, which it serves under this geometry.

        Raises:
            ValueError: it serves nothing under this geometry.
        """
        for _ in range(1000):
            formats = tuple(codes.draw(chance, geometry) for codes in self.operands)
            if self.unfit(formats, geometry) is None:
                return formats
        raise ValueError(f"the kernel serves nothing under {geometry}: {self.unfit(formats, geometry)}")


def _named(formats: tuple[Format, ...]) -> str:
    return " by ".join(format.name for format in formats)


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
        label: backend and variant, as summaries show them.
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
        if isinstance(self.refuses, Serves) and self.operator in LETTERS:
            object.__setattr__(self, "refuses", replace(self.refuses, letters=LETTERS[self.operator]))

    def examples(self) -> Iterator[Example]:
        """Those of its `Serves`; none if it has another predicate, which lists nothing."""
        if isinstance(self.refuses, Serves):
            yield from self.refuses.examples()


# --- what rows are written with --------------------------------------------------------------------------------------

INTEGERS: dict[str, tuple[int, int]] = {name: (grid.fewest, grid.most) for name, grid in GRIDS.items() if not grid.is_float}
"""Every grid of integers at all its bits."""
SIGN = {"sign": (1, 1)}
UNSIGNED = {"uint": (1, 8)}


def at_most(bits: int, **narrower: int) -> dict[str, tuple[int, int]]:
    """The grids of integers at no more than so many bits; `narrower`: grid -> a limit of its own."""
    return {grid: (fewest, min(most, narrower.get(grid, bits))) for grid, (fewest, most) in INTEGERS.items()}


def by_product(operator: str, left: Bits, right: Bits) -> tuple[Codes, Codes]:
    """The operands of a product, with all scale axes that can leave it: those along which nothing is summed.

    A linear layer sums over channels, a convolution's window over positions too. `grad_weight` sums over samples and positions;
    with a scale for each sample, a kernel scales the sum of each before it adds them up.
    """
    if operator == "grad_weight":
        return Codes(left, ("", "N", "C", "NC")), Codes(right, ("",))
    return Codes(left, ("", "N", "NP"), ("", "N")), Codes(right, ("",) if operator == "grad_input" else ("", "O"))
