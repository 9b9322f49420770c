"""What a run writes is whole or not there, and goes where nobody else writes."""

import itertools
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from train.wording import ConfigError, TrainingError

PROBE = 2**20
"""Bytes that have to fit where a run will write."""


def write_atomically(path: Path, write: Callable[[BinaryIO], object], *, aside: Path | None = None) -> None:
    """Replaces a file in one step: whoever opens `path` finds the old file or the new one, never a part of it.

    write: fills the file. aside: where the old file goes once the new one is on the disk, instead of being overwritten.
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
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes a renaming survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(output: str) -> None:
    """Writes a megabyte below the folder of all runs, and removes it. Raises ConfigError where that fails."""
    path = Path(output)
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    probe = path / f".probe.{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            file.write(bytes(PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(f"output = {output}: nothing can be written there ({reason(error)}); set output to {WISH}.") from None
    finally:
        try:
            probe.unlink(missing_ok=True)
            for folder in made:
                folder.rmdir()
        except OSError:  # somebody else's run began there
            pass


WISH = "a folder that this user may write to, on a disk with room"


def new_folder(output: str, name: str) -> Path:
    """Makes <output>/<name>/<date-time>, which no other run has: of several that start at once, each gets its own."""
    parent, stamp = Path(output) / name, datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for number in itertools.count(1):
        folder = parent / (stamp if number == 1 else f"{stamp}_{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not parent.is_dir():
                raise ConfigError(f"output = {output}: {parent} is a file; set output to {WISH}.") from None
        except OSError as error:
            raise ConfigError(f"output = {output}: {folder} cannot be made ({reason(error)}); set output to {WISH}.") from None
        else:
            return folder
    raise AssertionError("there is always another number")


def unwritten(what: Path, error: OSError) -> TrainingError:
    """A write that failed while the run went on, in words."""
    return TrainingError(f"{what} could not be written ({reason(error)})")


def reason(error: OSError) -> str:
    """What the system says, without its number."""
    return error.strerror or str(error) or type(error).__name__
