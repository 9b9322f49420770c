"""What a signal does: before the first step, while a step is finished, and when it comes again."""

import os
import signal
import threading

import pytest

from train import stop as module
from train.stop import Interrupted, Stop


def send(number):
    os.kill(os.getpid(), number)


def test_a_signal_ends_what_need_not_be_finished():
    stop = Stop()
    with stop.listening(), pytest.raises(Interrupted, match="SIGTERM") as error:
        send(signal.SIGTERM)
    assert error.value.status == 143


def test_a_signal_is_remembered_while_something_is_finished():
    stop = Stop()
    with stop.listening(), stop.finishing():
        send(signal.SIGHUP)
        send(signal.SIGINT)
        assert stop.number == signal.SIGHUP


@pytest.mark.parametrize(
    "numbers", [(signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT)]
)
def test_the_same_wish_told_twice_does_not_break_the_end(numbers):
    """A launcher repeats the signal while the process group is being left."""
    stop = Stop()
    with stop.listening():
        with stop.finishing():
            send(numbers[0])
        send(numbers[1])
    assert stop.number == numbers[0]


def test_a_second_control_c_insists(monkeypatch):
    clock = iter([10.0, 10.0 + module.PATIENCE + 0.1])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    stop = Stop()
    with stop.listening(), stop.finishing():
        send(signal.SIGINT)
        with pytest.raises(Interrupted):
            send(signal.SIGINT)


def test_handlers_are_put_back_and_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        handlers = [signal.getsignal(number) for number in module.SIGNALS]
        with Stop().listening():
            send(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert [signal.getsignal(number) for number in module.SIGNALS] == handlers
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_hears_nothing_and_changes_nothing():
    seen = []

    def listen():
        with Stop().listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before]
