"""What a run remembers from step to step beside weights and optimizer, kept in its checkpoints."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

FILE = "progress.json"


@dataclass
class Progress:
    """The memory of a run, the same on all processes.

    Attributes:
        unlogged: losses of the steps since the last log entry.
        recent: losses of the last steps, by which a leap is told.
        skipped: steps that did not change the weights because something was wrong with them.
        tokens: real encoder and decoder tokens seen.
    """

    unlogged: list[float] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    skipped: int = 0
    tokens: int = 0

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint; JSON holds every float exactly."""
        (folder / FILE).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Take over what a checkpoint holds."""
        for name, value in json.loads((folder / FILE).read_text(encoding="utf-8")).items():
            setattr(self, name, value)
