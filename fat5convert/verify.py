"""Prove that OUT is its source: tensor by tensor through hashes, and by what the two models compute.

The result is `parity.json`, whose fields docs/parity-certificate.md explains.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from fat5 import model as fat5_model
from fat5.model import RUNTIME_FILES
from fat5convert.errors import ConvertError
from fat5convert.hashing import hash_chunks, hash_file, hash_values
from fat5convert.json_files import read_json
from fat5convert.parity import compare_models
from fat5convert.precision import Form
from fat5convert.recognise import Recognised, recognise
from fat5convert.rescaling import Rescaling
from fat5convert.source import SETTINGS_FILES, Checkpoint, local, locate

PARITY_SCHEMA = "fat5-parity/2"


def verify(
    out: str | Path, against: str | None = None, revision: str | None = None, config: str | None = None
) -> dict[str, Any]:
    """Check a converted folder any time later.

    Args:
        out: the folder.
        against: folder, single file or Hub id of the source; without it, tensors are held against the hashes that
            the conversion recorded, and no model is run.
        revision: for a Hub id.
        config: for a single file.

    Returns:
        The contents of a `parity.json`; `result` is "same" or "different".

    Raises:
        ConvertError: OUT or the source cannot be read, or OUT records no hashes and no source is given.
    """
    folder = Path(out)
    if not folder.is_dir():
        raise ConvertError(f"{out}: no such folder")
    converted = Checkpoint(local(folder))
    if converted.config.get("model_type") != "flash_t5":
        found = converted.config.get("model_type")
        raise ConvertError(f"{folder / 'config.json'}: no FAT5 model (model_type {found!r})")
    differences = _check_code(folder) + _check_settings(converted)
    if against is None:
        return _certificate(differences, _check_recorded(converted, differences))
    source = Checkpoint(locate(against, revision), config)
    recognised = recognise(source)
    record = folder / "conversion.json"
    rescaling = Rescaling.from_dict(read_json(record).get("rescaling") if record.is_file() else None)
    _check_config(converted, rescaling.adapt(recognised.config), differences)
    forms, tensors = _check_against(converted, source, recognised, rescaling, differences)
    models = None
    if not differences:
        models, found = compare_models(folder, source, recognised, forms)
        differences += found
    return _certificate(differences, tensors, source, models)


def verify_written(
    folder: Path, source: Checkpoint, recognised: Recognised, conversion: Mapping[str, Any]
) -> dict[str, Any]:
    """As `verify` against the source, of a folder just written, whose hashes were computed as the values passed.

    Args:
        folder: OUT to be.
        source: the source.
        recognised: which tensor is which.
        conversion: what conversion.json says.
    """
    converted = Checkpoint(local(folder))
    differences = _check_code(folder) + _check_settings(converted)
    facts = conversion["tensors"]
    rescaling = Rescaling.from_dict(conversion["rescaling"])
    _check_config(converted, rescaling.adapt(recognised.config), differences)
    differences += [f"tensor {name} is missing" for name in facts if name not in converted.tensors]
    forms = {name: Form(info.dtype, facts[name].get("exponent", 0)) for name, info in converted.tensors.items()}
    identical = sum(entry["sha256"] == entry["source_sha256"] for entry in facts.values())
    tensors = {
        "compared": len(facts),
        "identical": identical,
        "rounded": len(facts) - identical,
        "sha256": {name: entry["sha256"] for name, entry in facts.items()},
    }
    models, found = compare_models(folder, source, recognised, forms)
    return _certificate(differences + found, tensors, source, models)


def _certificate(
    differences: list[str],
    tensors: dict[str, Any],
    source: Checkpoint | None = None,
    models: dict[str, Any] | None = None,
) -> dict[str, Any]:
    return {
        "schema": PARITY_SCHEMA,
        "result": "different" if differences else "same",
        "differences": differences,
        "source": {"name": source.location.name, "revision": source.location.revision} if source else None,
        "tensors": tensors,
        "models": models,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _check_against(
    out: Checkpoint, source: Checkpoint, recognised: Recognised, rescaling: Rescaling, differences: list[str]
) -> tuple[dict[str, Form], dict[str, Any]]:
    """Trace each tensor of OUT to its source, through the key table and a rounding done afresh."""
    hashes: dict[str, str] = {}
    forms: dict[str, Form] = {}
    counts = {"identical": 0, "rounded": 0}
    names = {pair.fat5 for pair in recognised.pairs}
    differences += [f"tensor {name} has no source" for name in out.tensors if name not in names]
    for pair in recognised.pairs:
        if pair.fat5 not in out.tensors:
            differences.append(f"tensor {pair.fat5} is missing")
            continue
        form = Form(out.tensors[pair.fat5].dtype, rescaling.exponent(pair.t5, recognised.layout))
        forms[pair.fat5], hashes[pair.fat5] = form, hash_chunks(out, pair.fat5)
        same_shape = out.tensors[pair.fat5].shape == pair.shape
        if not same_shape or hashes[pair.fat5] != hash_values(
            form.apply(chunk) for chunk in source.chunks(pair.source)
        ):
            differences.append(f"tensor {pair.fat5} differs from {pair.source} of the source")
        else:
            counts["identical" if form == Form(source.tensors[pair.source].dtype) else "rounded"] += 1
    return forms, {"compared": len(hashes), **counts, "sha256": hashes}


def _check_recorded(out: Checkpoint, differences: list[str]) -> dict[str, Any]:
    path = out.folder / "conversion.json"
    if not path.is_file():
        raise ConvertError(
            f"{path}: missing, so there are no hashes to check by. Give --against SOURCE; of a folder that was trained "
            "since it was converted, nothing can be checked"
        )
    recorded = read_json(path).get("tensors")
    if not isinstance(recorded, dict) or not all(isinstance(entry, dict) for entry in recorded.values()):
        raise ConvertError(f"{path}: malformed (no table of tensors). Give --against SOURCE.")
    hashes = {name: hash_chunks(out, name) for name in out.tensors}
    differences += [f"tensor {name} is missing" for name in recorded if name not in hashes]
    differences += [f"tensor {name} was not converted from anything" for name in hashes if name not in recorded]
    identical = 0
    for name, digest in hashes.items():
        if name not in recorded:
            continue
        if digest == recorded[name].get("sha256"):
            identical += 1
        else:
            differences.append(f"tensor {name} is not what the conversion wrote")
    return {"compared": len(hashes), "identical": identical, "rounded": 0, "sha256": hashes}


def _check_config(out: Checkpoint, expected: Mapping[str, Any], differences: list[str]) -> None:
    for key, value in expected.items():
        if out.config.get(key) != value:
            differences.append(f"config.json has {key} {out.config.get(key)!r}, the source means {value!r}")


def _check_settings(out: Checkpoint) -> list[str]:
    """Configuration, generation settings and tokenizer must be what the conversion wrote, where it left a record."""
    path = out.folder / "conversion.json"
    recorded = read_json(path).get("files") if path.is_file() else None
    if not isinstance(recorded, dict):
        return []
    modules = read_json(path).get("modules")
    recorded = recorded | (modules if isinstance(modules, dict) else {})
    present = {name for name in (*SETTINGS_FILES, *recorded) if (out.folder / name).is_file()}
    return [
        *(f"{name} is missing" for name in sorted(recorded.keys() - present)),
        *(f"{name} was not written by the conversion" for name in sorted(present - recorded.keys())),
        *(
            f"{name} is not what the conversion wrote"
            for name in sorted(present & recorded.keys())
            if hash_file(out.folder / name) != recorded[name]
        ),
    ]


def _check_code(folder: Path) -> list[str]:
    """The code in OUT must be the code that is verified here."""
    package = Path(str(fat5_model.__file__)).parent
    return [
        f"{name} is not the file of this version of FAT5"
        for name in RUNTIME_FILES
        if not (folder / name).is_file() or (folder / name).read_bytes() != (package / name).read_bytes()
    ]
