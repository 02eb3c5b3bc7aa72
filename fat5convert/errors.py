"""The one exception of the converter: a message for the person at the terminal."""

from collections.abc import Sequence


class ConvertError(Exception):
    """The work cannot be done; the message names the file, tensor or key at fault and what to do about it."""


class DifferenceError(ConvertError):
    """Verification ran to its end and found a difference; nothing was published."""


def some(names: Sequence[str], limit: int = 8, between: str = ", ") -> str:
    """The first few, and how many more there are."""
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return between.join(names[:limit]) + more
