"""Whether a folder is a complete FAT5 repo, before anything of it is sent."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_imports, get_relative_imports

from fat5convert.errors import ConvertError
from fat5convert.hashing import hash_chunks
from fat5convert.json_files import read_json
from fat5convert.publish.contents import CERTIFICATE, CONVERSION, CURVE, INDEX, TRAINING, Contents
from fat5convert.publish.load_check import check_loading
from fat5convert.publish.tasks import OTHER, TASKS, Task
from fat5convert.source import TOKENIZER_FILES, Checkpoint, local

_INSTALLED = {"torch", "transformers", *sys.stdlib_module_names}
"""Modules that the code may import unconditionally."""


@dataclass(frozen=True)
class Ready:
    """A folder that may be published, and what its card is written from."""

    folder: Path
    contents: Contents
    checkpoint: Checkpoint
    certificate: dict[str, Any] | None  # parity.json; None where the weights have been trained since
    conversion: dict[str, Any] | None
    training: dict[str, Any] | None

    @property
    def config(self) -> dict[str, Any]:
        """The contents of config.json."""
        return self.checkpoint.config

    @property
    def encoder_only(self) -> bool:
        """Whether there is no decoder."""
        return not any(name.startswith("decoder.") for name in self.checkpoint.tensors)

    @property
    def auto_class(self) -> str:
        """The auto-class that loads the whole of it: of those that give its architecture, the one for a task."""
        wanted = self.config["architectures"][0]
        names = [name for name, value in self.config["auto_map"].items() if value.rpartition(".")[2] == wanted]
        return str(max(names, key=len))

    @property
    def task(self) -> Task:
        """What it is for."""
        return TASKS.get(self.auto_class, OTHER)

    @property
    def tokenizer(self) -> bool:
        """Whether there is a tokenizer."""
        return _has_tokenizer(self.contents.upload)

    @property
    def curve(self) -> bool:
        """Whether there is a picture of the training loss."""
        return CURVE in self.contents.upload

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(info.numel for info in self.checkpoint.tensors.values())


def check(out: str | Path) -> Ready:
    """Check that a folder is a complete FAT5 repo, and that it loads where FAT5 is not installed.

    Reads all weights once, for their hashes.

    Raises:
        ConvertError: it is not; the message names everything that is wrong.
    """
    folder = Path(out)
    if not folder.is_dir():
        raise ConvertError(f"{out}: no such folder")
    checkpoint = Checkpoint(local(folder))
    found = checkpoint.config.get("model_type")
    if found != "flash_t5":
        raise ConvertError(f"{folder / 'config.json'}: no FAT5 model (model_type {found!r}); convert it first")
    problems: list[str] = []
    code = _check_code(folder, checkpoint.config, problems)
    contents = Contents.of(folder, [*checkpoint.weight_files, *_index(folder, checkpoint)], code)
    conversion, training = _optional(folder / CONVERSION), _optional(folder / TRAINING)
    for name in checkpoint.weight_files:
        if not name.endswith(".safetensors"):
            problems.append(f"{name} is a pickle, which runs code when it is loaded; convert or save to safetensors")
    for name in checkpoint.misplaced:
        problems.append(f"{INDEX} does not say in which shard tensor {name} is; convert or save again")
    if not _has_tokenizer(contents.upload) and not _source_had_none(conversion):
        problems.append("there is no tokenizer; put the files of the source's tokenizer there")
    problems += [f"{name} is missing, which the conversion wrote; convert again" for name in _lost(folder, conversion)]
    certificate = _check_certificate(folder, checkpoint, training, problems)
    if problems:
        raise ConvertError(f"{out} is not ready to be published:\n" + "\n".join(f"  - {line}" for line in problems))
    ready = Ready(folder, contents, checkpoint, certificate, conversion, training)
    check_loading(folder, contents.upload, tokenizer=ready.tokenizer)
    return ready


def _index(folder: Path, checkpoint: Checkpoint) -> list[str]:
    """The index, where it is what the weights are found by: beside model.safetensors it is a left-over."""
    sharded = checkpoint.weight_files != ["model.safetensors"]
    return [INDEX] if sharded and (folder / INDEX).is_file() else []


def _optional(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def _has_tokenizer(names: list[str]) -> bool:
    return any(name in TOKENIZER_FILES and name != "chat_template.jinja" for name in names)


def _lost(folder: Path, conversion: Mapping[str, Any] | None) -> list[str]:
    """Settings, tokenizer files and modules that the conversion wrote and that are not there."""
    recorded = [(conversion or {}).get(kind) for kind in ("files", "modules")]
    names = [name for files in recorded if isinstance(files, dict) for name in files]
    return [name for name in names if not (folder / name).is_file()]


def _source_had_none(conversion: Mapping[str, Any] | None) -> bool:
    """Whether the conversion found no tokenizer to carry over, as of Chronos-T5 or a single file."""
    files = conversion.get("files") if conversion else None
    return isinstance(files, dict) and not _has_tokenizer(list(files))


def _check_code(folder: Path, config: Mapping[str, Any], problems: list[str]) -> list[str]:
    """Follow `auto_map` and the imports from there; give the code files that are there and note those that are not."""
    auto_map, architectures = config.get("auto_map"), config.get("architectures")
    if not isinstance(auto_map, dict) or "AutoConfig" not in auto_map:
        problems.append("config.json has no auto_map with AutoConfig: save the model with its own save_pretrained")
        return []
    classes = [str(value).rsplit(".", 1)[-1] for value in auto_map.values()]
    for architecture in architectures if isinstance(architectures, list) and architectures else [None]:
        if architecture not in classes:
            problems.append(f"config.json: no entry of auto_map is the architecture {architecture}")
    found: list[str] = []
    todo = []
    for key, value in auto_map.items():
        module = str(value).rsplit(".", 1)[0]
        if not module.isidentifier():
            problems.append(f"config.json: auto_map takes {key} from {value}, which is not a file of this folder")
        else:
            todo.append(module)
    while todo:
        name = f"{todo.pop()}.py"
        if name in found:
            continue
        if not (folder / name).is_file():
            problems.append(
                f"{name} is missing, which the model's code imports; save the model again, or convert again"
            )
        else:
            todo += get_relative_imports(folder / name)
            for other in sorted(set(get_imports(folder / name)) - _INSTALLED):
                problems.append(f"{name} imports {other}, which is not where only torch and transformers are installed")
        found.append(name)
    for key, value in auto_map.items():
        module, _, cls = str(value).rpartition(".")
        path = folder / f"{module}.py"
        if module.isidentifier() and path.is_file() and cls not in path.read_text(encoding="utf-8"):
            problems.append(f"config.json: auto_map takes {key} from {value}, and {path.name} has no {cls}")
    return found


def _check_certificate(
    folder: Path, checkpoint: Checkpoint, training: Mapping[str, Any] | None, problems: list[str]
) -> dict[str, Any] | None:
    """Hold the weights against the hashes in parity.json."""
    verify = f"run `fat5convert verify {folder} --against SOURCE`"
    certificate = _optional(folder / CERTIFICATE)
    if certificate is None:
        if training is None:
            problems.append(
                f"{CERTIFICATE} is missing: {verify}. A model that was trained elsewhere than by `fat5 pretrain` goes "
                "up with its own push_to_hub, which takes the code along"
            )
        return None
    if certificate.get("result") != "same":
        problems.append(f"{CERTIFICATE} says that the model differs from its source: {verify}, or convert again")
    tensors = certificate.get("tensors")
    recorded = tensors.get("sha256") if isinstance(tensors, dict) else None
    if not isinstance(recorded, dict):
        problems.append(f"{CERTIFICATE} is malformed (no hashes of tensors): {verify}")
        return certificate
    wrong = sorted(recorded.keys() ^ checkpoint.tensors.keys())
    wrong += [
        name for name in checkpoint.tensors if name in recorded and hash_chunks(checkpoint, name) != recorded[name]
    ]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        problems.append(f"{CERTIFICATE} is not of these weights (tensor {wrong[0]}{more}): {verify}")
    return certificate
