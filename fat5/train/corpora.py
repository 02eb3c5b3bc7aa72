"""What the training text of a run is, kept in its folder: it must not change under a run that goes on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from fat5.data.batches import BatchDataset
from fat5.data.documents import DataError
from fat5.data.hub_revision import pinned
from fat5.data.stream import StreamBatches
from fat5.data.token_store import default_cache
from fat5.train.errors import TrainingError
from fat5.train.folder import RunFolder
from fat5.train.recipe import Recipe


def pin_corpora(recipe: Recipe, folder: RunFolder, fresh: bool) -> Recipe:
    """Name the commit of each data set of the Hub: that of the run that goes on, or what it is now.

    All processes get what the first one finds.

    Raises:
        TrainingError: a data set cannot be found.
    """
    revisions: list[Any] = [None]
    if PartialState().is_main_process:
        known = None if fresh else _read(folder)
        cache = default_cache() if recipe.data.cache is None else Path(recipe.data.cache).expanduser()
        try:
            revisions = [known["revisions"] if known else [pinned(c, cache).revision for c in recipe.data.train]]
        except (DataError, OSError) as error:
            raise TrainingError(str(error)) from error
    revisions = broadcast_object_list(revisions)[0]
    train = tuple(replace(c, revision=r) for c, r in zip(recipe.data.train, revisions, strict=True))
    return replace(recipe, data=replace(recipe.data, train=train))


def require_same_text(
    recipe: Recipe, batches: BatchDataset | StreamBatches, folder: RunFolder, fresh: bool
) -> dict[str, Any]:
    """Compare the training text with that of the run that goes on.

    Args:
        recipe: with its data sets' commits.
        batches: made from it. Of streamed corpora only the commits are known.
        folder: the run's.
        fresh: there is nothing to compare with.

    Returns:
        What is to be kept, as `corpora.json`.

    Raises:
        TrainingError: a corpus has other tokens than when the run began.
    """
    stored = batches.schedule.windows.identity if isinstance(batches, BatchDataset) else None
    found = {"revisions": [c.revision for c in recipe.data.train], "tokens": stored}
    known = None if fresh else _read(folder)
    for corpus, before, now in zip(recipe.data.train, (known or {}).get("tokens") or (), stored or (), strict=False):
        if before != now:
            raise TrainingError(
                f"the text of {corpus.name} is not what it was when the run in {folder.root} began; put it back to"
                " continue that run, or give another output.folder for a new one"
            )
    return found


def _read(folder: RunFolder) -> dict[str, Any] | None:
    """Read what an earlier part of the run has kept; None where it has not."""
    if not folder.corpora.exists():
        return None
    try:
        return dict(json.loads(folder.corpora.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise TrainingError(f"cannot read {folder.corpora}: {error}; delete it to continue all the same") from error
