"""Checkpoints that are whole or not there, and which of them a run continues from."""

import json
import shutil
import sys
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fat5 import folders
from fat5.train.errors import TrainingError

MARKER = "complete.json"
"""Written last, with the size of every other file: a checkpoint without it, or unlike it, is not taken."""

WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What a full disk comes as: torch and safetensors have their own."""

STAGING = ".incomplete"
"""Where, beside the checkpoints, one is written before it gets its name."""


def defect(path: Path) -> str | None:
    """Say what is wrong with a checkpoint; None if it is whole."""
    try:
        files = json.loads((path / MARKER).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"{MARKER} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{MARKER} is damaged"
    for name, size in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (found := (path / name).stat().st_size) != size:
            return f"{name} has {found} bytes where {size} were written"
        if not _opens(path / name):
            return f"{name} is damaged"
    return None


def _opens(path: Path) -> bool:
    """Look at a file's form, without reading tensors: a disk that fails can leave other bytes behind."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif path.suffix in (".pt", ".pth"):  # of torch.save
            return zipfile.is_zipfile(path)
    except (ValueError, SafetensorError):
        return False
    return True


def seal(staged: Path, final: Path) -> None:
    """Turn a folder into a checkpoint: the marker, everything on the disk, then the name.

    Args:
        staged: the folder, on the same file system as `final`.
        final: its name from now on; an older checkpoint of that name is replaced.

    Raises:
        OSError: the disk is full or does not take it; `final` is as it was.
    """
    sizes = {str(p.relative_to(staged)): p.stat().st_size for p in sorted(staged.rglob("*")) if p.is_file()}
    (staged / MARKER).write_text(json.dumps({"files": sizes}, indent=2) + "\n", encoding="utf-8")
    put_in_place(staged, final)


def put_in_place(staged: Path, final: Path) -> None:
    """As `folders.put_in_place`, whatever a killed run has set aside there.

    Raises:
        OSError: the disk is full or does not take it; `final` is as it was.
    """
    aside = final.with_name(f"{STAGING}-replaced")
    shutil.rmtree(aside, ignore_errors=True)
    folders.put_in_place(staged, final, aside)


def by_step(folder: Path) -> dict[int, Path]:
    """List the folders that are named as checkpoints, whole or not, by their step."""
    names = ((path, path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")) for path in folder.glob("*"))
    return {int(step): path for path, step in names if step.isdigit() and path.is_dir()}


def rotate(folder: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints."""
    found = by_step(folder)
    for step in sorted(found)[:-keep]:
        (found[step] / MARKER).unlink(missing_ok=True)  # first, so that half of it is never taken for a whole
        shutil.rmtree(found[step], ignore_errors=True)


def newest(folder: Path) -> Path | None:
    """Return the whole checkpoint of the most steps in a folder, or None; a damaged one is told of and passed over."""
    found = by_step(folder)
    for step in sorted(found, reverse=True):
        if (wrong := defect(found[step])) is None:
            return found[step]
        print(f"{found[step]} is not whole ({wrong}) and is passed over", file=sys.stderr)
    return None


def choose(resume: str, folder: Path) -> Path | None:
    """Decide where a run starts.

    Args:
        resume: `auto` (the newest whole checkpoint in `folder`, if any), `never`, or a checkpoint's path.
        folder: where the run keeps its checkpoints.

    Returns:
        The checkpoint to continue from, or None for a fresh start.

    Raises:
        TrainingError: a path without a whole checkpoint, `never` where an earlier run has left some, or `auto` where
            all that it has left are damaged.
    """
    if resume == "auto":
        if (found := newest(folder)) is None and by_step(folder):
            raise TrainingError(
                f"no checkpoint in {folder} is whole; bring one back, or delete them to start from the beginning"
            )
        return found
    if resume == "never":
        if (old := newest(folder)) is not None:
            raise TrainingError(
                f"{old} is of an earlier run, and --resume never would mix the two; "
                "give another output.folder, or delete the old one"
            )
        return None
    if (wrong := defect(Path(resume))) is not None:
        raise TrainingError(f"--resume {resume}: not a complete checkpoint ({wrong})")
    return Path(resume)
