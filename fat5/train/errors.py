"""What can go wrong in a run in a way that its user can mend."""


class TrainingError(RuntimeError):
    """A run that cannot start or go on; the message says what to change."""
