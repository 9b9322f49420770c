"""What a run writes goes where nobody else writes."""

import itertools
import os
from datetime import datetime
from pathlib import Path

from train.wording import ConfigError, TrainingError

PROBE = 2**20
"""Bytes that have to fit where a run will write."""


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
