"""What is written is whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, write: Callable[[BinaryIO], object], *, aside: Path | None = None) -> None:
    """Replace a file in one step: whoever opens `path` finds the old file or the new one, never a part of it.

    Args:
        write: fills the file.
        aside: where the old file goes once the new one is on the disk, instead of being overwritten.

    Where the process is killed, `<path>.part` may stay; the next writing takes its place.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if aside is not None and path.is_file():
            os.replace(path, aside)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a renaming survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
