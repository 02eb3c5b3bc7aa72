"""The one exception of the converter: a message for the person at the terminal."""


class ConvertError(Exception):
    """The work cannot be done; the message names the file, tensor or key at fault and what to do about it."""


class DifferenceError(ConvertError):
    """Verification ran to its end and found a difference; nothing was published."""
