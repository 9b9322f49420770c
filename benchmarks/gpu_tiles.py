"""The part of `gpu_check` that times every tile of a product: is the one that the rule picks the best, and if not by how much?

No tile is chosen by what is found here: whoever has the figures mends the rule (`plan.Rules.tile` of either backend).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field, replace
from typing import Any

from benchmarks.gpu_parts import Bench, Row, operands, serving, wrong
from fqt import ops
from fqt.cuda_kernels import plan as cuda
from fqt.formats import Format
from fqt.triton_kernels import plan as triton

# operator, formats, size: large products, one of few tiles, and one that cuts its sum
TILED = (
    ("output", "int8:N", "int8:O", 8192),
    ("output", "int8:N", "int8:O", 1024),
    ("output", "sign", "sign:O", 8192),
    ("grad_weight", "uint4+:C", "sign", 4096),
)
CHECKED = 256  # a size that Triton compiles no other program for than for those above


@dataclass(frozen=True)
class _TritonAsked(triton.Rules):
    """The usual rules, and in `found` the tile that they gave last and those that they might have given."""

    found: list[Any] = field(default_factory=list)

    def tile(self, m: int, n: int, k: int, capability: tuple[int, int], programs: int = 1, **needs: Any) -> triton.Tile:
        picked = super().tile(m, n, k, capability, programs, **needs)
        limit = triton.shared_bytes(capability)
        fitting = [t for t in self.tiles if t.bytes <= limit and triton.fits_registers(t, capability, **needs)]
        self.found[:] = [picked, fitting]
        return picked


@dataclass(frozen=True)
class _CudaAsked(cuda.Rules):
    """As `_TritonAsked`."""

    found: list[Any] = field(default_factory=list)

    def tile(self, device: cuda.Device, rows: int, columns: int, slices: int = 1) -> cuda.Tile:
        picked = super().tile(device, rows, columns, slices)
        self.found[:] = [picked, self.held(device)]
        return picked


ASKED = {"triton": _TritonAsked, "cuda": _CudaAsked}
"""Backend -> its rules, which tell what they were asked."""


def tiles(device: str, bench: Bench, products: tuple = TILED) -> Iterator[Row]:
    """Every tile that fits, compared with the reference and timed; `picked`: the rule's."""
    for operator, left, right, size in products:
        for kernel in serving(operator, device, (Format.parse(left), Format.parse(right))):
            if kernel.backend not in ASKED:
                continue
            rules, function = ASKED[kernel.backend](), ops.load(kernel.function)
            shapes = ((size, 1, size),) * 3
            args = operands(operator, left, right, 1.0, shapes, None, device)
            function(*args, rules=rules)
            picked, fitting = rules.found
            row: Row = {"part": "tiles", "operator": operator, "formats": f"{left} x {right}", "size": size}
            row |= {"name": f"{operator} {left} x {right} {size}", "backend": kernel.label}
            for tile in fitting:
                here = row | {"tile": "x".join(map(str, astuple(tile))), "picked": tile == picked}
                forced = replace(rules, tiles=(tile,))
                small = operands(operator, left, right, 1.0, ((CHECKED, 1, CHECKED),) * 3, None)
                try:
                    found = wrong(kernel, small, device, rules=forced)
                    here |= {"wrong": found} if found else {"ms": bench(functools.partial(function, *args, rules=forced))}
                except TimeoutError:
                    raise
                except Exception as error:  # noqa: BLE001  a tile that does not run is a finding, and the rest go on
                    here |= {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:160]}
                yield here


def verdicts(rows: list[Row]) -> list[str]:
    """A line for each product and backend: the pick, the fastest, and how many times the fastest's time the pick takes."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(f"{row['name']} {row.get('backend', '')}".strip(), []).append(row)
    lines = []
    for name, found in grouped.items():
        said = [f"{word}: {row[word]}"[:60] for row in found for word in ("wrong", "failed") if word in row][:1]
        timed = {str(row["tile"]): float(row["ms"]) for row in found if "ms" in row}  # type: ignore[arg-type]
        if timed:
            best = min(timed, key=lambda tile: timed[tile])
            pick = next((str(row["tile"]) for row in found if "ms" in row and row["picked"]), None)
            ratio = "" if pick is None else f"picked {pick} {timed[pick]:.3g} ms, {timed[pick] / timed[best]:.2f} times "
            said.insert(0, f"{ratio}the best, {best} {timed[best]:.3g} ms")
        lines.append("; ".join([name, *said]))
    return lines
