"""The tiles that were fastest where products were timed: `tiles.json`, which ships, so that all ranks choose alike.

A line is a backend's key of a product (capability, sizes by powers of two, what else decides) and the numbers of a tile.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

PATH = Path(__file__).parent / "tiles.json"
Tiles = dict[str, dict[str, list]]
"""Backend -> key -> the fields of its tile."""


@functools.cache
def tiles(backend: str) -> dict[str, tuple]:
    """Key -> the fields of the fastest tile; empty where nothing was timed."""
    return {key: tuple(tile) for key, tile in json.loads(PATH.read_text()).get(backend, {}).items()}


def keep(found: Tiles) -> None:
    """Write tiles into the file, over those of the same keys."""
    kept: Tiles = json.loads(PATH.read_text())
    for backend, best in found.items():
        kept[backend] = dict(sorted({**kept.get(backend, {}), **best}.items()))
    PATH.write_text(json.dumps(kept, indent=1) + "\n")
