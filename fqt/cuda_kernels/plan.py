"""Launch planning: which tile a product takes, how its rows are padded and cut, how large its workspace is. Plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from fqt import measured

ROW_BYTES = 128  # of a tile's row, as kRowBytes in tiles.h


@dataclass(frozen=True)
class Tile:
    """An instance of a GEMM kernel.

    Attributes:
        family: the file, gemm_mma or gemm_wgmma.
        rows, columns: of the result, a block.
        stages: tiles of the operands that are in flight or in use.
        threads: of a block.
    """

    family: str
    rows: int
    columns: int
    stages: int
    threads: int

    @property
    def shared(self) -> int:
        """Bytes of shared memory: the stages, what is known of each row and column (`Layout` in tiles.h), and alignment."""
        return self.stages * (self.rows + self.columns) * ROW_BYTES + self.rows * 32 + self.columns * 4 + 1024

    def blocks(self, rows: int, columns: int) -> int:
        """Blocks that cover a result."""
        return -(-rows // self.rows) * -(-columns // self.columns)


WGMMA = (Tile("gemm_wgmma", 128, 256, 4, 256), Tile("gemm_wgmma", 128, 128, 3, 256))
MMA = (Tile("gemm_mma", 128, 128, 3, 128), Tile("gemm_mma", 64, 64, 4, 128))


@dataclass(frozen=True)
class Device:
    """What a plan needs to know of a GPU: compute capability, multiprocessors, bytes of shared memory that a block may have."""

    capability: tuple[int, int]
    processors: int
    shared: int

    @property
    def architecture(self) -> str:
        """The name that NVRTC goes by. sm_90a has wgmma, plain sm_90 has not."""
        major, minor = self.capability
        return f"sm_{major}{minor}{'a' if major == 9 else ''}"


def refuses(capability: tuple[int, int]) -> str | None:
    """Why a GPU cannot serve 1-bit products, or None."""
    major, minor = capability
    if major < 8:
        return f"compute capability {major}.{minor} has no 1-bit products with AND; 8.0 to 9.0 have"
    if major > 9:
        return f"compute capability {major}.{minor} emulates 1-bit products, slower than 8-bit ones; 8.0 to 9.0 have them"
    return None


def words_of(bits: int, whole: bool = False) -> int:
    """32-bit words for `bits`, padded to 1, 2 or a multiple of 4, so that a copy of 4, 8 or 16 bytes never ends within one.

    Args:
        whole: to a multiple of 4 always.
    """
    words = max(1, -(-bits // 32))
    return words if words <= 2 and not whole else -(-words // 4) * 4


def unit_of(words: int) -> int:
    """Bytes of a copy: the most that divide `words` of `words_of`."""
    return 4 * min(words, 4)


def slice_units(units: int, splits: int) -> int:
    """Units of a slice, whole tiles: `splits` of them, at most, are `units`."""
    per_tile = ROW_BYTES // 16
    return -(-units // (splits * per_tile)) * per_tile


def measured_key(device: Device, rows: int, columns: int, slices: int) -> str:
    """What `fqt.measured` knows a product by: two of one key are close enough to take one tile."""
    sizes = "x".join(str(1 << max(size - 1, 0).bit_length()) for size in (rows, columns, slices))
    return f"{device.capability[0]}.{device.capability[1]} {sizes}"


@dataclass(frozen=True)
class Rules:
    """How a product's launch is decided. No result depends on it: tests and benchmarks hand a kernel other rules than `RULES`.

    Attributes:
        tiles: the tiles to choose from, from large to small.
        workspace: bytes of integers, at most, of a product in slices.
    """

    tiles: tuple[Tile, ...] = WGMMA + MMA
    workspace: int = 256 << 20

    def held(self, device: Device) -> list[Tile]:
        """The tiles that the device has instructions and shared memory for."""
        return [t for t in self.tiles if t.shared <= device.shared and (t not in WGMMA or device.capability[0] == 9)]

    def tile(self, device: Device, rows: int, columns: int, slices: int = 1) -> Tile:
        """The tile that was measured to be the fastest; where none was, the largest that the device holds and of which every
        multiprocessor gets one; else the smallest.

        A tile that reaches further beyond the result's columns than a smaller one has to is passed over.
        """
        tiles = self.held(device)
        fastest = measured.tiles("cuda").get(measured_key(device, rows, columns, slices))
        if fastest is not None and Tile(*fastest) in tiles:
            return Tile(*fastest)
        for tile in tiles[:-1]:
            wasteful = tile.columns > 64 and columns <= tile.columns // 2
            if not wasteful and tile.blocks(rows, columns) * slices >= device.processors:
                return tile
        return tiles[-1]

    def splits(self, device: Device, rows: int, columns: int, units: int) -> int:
        """Into how many slices of units a sum is cut, so that two blocks come on each multiprocessor.

        A slice is no shorter than eight tiles, and the integers of all slices fit the workspace.
        """
        per_tile = ROW_BYTES // 16
        wanted = -(-2 * device.processors // max(1, self.tile(device, rows, columns, 1 << 30).blocks(rows, columns)))
        longest = units // (8 * per_tile)
        return max(1, min(wanted, longest, self.workspace // max(1, rows * columns * 4)))

    def samples_together(self, rows: int, columns: int) -> int:
        """How many samples' integers fit the workspace."""
        return max(1, min(65535, self.workspace // max(1, rows * columns * 4)))


RULES = Rules()
"""By which kernels are launched."""
