"""Prove that OUT is its source: tensor by tensor through hashes, and by what the two models compute.

`parity.json` (schema `fat5-parity/1`):

- `schema`, `result` ("same" or "different"), `differences` (in words; empty when same), `versions`;
- `source`: `name` and `revision` of what was compared with, or null when only the recorded hashes were checked;
- `tensors`: `compared`, how many were `identical` to the source and how many `rounded` (equal to the source
  rounded afresh), and `sha256`, the hash of each in OUT;
- `models`: null when only hashes were checked, else `probes` (lengths of the rows), `implementations` (for `eager`
  and `sdpa`: `bound`, `largest_logit`, `logits_error` and `encoder_error` relative to the largest value, `loss`,
  `oracle_loss`, `loss_error` relative to twice the largest logit, `greedy_identical`), and `rounding` (null unless
  the dtype lost something: what rounding the weights of the oracle does to the same figures).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from fat5 import model as fat5_model
from fat5.model import RUNTIME_FILES
from fat5convert.errors import ConvertError
from fat5convert.families import Recognised, recognise
from fat5convert.parity import compare_models
from fat5convert.source import SETTINGS_FILES, Checkpoint, local, locate, read_json
from fat5convert.writer import hash_file, hash_tensor

PARITY_SCHEMA = "fat5-parity/1"


def verify(out: str | Path, against: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """Check a converted folder any time later.

    Args:
        out: the folder.
        against: folder or Hub id of the source; without it, tensors are held against the hashes that the
            conversion recorded, and no model is run.
        revision: for a Hub id.

    Returns:
        The contents of a `parity.json`; `result` is "same" or "different".

    Raises:
        ConvertError: OUT or the source cannot be read, or OUT records no hashes and no source is given.
    """
    folder = Path(out)
    if not folder.is_dir():
        raise ConvertError(f"{out}: no such folder")
    return verify_checkpoint(folder, Checkpoint(locate(against, revision)) if against else None)


def verify_checkpoint(folder: Path, source: Checkpoint | None) -> dict[str, Any]:
    """As `verify`, against an open source checkpoint (None: against the recorded hashes)."""
    out = Checkpoint(local(folder))
    if out.config.get("model_type") != "flash_t5":
        raise ConvertError(f"{folder / 'config.json'}: no FAT5 model (model_type {out.config.get('model_type')!r})")
    differences = _check_code(folder) + _check_settings(out)
    models = None
    if source is None:
        tensors = _check_recorded(out, differences)
    else:
        recognised = recognise(source)
        _check_config(out, recognised, differences)
        tensors = _check_against(out, source, recognised, differences)
        if not differences:
            models, found = compare_models(folder, source, recognised)
            differences += found
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
    out: Checkpoint, source: Checkpoint, recognised: Recognised, differences: list[str]
) -> dict[str, Any]:
    """Trace each tensor of OUT to its source, through the key table and a rounding done afresh."""
    hashes: dict[str, str] = {}
    counts = {"identical": 0, "rounded": 0}
    names = {pair.fat5 for pair in recognised.pairs}
    differences += [f"tensor {name} has no source" for name in out.tensors if name not in names]
    for pair in recognised.pairs:
        if pair.fat5 not in out.tensors:
            differences.append(f"tensor {pair.fat5} is missing")
            continue
        original, dtype = source.load(pair.t5), out.tensors[pair.fat5].dtype
        hashes[pair.fat5] = hash_tensor(out.load(pair.fat5))
        if out.tensors[pair.fat5].shape != pair.shape or hashes[pair.fat5] != hash_tensor(original.to(dtype)):
            differences.append(f"tensor {pair.fat5} differs from {pair.t5} of the source")
        else:
            counts["identical" if dtype == original.dtype else "rounded"] += 1
    return {"compared": len(hashes), **counts, "sha256": hashes}


def _check_recorded(out: Checkpoint, differences: list[str]) -> dict[str, Any]:
    path = out.folder / "conversion.json"
    if not path.is_file():
        raise ConvertError(f"{path}: missing, so there are no hashes to check by. Give --against SOURCE.")
    recorded = read_json(path).get("tensors")
    if not isinstance(recorded, dict) or not all(isinstance(entry, dict) for entry in recorded.values()):
        raise ConvertError(f"{path}: malformed (no table of tensors). Give --against SOURCE.")
    hashes = {name: hash_tensor(out.load(name)) for name in out.tensors}
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


def _check_config(out: Checkpoint, recognised: Recognised, differences: list[str]) -> None:
    for key, value in recognised.config.items():
        if out.config.get(key) != value:
            differences.append(f"config.json has {key} {out.config.get(key)!r}, the source means {value!r}")


def _check_settings(out: Checkpoint) -> list[str]:
    """Configuration, generation settings and tokenizer must be what the conversion wrote, where it left a record."""
    path = out.folder / "conversion.json"
    recorded = read_json(path).get("files") if path.is_file() else None
    if not isinstance(recorded, dict):
        return []
    present = {name for name in SETTINGS_FILES if (out.folder / name).is_file()}
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
