"""What the Triton kernels serve, and how they are launched: plain Python, without Triton and without a device."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

import torch

from fqt import measured
from fqt.formats import Format, Grouping, Shape3
from fqt.geometry import Geometry

SHARED_BYTES = {
    (8, 0): 166_912, (8, 6): 101_376, (8, 7): 166_912, (8, 9): 101_376, (12, 0): 101_376, (12, 1): 101_376,
}  # fmt: skip
"""Shared memory of a block by compute capability, where it is less than the 232,448 bytes of Hopper and Blackwell."""
FLOAT8_CAPABILITY = (8, 9)
WIDE = 1 << 31
"""What a sum of 32 bits cannot hold."""
_NO_TRITON = "Triton is not installed: pip install triton"


def shared_bytes(capability: tuple[int, int]) -> int:
    """Shared memory that a block may use."""
    return SHARED_BYTES.get(capability, 232_448)


# --- what is served --------------------------------------------------------------------------------------------------


@functools.cache
def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def device_capability() -> tuple[int, int]:
    """Compute capability of the current device, of which a machine may have several kinds; Hopper's where there is none."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)


def refuses() -> str | None:
    """Why no Triton kernel can serve on this machine, or None."""
    return None if installed() else _NO_TRITON


def refuses_float8() -> str | None:
    """Why no product of 8-bit floats can be served on this machine, or None."""
    reason = refuses()
    if reason is None and device_capability() < FLOAT8_CAPABILITY:
        return "8-bit floats need compute capability 8.9"
    return reason


# --- how tensors lie -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A tensor (N, P, C) as rows of codes in stored order, see `fqt.formats`. A group is `group_rows` rows on end.

    Element `i` of row `r` is the tensor's element at (r // row_split, r % row_split) and (i // split, i % split), along the
    axes that `strides` gives strides for, in this order.
    """

    rows: int
    length: int
    group_rows: int
    row_split: int
    split: int
    grouping: Grouping

    def strides(self, n: int, p: int, c: int) -> tuple[int, int, int, int]:
        """Strides of the four coordinates, from those of (N, P, C)."""
        first, second, last = self.grouping.stored((n, p, c))
        return (first, second, 0, last) if self.grouping.apart else (first, 0, second, last)


def stored(format: Format, shape: Shape3) -> Stored:
    """How a tensor of logical `shape` lies in a format without blocks."""
    grouping = format.grouping
    first, second, length = grouping.rows(shape)
    lead = {0: first * second, 1: second, 2: 1}[grouping.lead]
    return Stored(first * second, length, max(lead, 1), max(second, 1), max(grouping.stored(shape)[2], 1), grouping)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Pass:
    """Tiles of an elementwise pass over stored rows."""

    rows: int
    columns: int


def elementwise(of: Stored, elements: int = 2048) -> Pass:
    """Tiles of a pass that packs along the rows: at least 8 codes, so that a tile ends at a byte."""
    columns = min(max(power_of_two(of.length), 8), 128 if of.group_rows == 1 and of.grouping.axes != "NP" else 256)
    return Pass(min(elements // columns, power_of_two(of.rows)), columns)


@dataclass(frozen=True)
class Reduction:
    """How the range of groups is found: programs of `rows` x `columns`, each over `span` rows (or columns) of a group.

    `each_row`: a row is a group, so the tile's rows are reduced one by one and `span` counts columns.
    """

    each_row: bool
    rows: int
    columns: int
    span: int
    chunks: int

    def grid(self, of: Stored) -> tuple[int, int]:
        return ceil_div(of.rows, self.rows) if self.each_row else of.rows // of.group_rows, self.chunks


_PROGRAMS = 1024  # about what fills a large GPU several times over


def span(elements: int, step: int, programs: int) -> int:
    """How many elements a program takes, in steps, where `programs` of them would take all elements of their own group."""
    chunks = ceil_div(_PROGRAMS, max(programs, 1))
    return step * max(1, ceil_div(ceil_div(elements, step), chunks))


def reduction(of: Stored) -> Reduction:
    """Chunks such that some `_PROGRAMS` programs share the work, or fewer of at least a few tiles each."""
    tile = elementwise(of)
    if of.group_rows == 1:
        wanted = ceil_div(_PROGRAMS, ceil_div(of.rows, tile.rows))
        span = tile.columns * max(4, ceil_div(ceil_div(of.length, tile.columns), wanted))
        return Reduction(True, tile.rows, tile.columns, span, ceil_div(of.length, span))
    rows = min(tile.rows, power_of_two(of.group_rows))
    wanted = ceil_div(_PROGRAMS, of.rows // of.group_rows)
    span = rows * max(4, ceil_div(ceil_div(of.group_rows, rows), wanted))
    return Reduction(False, rows, tile.columns, span, ceil_div(of.group_rows, span))


# --- products --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """Tile of a product (m x n, k terms at a time), its warps, and how many tiles of operands are under way."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    @property
    def bytes(self) -> int:
        """Shared memory of the operands, one byte a code."""
        return (self.m + self.n) * self.k * self.stages


TILES = (
    Tile(128, 256, 128, 8, 4),
    Tile(128, 256, 128, 8, 3),
    Tile(128, 128, 128, 8, 3),
    Tile(128, 128, 64, 8, 4),
    Tile(64, 128, 64, 4, 4),
    Tile(64, 64, 64, 4, 4),
    Tile(32, 32, 32, 4, 2),
)
"""The space of tiles, from large to small; `Rules.tile` picks one."""


HOLDS = {
    "": (64, 128, 64, 128), "places": (64, 64, 64, 128), "added": (32, 64, 64, 128), "offset": (64, 64, 32, 64),
    "offsets": (32, 32, 32, 64), "wide": (32, 32, 32, 64),
}  # fmt: skip
"""What a thread holds beside its sums of codes -> the most sums that then fit its registers before Hopper, on Hopper, after;
the most terms at a time."""


