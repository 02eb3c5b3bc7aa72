"""Start of the command `fat5convert`: interruptions are handled before anything is imported."""

from __future__ import annotations

import io
import sys

from fat5convert.interruption import handle_interruptions, importing


def main() -> None:
    """Run the command."""
    handle_interruptions()
    with importing():
        from fat5convert.cli import main as command
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path need not be text
    command(prog_name="fat5convert")
