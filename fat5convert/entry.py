"""Start of the command `fat5convert`: interruptions are handled before the slow imports begin.

Ctrl-C and SIGTERM end the program with 130 and 143, no traceback, and nothing half-written.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    from fat5convert.cli import main as command  # takes seconds

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path need not be text
    command(prog_name="fat5convert")


def _leave(number: int, frame: FrameType | None) -> None:
    """Nothing has been done yet, and an exception would be lost or mangled inside an import."""
    os._exit(128 + number)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Unwind, so that what was begun is cleared away; further signals do not disturb that."""
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)
    print("\nfat5convert: interrupted", file=sys.stderr)
    raise SystemExit(128 + number)
