"""The part of `gpu_check` that times every tile of a product: is the one that the rule picks the best, and if not by how much?

    python -m benchmarks.gpu_tiles FILE.jsonl      writes what was fastest into fqt/tiles.json

What was fastest there is picked by `plan.Rules.tile` from then on: a file that ships, so that all ranks choose alike.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path

from benchmarks.gpu_asked import ASKED
from benchmarks.gpu_machine import Machine
from benchmarks.gpu_parts import Row, Task, checked, operands, serving, wrong
from fqt import measured, ops
from fqt.formats import Format
from fqt.ops import Kernel

# operator, formats, size: large products, of few tiles, and such that cut their sum
TILED = (
    ("output", "int8:N", "int8:O", 8192),
    ("output", "sign", "sign:O", 8192),
    ("grad_weight", "int8:C", "int8", 8192),
    ("output", "int8:N", "int8:O", 4096),
    ("grad_input", "int8:N", "int8", 4096),
    ("grad_weight", "uint4+:C", "sign", 4096),
    ("output", "int8:N", "int8:O", 1024),
)


def tiles(machine: Machine, products: tuple = TILED) -> Iterator[Task]:
    """Every tile that fits, compared with the reference and timed; `picked`: the rule's."""
    for operator, left, right, size in products:
        for kernel in serving(operator, machine.device, (Format.parse(left), Format.parse(right))):
            if kernel.backend in ASKED:
                product = (operator, left, right, 64 if machine.small else size)
                yield f"{operator} {left} x {right} {size} {kernel.label}", functools.partial(_timed, machine, kernel, *product)


def _timed(machine: Machine, kernel: Kernel, operator: str, left: str, right: str, size: int) -> Iterator[Row]:
    rules, function = ASKED[kernel.backend](), ops.load(kernel.function)
    args = operands(operator, left, right, 1.0, ((size, 1, size),) * 3, None, machine.device)
    function(*args, rules=rules)
    picked, fitting, key = rules.found
    row: Row = {"name": f"{operator} {left} x {right} {size}", "backend": kernel.label, "table": kernel.backend, "key": key}
    small = operands(operator, left, right, 1.0, checked(None), None)
    for tile in sorted(fitting, key=lambda tile: tile != picked):
        here = row | {"tile": list(astuple(tile)), "picked": tile == picked}
        options = {"rules": replace(rules, tiles=(tile,))}
        try:
            found = wrong(kernel, small, machine.device, **options)
            here |= {"wrong": found} if found else {"ms": machine.bench(functools.partial(function, *args, **options))}
        except (RuntimeError, ValueError) as error:  # a tile that does not run is a finding, and the rest go on
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
        timed = {_named(row): float(row["ms"]) for row in found if "ms" in row}  # type: ignore[arg-type]
        if timed:
            best = min(timed, key=lambda tile: timed[tile])
            pick = next((_named(row) for row in found if "ms" in row and row["picked"]), None)
            ratio = "" if pick is None else f"picked {pick} {timed[pick]:.3g} ms, {timed[pick] / timed[best]:.2f} times "
            said.insert(0, f"{ratio}the best, {best} {timed[best]:.3g} ms")
        lines.append("; ".join([name, *said]))
    return lines


def _named(row: Row) -> str:
    return "x".join(map(str, row["tile"]))  # type: ignore[call-overload]


def fastest(rows: list[Row]) -> measured.Tiles:
    """Backend -> key -> the best tile of those that were right in all products of the key.

    Products of one key may take very different times, so tiles are compared within each: the best tile is the one whose time
    over the product's fastest, where that is largest, is smallest.
    """
    timed: dict[tuple[str, str], dict[str, dict[tuple, float]]] = {}
    for row in rows:
        if row["part"] == "tiles" and "ms" in row:
            products = timed.setdefault((str(row["table"]), str(row["key"])), {})
            tile = tuple(row["tile"])  # type: ignore[arg-type]
            products.setdefault(f"{row['name']} {row['backend']}", {})[tile] = float(row["ms"])  # type: ignore[arg-type]
    found: measured.Tiles = {}
    for (backend, key), products in timed.items():
        slowness = {
            tile: max(ms[tile] / min(ms.values()) for ms in products.values())
            for tile in set.intersection(*(set(ms) for ms in products.values()))
        }
        if slowness:
            found.setdefault(backend, {})[key] = list(min(slowness, key=lambda tile: (slowness[tile], tile)))
    return found


if __name__ == "__main__":
    from benchmarks.gpu_part import rows_of

    measured.keep(fastest(rows_of(Path(sys.argv[1]))))
