"""Output is complete or absent: a folder is filled under another name beside OUT, and becomes OUT at the end.

The other name is always the same, so that what a killed run left is found: its finished shards are used again, or it
is cleared away. A lock on the folder, which the kernel drops with the process, keeps two runs apart.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fat5.folders import put_in_place
from fat5convert.errors import ConvertError
from fat5convert.json_files import read_json


@contextlib.contextmanager
def staged(out: Path, overwrite: bool, replaceable: Callable[[Path], bool], *, resume: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside OUT that becomes OUT at the end, or vanishes if anything goes wrong.

    Args:
        out: the folder to be.
        overwrite: whether an existing OUT may be replaced; it is removed only after the new one is in place.
        replaceable: says whether an existing folder is one of ours; others are never removed.
        resume: leave in the folder what a killed run wrote there; the caller checks it.

    Raises:
        ConvertError: OUT exists and may not be replaced, another run is writing it, or its parent cannot be written.
    """
    check_target(out, overwrite, replaceable)
    staging, replaced = _sibling(out, "partial"), _sibling(out, "replaced")
    created = _missing_parents(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = _claim(staging, out)
    except OSError as error:
        _remove_empty(created)
        raise ConvertError(f"{out}: cannot be written ({_reason(error)})") from error
    published = False
    try:
        _recover(out, replaced)
        check_target(out, overwrite, replaceable)
        if not resume:
            clear(staging)
        yield staging
        if out.exists() and not overwrite:
            raise ConvertError(f"{out}: appeared while this was running; nothing was replaced")
        put_in_place(staging, out, replaced)
        published = True
    except OSError as error:
        # A copy that finds no room is told by the name of what it copies.
        where = out if error.errno == errno.ENOSPC else error.filename or out
        raise ConvertError(f"{where}: {_reason(error)}") from error
    finally:
        if not published:
            shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)
        _remove_empty(created)


def check_target(out: Path, overwrite: bool, replaceable: Callable[[Path], bool]) -> None:
    """Refuse an OUT that exists, unless it may be and is asked to be replaced."""
    try:
        there = out.exists() or out.is_symlink()
    except OSError as error:  # too long a name, or in a folder that may not be looked into
        raise ConvertError(f"{out}: cannot be used as a folder ({_reason(error)})") from error
    if not there:
        nearest = next(parent for parent in out.absolute().parents if parent.exists())
        if not nearest.is_dir():
            raise ConvertError(f"{out}: cannot be written, {nearest} is a file. Give another folder.")
        return
    if not out.is_dir() or out.is_symlink() or not replaceable(out):
        raise ConvertError(f"{out}: exists and does not look like an earlier output. Give another folder.")
    if not overwrite:
        raise ConvertError(f"{out}: exists already. Give --overwrite to replace it, or another folder.")


def holds_model(*model_types: str) -> Callable[[Path], bool]:
    """A test for `replaceable`: the folder's config.json is of one of these model types, or the folder is empty."""

    def test(folder: Path) -> bool:
        try:
            if not any(folder.iterdir()):
                return True
            return read_json(folder / "config.json").get("model_type") in model_types
        except (ConvertError, OSError):  # one that may not be looked into is not to be replaced either
            return False

    return test


def check_apart(out: Path, source: Path) -> None:
    """Refuse an OUT that is the source, lies in it or holds it: replacing the one would take the other along."""
    source, target = source.resolve(), out.absolute().parent.resolve() / out.name
    if source == target or target in source.parents or source in target.parents:
        raise ConvertError(f"{out}: is, holds or lies in the source; choose another folder")


def check_space(out: Path, needed: int) -> None:
    """Refuse to start when the disk cannot hold the result, beside what a killed run left of it."""
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    left = sum(path.stat().st_size for path in _sibling(out, "partial").glob("*") if path.is_file())
    usage = shutil.disk_usage(folder)
    free = usage.free + left
    if usage.total and free < needed:  # without a size it is no disk, as /proc is none, and cannot be written at all
        raise ConvertError(f"{out}: needs {needed / 1e9:.3f} GB, the disk has {free / 1e9:.3f} GB free")


def clear(folder: Path) -> None:
    """Remove everything in a folder."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _claim(staging: Path, out: Path) -> int:
    """Make the folder, or find it, and lock it; another run may remove or rename it in between."""
    while True:
        staging.mkdir(exist_ok=True)
        try:
            lock = os.open(staging, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise ConvertError(f"{out}: another conversion into it is running; wait, or choose another") from error
        except OSError:
            os.close(lock)
            raise
        if staging.exists() and os.path.samestat(os.fstat(lock), staging.stat()):
            return lock
        os.close(lock)


def _recover(out: Path, replaced: Path) -> None:
    """Undo, or end, the replacement of OUT that a killed run was in the middle of."""
    if not replaced.exists():
        return
    if out.exists():
        shutil.rmtree(replaced)
    else:
        replaced.rename(out)


def _sibling(out: Path, kind: str) -> Path:
    return out.absolute().parent / f".{out.absolute().name}.fat5-{kind}"


def _missing_parents(out: Path) -> list[Path]:
    return [parent for parent in out.absolute().parents if not parent.exists()]


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _reason(error: OSError) -> str:
    return "no space left on the disk" if error.errno == errno.ENOSPC else (error.strerror or str(error))
