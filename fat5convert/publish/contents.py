"""What of a folder goes to the Hub: only files that a FAT5 repo has. Everything else stays, and is named."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fat5convert.errors import ConvertError
from fat5convert.source import MODULES_FILE, PICKLE_SUFFIXES, SENTENCE_FILES, SETTINGS_FILES

CARD = "README.md"
CERTIFICATE, CONVERSION, TRAINING, CURVE = "parity.json", "conversion.json", "training.json", "loss.png"
INDEX = "model.safetensors.index.json"
_LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")
# Beside the T5 in a sentence-transformers folder; see fat5convert.sentence_modules.
_MODULES = ("[0-9]_*/config.json", "[0-9]_*/model.safetensors")

_REASONS = {
    "may hold secrets": (".env*", "*.pem", "*.key", ".netrc", ".git-credentials", "id_rsa*", "id_ed25519*", "*token"),
    "state of a training run, which is a pickle": (
        "optimizer*",
        "scheduler*",
        "scaler.pt",
        "rng_state*",
        "training_args.bin",
    ),
    "a pickle, which runs code when it is loaded": (
        *(f"*{suffix}" for suffix in PICKLE_SUFFIXES),
        "*.bin.index.json",
        "*.pkl",
        "*.pickle",
        "*.joblib",
    ),
    "state of a training run": ("checkpoint-*", "trainer_state.json", "global_step*"),
    "a cache": (".cache", "__pycache__", ".ipynb_checkpoints", "*.pyc"),
    "version control": (".git",),
    "its summary is in the card; its recipe names paths of this machine": (TRAINING,),
    "a shard that the index does not list": ("model-*.safetensors", "model.safetensors", INDEX),
    "no part of the model's code": ("*.py",),
}


@dataclass(frozen=True)
class Contents:
    """Paths within a folder, with slashes."""

    upload: list[str]
    left: dict[str, str]  # and why; a folder is named once, ending in a slash

    @classmethod
    def of(cls, folder: Path, weights: Iterable[str], code: Iterable[str]) -> Contents:
        """Divide the files of a folder.

        Args:
            folder: the FAT5 repo.
            weights: its weight files, and their index.
            code: its code files.

        Raises:
            ConvertError: a file that belongs to the repo is a link to one that does not.
        """
        named = {*weights, *code, *SETTINGS_FILES, *_LICENCES, CERTIFICATE, CONVERSION, CURVE}
        modules: tuple[str, ...] = ()
        if (folder / MODULES_FILE).is_file():
            named |= {MODULES_FILE, *SENTENCE_FILES}
            modules = _MODULES

        def belongs(name: str) -> bool:
            return name in named or any(fnmatch.fnmatchcase(name, pattern) for pattern in modules)

        upload, left = [], {}
        for name in _files(folder, modules):
            wanted, target = belongs(name), (folder / name).resolve()
            outside = not target.is_relative_to(folder.resolve())
            if wanted and outside:
                raise ConvertError(f"{folder / name}: a link that leads out of the folder; put the file itself there")
            if wanted and not belongs(inner := target.relative_to(folder.resolve()).as_posix()):
                raise ConvertError(
                    f"{folder / name}: a link to {inner}, which is not published; put the file itself there"
                )
            if wanted and (folder / name).is_file():
                upload.append(name)
            elif name != CARD:
                left[name] = "a link that leads out of the folder" if outside else _reason(name)
        return cls(upload, left)


def _files(folder: Path, modules: tuple[str, ...]) -> Iterator[str]:
    """Name the files of a folder; of its folders only modules are looked into."""
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            yield path.name
        elif any(fnmatch.fnmatchcase(path.name, pattern.split("/")[0]) for pattern in modules):
            yield from (f"{path.name}/{inner.name}{'/' * inner.is_dir()}" for inner in sorted(path.iterdir()))
        else:
            yield f"{path.name}/"


def _reason(name: str) -> str:
    last = name.rstrip("/").rsplit("/", 1)[-1]
    for reason, patterns in _REASONS.items():
        if any(fnmatch.fnmatchcase(last, pattern) for pattern in patterns):
            return reason
    return "not among the files of a FAT5 repo"
