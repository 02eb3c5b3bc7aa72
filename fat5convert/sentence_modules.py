"""The further modules of a sentence-transformers folder (GTR, Sentence-T5): pooling, a Dense layer, normalisation.

They act on what the encoder computes and are no part of the T5; conversion carries them along, so that the result is a
sentence-transformers folder too. Weights in pickles are rewritten as safetensors, bit for bit.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from fat5convert.errors import ConvertError
from fat5convert.formats import open_weights
from fat5convert.hashing import hash_file
from fat5convert.precision import Form
from fat5convert.source import MODULES_FILE, SENTENCE_FILES
from fat5convert.writer import Item, write_weights


def carry_modules(source: Path, target: Path) -> dict[str, str]:
    """Copy the modules of a sentence-transformers folder into another.

    Args:
        source: folder of a checkpoint; nothing happens if it has no modules.json.
        target: folder being written.

    Returns:
        Path in the target -> SHA-256 of every file written.

    Raises:
        ConvertError: modules.json is malformed, names a folder elsewhere, or a module cannot be read.
    """
    listing = source / MODULES_FILE
    if not listing.is_file():
        return {}
    try:
        modules = {module["path"]: module.get("type") for module in json.loads(listing.read_text(encoding="utf-8"))}
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ConvertError(f"{listing}: malformed; expected a list of modules, each with its path") from error
    for name in (MODULES_FILE, *SENTENCE_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for name, kind in modules.items():
        if name == "":  # the transformer itself
            continue
        # A module is a plain folder beside the list: anything else could lead out of it.
        if not isinstance(name, str) or name != Path(name).name or name.startswith("."):
            raise ConvertError(f"{listing}: names {name!r} as a module, which is no folder beside it")
        if not _carry(source / name, target / name) and str(kind).endswith(".Dense"):
            raise ConvertError(f"{source / name}: holds no weights, which a Dense layer has. Download it again.")
    return {
        path.relative_to(target).as_posix(): hash_file(path)
        for path in sorted(target.rglob("*"))
        if path.is_file() and (path.parent != target or path.name in (MODULES_FILE, *SENTENCE_FILES))
    }


def _carry(source: Path, target: Path) -> bool:
    """Copy one module; whether it has weights."""
    target.mkdir(exist_ok=True)
    if (source / "config.json").is_file():
        shutil.copyfile(source / "config.json", target / "config.json")
    weights = next((p for n in ("model.safetensors", "pytorch_model.bin") if (p := source / n).is_file()), None)
    if weights is not None:
        file = open_weights(weights)
        items = [Item(name, file, name, info, Form(info.dtype)) for name, info in file.tensors.items()]
        write_weights(target, items, 1 << 62, lambda count: None)
    return weights is not None
