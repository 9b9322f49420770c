"""Native libraries: what must be known of a file before the loader sees it."""

from __future__ import annotations

import struct
from pathlib import Path


def refuse_truncated(library: Path) -> None:
    """Raise OSError for an ELF file (64-bit, little-endian) that ends before its section headers, which stand last.

    The loader maps such a file all the same, and the process dies of SIGBUS when it touches what is missing.
    """
    with library.open("rb") as file:
        head = file.read(64)
    if head[:6] != b"\x7fELF\x02\x01" or len(head) < 64:
        return
    (offset,), (size, count) = struct.unpack_from("<Q", head, 40), struct.unpack_from("<HH", head, 58)
    whole, found = offset + size * count, library.stat().st_size
    if found < whole:
        raise OSError(f"{library} is cut short: {found:,} bytes of {whole:,}")
