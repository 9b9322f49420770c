"""Rules of tiles that tell what they were asked, and such that take the tiles of large operands for small ones."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from fqt.cuda_kernels import plan as cuda
from fqt.triton_kernels import plan as triton


@dataclass(frozen=True)
class _TritonAsked(triton.Rules):
    """The usual rules, and in `found` the tile that they gave last, those that they might have given, and the key of both."""

    found: list[Any] = field(default_factory=list)

    def tile(self, m: int, n: int, k: int, capability: tuple[int, int], programs: int = 1, **needs: Any) -> triton.Tile:
        picked = super().tile(m, n, k, capability, programs, **needs)
        limit = triton.shared_bytes(capability)
        fitting = [t for t in self.tiles if t.bytes <= limit and triton.fits_registers(t, capability, **needs)]
        self.found[:] = [picked, fitting, triton.measured_key(m, n, k, capability, **needs)]
        return picked


@dataclass(frozen=True)
class _CudaAsked(cuda.Rules):
    """As `_TritonAsked`."""

    found: list[Any] = field(default_factory=list)

    def tile(self, device: cuda.Device, rows: int, columns: int, slices: int = 1) -> cuda.Tile:
        picked = super().tile(device, rows, columns, slices)
        self.found[:] = [picked, self.held(device), cuda.measured_key(device, rows, columns, slices)]
        return picked


@dataclass(frozen=True)
class _CudaLargest(cuda.Rules):
    def tile(self, device: cuda.Device, rows: int, columns: int, slices: int = 1) -> cuda.Tile:
        return super().tile(replace(device, processors=1), rows, columns, slices)


ASKED: dict[str, Any] = {"triton": _TritonAsked, "cuda": _CudaAsked}
"""Backend -> its rules, which tell what they were asked."""
LARGEST: dict[str, Any] = {"triton": triton.Rules(processors=1), "cuda": _CudaLargest()}
"""Backend -> rules by which one tile is work enough for a device, so that small operands take the tiles of large ones."""
