"""Signals: the first is noted, the second does what it always did, and afterwards all is as it was."""

import os
import signal

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


@pytest.mark.parametrize("first", NUMBERS)
def test_a_worker_outlives_the_first_and_not_the_second(first):
    outlive_first(0)
    os.kill(os.getpid(), first)
    assert [signal.getsignal(number) for number in NUMBERS] == [signal.SIG_DFL] * 2
