"""Errors of torch, of the system and of other processes, in words that a person can act on."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from train import files
from train.wording import ConfigError, RankError, TrainingError


@contextmanager
def told() -> Iterator[None]:
    """Turns what may end a run from outside, within the block, into one paragraph. Errors of the program itself pass."""
    try:
        yield
    except (ConfigError, TrainingError):
        raise
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RankError(
            f"A process that decodes images died ({' '.join(str(error).split())}). Often that is a lack of memory: lower "
            "data.workers or data.image_size, or set data.workers=0 to see the error itself."
        ) from None
    except OSError as error:
        if error.errno is None:
            raise
        place = f" ({error.filename})" if error.filename else ""
        raise RankError(f"The system refused something that the run needs: {files.reason(error)}{place}.") from error


def print_on(text: str) -> None:
    """Prints; where the reader of a pipe has left, all further output goes nowhere instead of ending the program."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
