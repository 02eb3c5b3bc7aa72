"""What a run remembers from step to step beside weights and optimizer, kept in its checkpoints."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fat5.train.errors import TrainingError

FILE = "progress.json"


@dataclass
class Progress:
    """The memory of a run, the same on all processes.

    Attributes:
        unlogged: losses of the steps since the last log entry.
        recent: losses of the last steps, by which a leap is told.
        skipped: steps that did not change the weights because something was wrong with them.
        tokens: real encoder and decoder tokens seen.
        text: windows and tokens of each training corpus, by which text that has changed since is told.
    """

    unlogged: list[float] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    skipped: int = 0
    tokens: int = 0
    text: list[list[int]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint; JSON holds every float exactly."""
        (folder / FILE).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Take over what a checkpoint holds.

        Raises:
            TrainingError: it is of a run on other text, whose examples would be in another order.
        """
        saved = json.loads((folder / FILE).read_text(encoding="utf-8"))
        for number, (now, then) in enumerate(zip(self.text, saved.get("text", []), strict=False)):
            if now != then:
                raise TrainingError(
                    f"data.train[{number}] has {now[0]} examples of {now[1]} tokens in all, and had {then[0]} of "
                    f"{then[1]} when the run of {folder} began; bring the old text back to continue that run, or give "
                    "another output.folder for a new one"
                )
        for name, value in saved.items():
            setattr(self, name, value)
