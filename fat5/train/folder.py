"""What lies where in a run's output folder."""

from dataclasses import dataclass
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


@dataclass(frozen=True)
class RunFolder:
    """The files of a run, under `root`."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The recipe with every default filled in."""
        return self.root / "recipe.yaml"

    @property
    def corpora(self) -> Path:
        """What the training text is, so that a run cannot go on with another."""
        return self.root / "corpora.json"

    @property
    def log(self) -> Path:
        """One JSON line for each logged step and each evaluation."""
        return self.root / "log.jsonl"

    @property
    def picture(self) -> Path:
        """The loss curves."""
        return self.root / "loss.png"

    @property
    def page(self) -> Path:
        """The page with curves, figures and samples."""
        return self.root / "report.html"

    @property
    def samples(self) -> Path:
        """What the model generated before and after."""
        return self.root / "samples.json"

    @property
    def bad_steps(self) -> Path:
        """One JSON line for each step with which something was wrong, and its examples."""
        return self.root / "bad_steps.jsonl"

    @property
    def claim(self) -> Path:
        """Locked by the run that writes here."""
        return self.root / ".lock"

    @property
    def checkpoints(self) -> Path:
        """What an interrupted run continues from."""
        return self.root / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint after `step` updates."""
        return self.checkpoints / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    @property
    def model(self) -> Path:
        """The trained FAT5 repo."""
        return self.root / "model"
