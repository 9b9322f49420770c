"""SIGTERM, SIGINT and SIGHUP ask a run to end: it finishes its step, writes a checkpoint, and says in one line how to go on.

Before the first step there is nothing to finish, and the program ends at once. So it does at a second Ctrl-C that comes more
than two seconds after the first: a terminal and a launcher may both deliver one and the same.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PATIENCE = 2.0
"""Seconds after the first signal in which further ones mean the same."""


class Interrupted(KeyboardInterrupt):
    """A signal that ends the program where it is."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class Stopped(Exception):
    """The run ended because it was asked to, between two steps. status: the exit status of the program."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Stop:
    """What signals asked for.

    number: of the first signal; None if none came.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._first = 0.0
        self._finishing = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Receives the signals within the block, except those that the process was started to ignore (as nohup does)."""
        if threading.current_thread() is not threading.main_thread():  # where Python delivers no signals
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        heard = [number for number in SIGNALS if before[number] is not signal.SIG_IGN]
        for number in heard:
            signal.signal(number, self._hear)
        try:
            yield
        finally:
            for number in heard:
                signal.signal(number, before[number])

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """A signal that comes within the block is only remembered: who runs the block ends it when it can."""
        self._finishing = True
        try:
            yield
        finally:
            self._finishing = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        first, now = self.number is None, time.monotonic()
        if first:
            self.number, self._first = number, now
        insists = number == signal.SIGINT and now > self._first + PATIENCE
        if insists or (first and not self._finishing):
            raise Interrupted(number)
