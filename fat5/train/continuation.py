"""Whether a run may go on where an earlier one stopped."""

import fcntl
import warnings
from pathlib import Path

from accelerate.utils import gather_object

from fat5.train.errors import TrainingError
from fat5.train.folder import RunFolder
from fat5.train.optimization import require_same_rates
from fat5.train.recipe import Recipe, differences, load_recipe


def require_same_run(recipe: Recipe, folder: RunFolder, checkpoint: Path) -> None:
    """Refuse to continue a run under a recipe that would have made another run of it.

    Raises:
        TrainingError: it would have.
        RecipeError: the recipe that the earlier run left cannot be read.
    """
    if not folder.recipe.is_file():
        return
    before = load_recipe(folder.recipe)
    changed = differences(before, recipe)
    if changed:
        raise TrainingError(
            f"{folder.root} holds a run of another recipe ({'; '.join(changed)}); "
            "give another output.folder for a new run, or the old values to continue that one"
        )
    require_same_rates(before.training, recipe.training, int(checkpoint.name.rsplit("-", 1)[-1]))


def require_agreement(folder: RunFolder, checkpoint: Path | None) -> None:
    """Refuse to start where some processes see another checkpoint than others do; to be called by all.

    Raises:
        TrainingError: they do, on all of them.
    """
    seen = gather_object(["none" if checkpoint is None else checkpoint.name])
    if len(set(seen)) > 1:
        raise TrainingError(
            f"the processes see different checkpoints in {folder.root} ({', '.join(seen)}, by rank); output.folder "
            "must be one that all machines share"
        )


class Claim:
    """While it is entered, no other run writes to a folder; the system lets go of it when the process ends.

    Args:
        folder: the run's, which is made if need be.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def __enter__(self) -> "Claim":
        """Claim the folder.

        Raises:
            TrainingError: another run has it.
        """
        self.folder.root.mkdir(parents=True, exist_ok=True)
        self._file = self.folder.claim.open("w")
        try:
            # Unlike flock's, this lock is not inherited by the processes that prepare batches, which outlive a kill.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self._file.close()
            raise TrainingError(
                f"another run is writing to {self.folder.root}; wait for its end, or give another output.folder"
            ) from error
        except OSError as error:
            warnings.warn(
                f"{self.folder.root} is on a file system without locks ({error.strerror}): see to it yourself that no "
                "other run writes there",
                stacklevel=2,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
