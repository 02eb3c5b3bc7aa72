"""Which checkpoint a run continues from."""

from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fat5.train.errors import TrainingError

# `Trainer` writes it after everything else, so a checkpoint that has it is whole.
LAST_WRITTEN = "trainer_state.json"


def newest(folder: Path) -> Path | None:
    """Return the complete checkpoint of the most steps in a folder, or None."""
    found = {
        int(path.parent.name.rsplit("-", 1)[1]): path.parent
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{LAST_WRITTEN}")
        if path.parent.name.rsplit("-", 1)[1].isdigit()
    }
    return found[max(found)] if found else None


def choose(resume: str, folder: Path) -> Path | None:
    """Decide where a run starts.

    Args:
        resume: `auto` (the newest complete checkpoint in `folder`, if any), `never`, or a checkpoint's path.
        folder: where the run keeps its checkpoints.

    Returns:
        The checkpoint to continue from, or None for a fresh start.

    Raises:
        TrainingError: a path without a complete checkpoint, or `never` where an earlier run has left some.
    """
    if resume == "auto":
        return newest(folder)
    if resume == "never":
        if (old := newest(folder)) is not None:
            raise TrainingError(
                f"{old} is of an earlier run, and --resume never would mix the two; "
                "give another output.folder, or delete the old one"
            )
        return None
    path = Path(resume)
    if not (path / LAST_WRITTEN).is_file():
        raise TrainingError(f"--resume {path}: not a complete checkpoint ({LAST_WRITTEN} is missing)")
    return path
