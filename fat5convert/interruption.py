"""Ctrl-C and SIGTERM end the program with 130 and 143, no traceback, and nothing half-written."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def handle_interruptions() -> None:
    """From now on, unwind at a signal."""
    for number in _SIGNALS:
        signal.signal(number, _interrupt)


@contextmanager
def importing() -> Iterator[None]:
    """While a command imports what is heavy, before it does anything: a signal ends the program at once.

    An exception would be lost or mangled inside an import. Where signals are not handled here, as where a command is
    called as a function, they stay as they are.
    """
    handled = [number for number in _SIGNALS if signal.getsignal(number) is _interrupt]
    for number in handled:
        signal.signal(number, _leave)
    yield
    for number in handled:
        signal.signal(number, _interrupt)


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Unwind, so that what was begun is cleared away; further signals do not disturb that."""
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    print("\nfat5convert: interrupted", file=sys.stderr)
    raise SystemExit(128 + number)
