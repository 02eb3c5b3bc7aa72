"""Signals: the first is noted, the second does what it always did, and afterwards all is as it was."""

import contextlib
import os
import signal
import subprocess
import time

import pytest

from fat5.train.signals import StopSignals, outlive_first

NUMBERS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def _handlers():
    """Python's own, whatever the tests run under; put back."""
    before = [signal.signal(number, signal.default_int_handler) for number in NUMBERS]
    yield
    for number, handler in zip(NUMBERS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("first", NUMBERS)
@pytest.mark.parametrize("second", NUMBERS)
def test_the_first_is_noted_and_the_second_of_either_kind_ends(first, second):
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), first)
        assert signals.received == first.name
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), second)
    assert [signal.getsignal(number) for number in NUMBERS] == [signal.default_int_handler] * 2


@pytest.fixture
def worker():
    """A process that has been told to outlive the first signal, and waits."""
    told, tell = os.pipe()
    if (process := os.fork()) == 0:
        outlive_first(0)
        os.write(tell, b"!")
        time.sleep(60)
        os._exit(1)
    assert os.read(told, 1) == b"!"
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def ended(process: int) -> bool:
    return os.waitpid(process, os.WNOHANG)[0] == process


@pytest.mark.parametrize("first", NUMBERS)
def test_a_worker_outlives_the_first_signal_and_not_the_second(worker, first):
    for number in (first, signal.SIGTERM):
        assert not ended(worker)
        subprocess.run(["kill", f"-{int(number)}", str(worker)], check=True)  # not by its parent
        time.sleep(0.2)
    assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 0


def test_a_worker_obeys_the_run_at_once(worker):
    """Which waits for it at its own end."""
    os.kill(worker, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 0
