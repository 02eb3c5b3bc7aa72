"""Files and folders that appear whole or not at all."""

import os
import shutil
from pathlib import Path


def write_file(path: Path, content: bytes) -> None:
    """Write a file; what had that name is replaced once the new content has reached the disk.

    Raises:
        OSError: the disk is full or does not take it; `path` is as it was.
    """
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def put_in_place(staged: Path, final: Path, aside: Path) -> None:
    """Give a folder its name, after all that is in it has reached the disk; what had that name is replaced.

    Args:
        staged: the folder, on the same file system as `final`.
        final: its name from now on.
        aside: name beside it that an older folder of that name has until the new one is safe; must be free.

    Raises:
        OSError: the disk is full or does not take it; `final` is as it was.
    """
    for path in (*staged.rglob("*"), staged):
        _flush(path)
    if final.exists():
        final.rename(aside)
        try:
            staged.rename(final)
        except BaseException:
            aside.rename(final)
            raise
    else:
        staged.rename(final)
    _flush(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
