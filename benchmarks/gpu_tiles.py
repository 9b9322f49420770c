"""The part of `gpu_check` that times every tile of a product: is the one that the rule picks the best, and if not by how much?

No tile is chosen by what is found here: whoever has the figures mends the rule (`plan.tile`, `plan.tile_of`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from types import ModuleType
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


def _triton_space(_m: int, _n: int, _k: int, capability: tuple[int, int], *_: int, **needs: Any) -> list[triton.Tile]:
    """The tiles that a call of `plan.tile` may pick from, but for its rule."""
    limit = triton.shared_bytes(capability)
    return [t for t in triton.TILES if t.bytes <= limit and triton.fits_registers(t, capability, **needs)]


def _cuda_space(device: cuda.Device, *_: int) -> list[cuda.Tile]:
    """As `_triton_space`, of `plan.tile_of`."""
    return [t for t in (cuda.WGMMA if device.capability[0] == 9 else ()) + cuda.MMA if t.shared <= device.shared]


SPACES: dict[str, tuple[ModuleType, str, Callable[..., list]]] = {
    "triton": (triton, "tile", _triton_space),
    "cuda": (cuda, "tile_of", _cuda_space),
}
"""First word of a backend -> the plan and its function that picks, and what there is to pick from."""


@contextmanager
def _replaced(plan: ModuleType, name: str, function: Callable) -> Iterator[None]:
    before = getattr(plan, name)
    setattr(plan, name, function)
    try:
        yield
    finally:
        setattr(plan, name, before)


def tiles(device: str, bench: Bench, products: tuple = TILED) -> Iterator[Row]:
    """Every tile that fits, compared with the reference and timed; `picked`: the rule's."""
    for operator, left, right, size in products:
        for kernel in serving(operator, device, (Format.parse(left), Format.parse(right))):
            space_of = SPACES.get(kernel.backend)
            if space_of is None:
                continue
            plan, name, space = space_of
            rule, function, asked = getattr(plan, name), ops.load(kernel.function), []

            def picks(*args, asked=asked, rule=rule, space=space, **needs):
                asked[:] = [rule(*args, **needs), space(*args, **needs)]
                return asked[0]

            shapes = ((size, 1, size),) * 3
            args = operands(operator, left, right, 1.0, shapes, None, device)
            with _replaced(plan, name, picks):
                function(*args)
            picked, fitting = asked
            row: Row = {"part": "tiles", "operator": operator, "formats": f"{left} x {right}", "size": size}
            row |= {"name": f"{operator} {left} x {right} {size}", "backend": kernel.label}
            for tile in fitting:
                here = row | {"tile": "x".join(map(str, astuple(tile))), "picked": tile == picked}
                with _replaced(plan, name, lambda *_, tile=tile, **needs: tile):
                    small = operands(operator, left, right, 1.0, ((CHECKED, 1, CHECKED),) * 3, None)
                    try:
                        found = wrong(kernel, small, device)
                        here |= {"wrong": found} if found else {"ms": bench(functools.partial(function, *args))}
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
