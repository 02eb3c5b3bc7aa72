"""What the commands share: expected failures as one message, sizes as people read them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from fat5convert.errors import ConvertError, DifferenceError


class Different(click.ClickException):
    """Verification found a difference."""

    exit_code = 3


@contextmanager
def one_message() -> Iterator[None]:
    """Turn an expected failure into one message and its exit code, without a traceback."""
    try:
        yield
    except ConvertError as error:
        raise (Different if isinstance(error, DifferenceError) else click.ClickException)(str(error)) from error
    except OSError as error:  # a disk that fails, a folder that may not be looked into
        raise click.ClickException(f"{error.filename or 'a file'}: {error.strerror or error}") from error


def size(count: float) -> str:
    """A number of bytes, to three digits."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
