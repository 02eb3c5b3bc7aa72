"""The model that a published one was made from, and what its card says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from fat5convert.json_files import read_json
from fat5convert.publish.contents import CARD, CONVERSION
from fat5convert.publish.hub_errors import HTTP_ERRORS, status_of
from fat5convert.publish.preflight import Ready
from fat5convert.publish.remote import Remote


@dataclass(frozen=True)
class Origin:
    """The base model. `revision` is None where it is not known to be on the Hub."""

    name: str
    revision: str | None
    trained: bool  # since

    @property
    def on_hub(self) -> bool:
        """Whether it can be linked to."""
        return self.revision is not None

    @property
    def relation(self) -> str:
        """In the Hub's words, which have none for a change of layout: conversions are filed under `quantized`."""
        return "finetune" if self.trained else "quantized"


def find_origin(ready: Ready, on_hub: Callable[[str], bool]) -> Origin | None:
    """What the conversion says, or else what the training began with; None if it began with nothing.

    Args:
        ready: the checked folder.
        on_hub: whether the Hub has a repo of this name. A recipe's path may look like one and be a folder that is not
            there, or not seen from here, any more.
    """
    if ready.conversion is not None:
        return _source(ready.conversion, trained=ready.training is not None)
    recipe = ready.training.get("recipe") if ready.training else None
    model = recipe.get("model") if isinstance(recipe, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("path"), str) or model.get("fresh") is not None:
        return None
    folder = Path(model["path"]).expanduser()
    if (folder / CONVERSION).is_file():
        return _source(read_json(folder / CONVERSION), trained=True)
    if folder.exists() or model["path"].count("/") != 1 or not on_hub(model["path"]):
        return Origin(folder.name, None, trained=True)
    return Origin(model["path"], model.get("revision") or "main", trained=True)


def _source(conversion: Mapping[str, Any], *, trained: bool) -> Origin | None:
    source = conversion.get("source")
    if not isinstance(source, dict) or not isinstance(source.get("name"), str):
        return None
    return Origin(source["name"], source.get("revision"), trained)


def read_card(remote: Remote, origin: Origin | None) -> ModelCard | None:
    """The base model's card, None where there is none to be seen, or none that can be read."""
    if origin is None or not origin.on_hub:
        return None
    try:
        path = remote.api.hf_hub_download(origin.name, CARD, revision=origin.revision)
    except HTTP_ERRORS as error:
        # No other error means that there is no card: not, for one, that the Hub could not be reached.
        if status_of(error) in (401, 403, 404):
            return None
        raise
    try:
        return ModelCard.load(path, ignore_metadata_errors=True)
    except Exception:  # of yaml, of the card's classes: it is not for us to mend
        return None
