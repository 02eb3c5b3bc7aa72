"""What can end a run before its end in a way that its user can mend."""

from pathlib import Path


class TrainingError(RuntimeError):
    """A run that cannot start or go on; the message says what to change."""


class Stopped(Exception):  # noqa: N818  # not an error
    """A run that was asked to stop, and can be continued.

    Args:
        by: the signal's name.
        checkpoint: where the run will go on.
    """

    def __init__(self, by: str, checkpoint: Path) -> None:
        super().__init__(f"stopped by {by}; everything is saved in {checkpoint}, the same command continues the run")
        self.checkpoint = checkpoint
