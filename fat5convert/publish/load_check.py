"""Whether a repo loads where only torch and transformers are installed: tried in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fat5convert.errors import ConvertError

_SCRIPT = Path(__file__).with_name("load_once.py")
_LARGE = 4_000_000_000
"""Bytes of weights from which they are not read into memory, and only their names and shapes are compared."""


def check_loading(folder: Path, files: Sequence[str], *, tokenizer: bool) -> None:
    """Load exactly these files of a folder in a process that has neither FAT5, nor the network, nor any token.

    Args:
        folder: the repo.
        files: what of it is to be published.
        tokenizer: whether there is a tokenizer to load.

    Raises:
        ConvertError: it does not load, or a weight is missing or left over.
    """
    how = "outline" if sum((folder / name).stat().st_size for name in files) > _LARGE else "whole"
    with tempfile.TemporaryDirectory(prefix="fat5-") as root:
        copy = Path(root, "repo")
        for name in files:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).symlink_to((folder / name).resolve())
        environment = {key: value for key, value in os.environ.items() if not _is_of_the_hub(key)}
        environment |= {"HF_HOME": str(Path(root, "home")), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        # -P: the script's own folder, which is fat5convert's, is not where modules are looked for.
        command = [sys.executable, "-P", str(_SCRIPT), str(copy), how, *(["tokenizer"] if tokenizer else [])]
        done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    try:
        error = json.loads(done.stdout.splitlines()[-1])["error"]
    except (ValueError, IndexError, KeyError, TypeError):
        error = f"the process ended with {done.returncode}: {done.stderr.strip()[-1000:]}"
    if error is not None:
        raise ConvertError(f"{folder}: does not load where only torch and transformers are installed ({error})")


def _is_of_the_hub(name: str) -> bool:
    """Whether an environment variable is about the Hub's client, its token and caches included."""
    return name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
