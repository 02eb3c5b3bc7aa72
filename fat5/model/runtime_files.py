"""The code files that every saved model carries, so that it loads where FAT5 is not installed."""

import os
import shutil
from pathlib import Path

RUNTIME_FILES = (
    "configuration_flash_t5.py",
    "modeling_flash_t5.py",
    "stack_flash_t5.py",
    "layers_flash_t5.py",
    "attention.py",
    "position_encoding.py",
    "runtime_files.py",
)
"""Names of the files, all in one flat folder."""


def copy_runtime_files(folder: str | os.PathLike[str]) -> None:
    """Copy the code files into `folder`, which is made if it does not exist.

    They come from the folder of this very file: the installed package, or the place where `transformers` keeps the
    code of a loaded repository.

    Args:
        folder: where a model is being saved.
    """
    source, target = Path(__file__).resolve().parent, Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for name in RUNTIME_FILES:
        if not (target / name).exists() or not (target / name).samefile(source / name):
            shutil.copyfile(source / name, target / name)
