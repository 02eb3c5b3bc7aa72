"""JSON objects in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fat5convert.errors import ConvertError


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConvertError: the file is missing, unreadable or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConvertError(f"{path}: missing. A checkpoint is a folder with config.json and weights.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConvertError(f"{path}: unreadable ({error})") from error
    if not isinstance(value, dict):
        raise ConvertError(f"{path}: expected a JSON object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object, indented, with a final newline."""
    try:
        data = json.dumps(value, indent=2, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a character, as `\ud800` in somebody's config: only an escape can carry it
        data = json.dumps(value, indent=2).encode()
    path.write_bytes(data + b"\n")