def fits_registers(t: Tile, capability: tuple[int, int], *, turned: bool = False, holds: str = "") -> bool:
    """Whether a tile's product keeps out of local memory, as `benchmarks.aot` shows.

    Before Hopper the tensor cores' operands are in registers too.

    Args:
        turned: an operand is read across k and turned in registers.
        holds: "places": of pixels under a window, or a second set of sums (8-bit floats); "added": sums to be added to;
            "offset": an operand's offset, centre or mask; "offsets": of both, and a window; "wide": sums of 64 bits.
    """
    hopper = capability >= (9, 0)
    sums = t.m * t.n // (32 * t.warps)  # of a thread
    if turned and t.m * t.n * t.k > (128 * 128 * 64 if hopper else 64 * 64 * 64):
        return False
    *most, terms = HOLDS[holds]
    return sums <= most[min(max(capability[0], 8), 10) - 8] and t.k <= terms


def measured_key(m: int, n: int, k: int, capability: tuple[int, int], *, turned: bool = False, holds: str = "") -> str:
    """What `fqt.measured` knows a product by: two of one key are close enough to take one tile."""
    sizes = "x".join(str(power_of_two(size)) for size in (m, n, k))
    return " ".join(filter(None, (f"{capability[0]}.{capability[1]}", sizes, "turned" * turned, holds)))


def centre(format: Format) -> int:
    """What is subtracted from codes to make them signed bytes."""
    return 128 if format.grid == "uint" and format.bits == 8 else 0


def bound(terms: int, *formats: Format) -> int:
    """The largest magnitude of a sum of products, centred or not, while it is corrected."""
    for format in formats:
        terms *= max(*(abs(int(code)) for code in format.code_range), 2 * centre(format))
    return terms


def is_linear(geometry: Geometry | None) -> bool:
    """Whether a product is one of matrices: a linear layer, or windows of one pixel that meet each pixel once."""
    return geometry is None or (
        geometry.kernel == (1, 1) and geometry.stride == (1, 1) and not any(geometry.padding) and geometry.groups == 1
    )


@dataclass(frozen=True)
class Split:
    """The terms of grad_weight cut among programs: `chunk` terms each."""

    chunk: int
    splits: int


@dataclass(frozen=True)
class Rules:
    """How a product's launch is decided. No result depends on it: tests and benchmarks hand a kernel other rules than `RULES`.

    Attributes:
        tiles: the tiles to choose from, from large to small.
        processors: of the device, each of which is to get work.
        expand_from: a packed operand that at least so many tiles read is unpacked once, in memory; below, each tile unpacks it
            in registers.
        wide: sums that may reach this are kept in 64 bits.
    """

    tiles: tuple[Tile, ...] = TILES
    processors: int = 132
    expand_from: int = 3
    wide: int = WIDE

    def tile(
        self,
        m: int,
        n: int,
        k: int,
        capability: tuple[int, int],
        programs: int = 1,
        *,
        turned: bool = False,
        holds: str = "",
    ) -> Tile:
        """The tile that was measured to be the fastest; where none was, the largest that fits shared memory, wastes no half of
        itself and gives each processor work (else the smallest fit).

        Args:
            k: terms that lie on end.
            programs: into how many programs the sum itself is cut, conv groups included.
            turned, holds: see `fits_registers`.
        """
        limit = shared_bytes(capability)
        tiles = [t for t in self.tiles if t.bytes <= limit and fits_registers(t, capability, turned=turned, holds=holds)]
        tiles = tiles or [self.tiles[-1]]
        fits = [t for t in tiles if t.m < 2 * m and t.n < 2 * n and t.k < 2 * max(k, 17)]
        fits = fits or [tiles[-1]]
        fastest = measured.tiles("triton").get(measured_key(m, n, k, capability, turned=turned, holds=holds))
        if fastest is not None and Tile(*fastest) in tiles:
            return Tile(*fastest)
        for candidate in fits:
            if ceil_div(m, candidate.m) * ceil_div(n, candidate.n) * programs >= self.processors:
                return candidate
        return min(fits, key=lambda t: (t.m * t.n, -t.k))

    def expands(self, format: Format, reads: int, groups: int) -> bool:
        """Whether an operand is unpacked to a byte a code before the product.

        A tile unpacks some four instructions a code, as long as the tensor cores take for 64 multiply-adds of it. Conv groups
        need not begin at a byte, and a byte of 8 unsigned bits is centred to fit the signed tensor cores: both take this way.
        Other bytes are as they should be, and nothing is done.
        """
        return format.storage_bits == 8 or groups > 1 or reads >= self.expand_from

    def split(self, tiles: int, terms: int, t: Tile, *formats: Format) -> Split:
        """Cuts such that every processor has work, none less than 8 steps, and no 32-bit sum overflows."""
        most = (self.wide - 1) // max(bound(1, *formats), 1) // t.k * t.k
        wanted = max(1, self.processors * 2 // max(tiles, 1))
        chunk = max(ceil_div(ceil_div(terms, wanted), t.k) * t.k, 8 * t.k)
        chunk = min(chunk, most)
        return Split(chunk, ceil_div(terms, chunk))

    def samples_apart(self, tiles: int, samples: int, size: int) -> bool:
        """Whether a product with a scale for each sample works samples off side by side and writes down their terms of
        `size` floats.

        It does where the tiles leave most processors without work, and the terms take at most 256 MiB.
        """
        return 1 < samples < 1 << 16 and tiles < self.processors // 2 and samples * size * 4 <= 1 << 28


RULES = Rules()
"""By which kernels are launched."""
