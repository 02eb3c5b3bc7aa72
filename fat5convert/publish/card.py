"""The card: metadata and generated sections, merged into what people have written.

A generated section stands between two comments, of which the first holds a hash of the text. A section whose text no
longer fits its hash has been edited by hand and is left as it is, as is everything outside of the comments.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from fat5convert.errors import ConvertError
from fat5convert.publish.origin import Origin
from fat5convert.publish.preflight import Ready

_SECTION = re.compile(
    r"<!-- fat5:begin (?P<name>\w+) (?P<hash>[0-9a-f]{12}) -->\n(?P<text>.*?)\n?<!-- fat5:end (?P=name) -->", re.DOTALL
)


@dataclass(frozen=True)
class Licence:
    """A licence as cards state it; `name` and `link` where it is none of the Hub's list (`other`)."""

    id: str
    name: str | None = None
    link: str | None = None


def licence_of(*cards: ModelCard | None) -> Licence | None:
    """The licence of the first card that states one."""
    for card in cards:
        if card is not None and card.data.get("license") not in (None, "", "unknown"):
            return Licence(*(card.data.get(key) for key in ("license", "license_name", "license_link")))
    return None


def parse(text: str | None, where: str) -> ModelCard | None:
    """A card from its text.

    Raises:
        ConvertError: its metadata cannot be read.
    """
    if text is None:
        return None
    try:
        return ModelCard(text)
    except Exception as error:  # of yaml, of the card's classes
        raise ConvertError(f"{where}: the metadata on top cannot be read ({error}). Mend it there first.") from error


def write(
    ready: Ready,
    origin: Origin | None,
    sections: Mapping[str, str],
    licence: Licence,
    base: ModelCard | None,
    present: ModelCard | None,
) -> ModelCard:
    """Write the card.

    Args:
        ready: the checked folder.
        origin: what it was made from.
        sections: the generated text, by name.
        licence: of the model.
        base: card of the base model.
        present: the card that people may have edited; its text and metadata are kept.
    """
    metadata = _metadata(ready, origin, licence, base, present)
    text = _merge("" if present is None else present.text, sections)
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n{text}")


def edited(present: ModelCard | None) -> list[str]:
    """Names of the sections that were edited by hand."""
    found = _SECTION.finditer(present.text.replace("\r\n", "\n")) if present is not None else ()
    return [match["name"] for match in found if _hash(match["text"]) != match["hash"]]


def _metadata(
    ready: Ready, origin: Origin | None, licence: Licence, base: ModelCard | None, present: ModelCard | None
) -> ModelCardData:
    """What was found out, under what people wrote; only what is true of the weights overrules them."""
    based = base.data.to_dict() if base is not None else {}
    tag = ready.task.tag(based.get("pipeline_tag"))
    licences = {"license": licence.id, "license_name": licence.name, "license_link": licence.link}
    defaults = {"language": based.get("language"), "pipeline_tag": tag}
    facts: dict[str, Any] = {"library_name": "transformers"}
    if origin is not None and origin.on_hub:
        facts |= {"base_model": origin.name, "base_model_relation": origin.relation}
    written = present.data.to_dict() if present is not None else {}
    tags = list(dict.fromkeys([*(written.pop("tags", None) or []), "fat5", "t5"]))
    merged = licences | defaults | written | licences | facts | {"tags": tags}
    return ModelCardData(**{key: value for key, value in merged.items() if value is not None})


def _merge(text: str, sections: Mapping[str, str]) -> str:
    """Put the generated sections into a text: in their places where they have some, else at the end, in order."""
    text = text.replace("\r\n", "\n")
    present = {match["name"] for match in _SECTION.finditer(text)}

    def renew(match: re.Match[str]) -> str:
        if _hash(match["text"]) != match["hash"]:
            return match[0]
        return _framed(match["name"], sections[match["name"]]) if match["name"] in sections else ""

    parts = [_SECTION.sub(renew, text).strip("\n")]
    parts += [_framed(name, generated) for name, generated in sections.items() if name not in present]
    return "\n\n".join(part for part in parts if part) + "\n"


def _framed(name: str, text: str) -> str:
    return f"<!-- fat5:begin {name} {_hash(text)} -->\n{text}\n<!-- fat5:end {name} -->"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
