"""What lies where in a run's output folder."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """The files of a run, under `root`."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The recipe with every default filled in."""
        return self.root / "recipe.yaml"

    @property
    def log(self) -> Path:
        """One JSON line for each logged step and each evaluation."""
        return self.root / "log.jsonl"

    @property
    def picture(self) -> Path:
        """The loss curves."""
        return self.root / "loss.png"

    @property
    def checkpoints(self) -> Path:
        """What an interrupted run continues from."""
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        """The trained FAT5 repo."""
        return self.root / "model"
