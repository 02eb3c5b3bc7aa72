"""A record of the shards that are finished, kept beside them, so that a killed conversion need not begin again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fat5convert.errors import ConvertError
from fat5convert.formats import SafetensorsFile
from fat5convert.hashing import hash_chunks
from fat5convert.json_files import read_json, write_json
from fat5convert.staging import clear

_NAME = "unfinished.json"


class Journal:
    """What is known of the shards in a folder.

    Args:
        folder: the staging folder; cleared unless a run with the same fingerprint left it.
        plan: everything that decides the bytes of the shards, as JSON.
    """

    def __init__(self, folder: Path, plan: Any) -> None:
        self._path = folder / _NAME
        self._fingerprint = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
        self._shards: dict[str, dict[str, dict[str, Any]]] = {}
        try:
            found = read_json(self._path)
        except ConvertError:
            found = {}
        if found.get("fingerprint") == self._fingerprint:
            self._shards = found["shards"]
        else:
            clear(folder)

    def finished(self, path: Path, names: Sequence[str]) -> dict[str, dict[str, Any]] | None:
        """The facts about every tensor of a shard, if it is there and each tensor still has its recorded hash."""
        facts = self._shards.get(path.name)
        if facts is None or sorted(facts) != sorted(names) or not path.is_file():
            return None
        try:
            file = SafetensorsFile(path)
            whole = sorted(file.tensors) == sorted(names)
            intact = whole and all(hash_chunks(file, name) == facts[name]["sha256"] for name in names)
        except ConvertError:
            return None
        return facts if intact else None

    def record(self, path: Path, facts: dict[str, dict[str, Any]]) -> None:
        """Note a shard that is safely on the disk."""
        self._shards[path.name] = facts
        draft = self._path.with_suffix(".draft")
        write_json(draft, {"fingerprint": self._fingerprint, "shards": self._shards})
        os.replace(draft, self._path)

    def close(self) -> None:
        """Remove the record: the folder is complete."""
        self._path.unlink(missing_ok=True)
