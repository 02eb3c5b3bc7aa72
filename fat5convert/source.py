"""Where a checkpoint comes from: a local folder or a Hub id, opened as a raw config and lazy tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from fat5convert.errors import ConvertError
from fat5convert.formats import TensorFile, TensorInfo, open_weights
from fat5convert.json_files import read_json
from fat5convert.known_configs import KNOWN_CONFIGS, find_config

# In order of preference; an index lists the shards of a sharded checkpoint.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZER_FILES = (
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
)
PICKLE_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt")
SETTINGS_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)
# Of a sentence-transformers folder, beside the encoder.
MODULES_FILE = "modules.json"
SENTENCE_FILES = ("config_sentence_transformers.json", "sentence_bert_config.json")
_MODULE_PATTERNS = tuple(f"[0-9]_*/{name}" for name in ("config.json", "model.safetensors", "pytorch_model.bin"))
_SAFETENSORS_PATTERNS = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
_PICKLE_PATTERNS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin")


@dataclass(frozen=True)
class Location:
    """A folder of files or one file in it, and how to name it to others (never by a path of this machine)."""

    folder: Path
    name: str
    revision: str | None
    file: str | None = None  # a single weight file, which has no config.json

    @property
    def label(self) -> str:
        """Name, with the commit if there is one."""
        return f"{self.name}@{self.revision[:12]}" if self.revision else self.name


def locate(model: str, revision: str | None = None) -> Location:
    """Find MODEL: a folder or file if one exists under that name, else a Hub id, downloaded into the cache.

    Args:
        model: path of a folder or of a single weight file, or `owner/name` on the Hub.
        revision: branch, tag or commit on the Hub; the commit it stands for is pinned and recorded.

    Raises:
        ConvertError: no such folder or repo, no access, or no network and not in the cache.
    """
    if not model:
        raise ConvertError("the name of the model is empty")
    folder = Path(model).expanduser()
    if folder.exists() and revision is not None:
        raise ConvertError(f"{model} is here on disk: --revision is for models of the Hub")
    if folder.is_dir():
        return local(folder)
    if folder.is_file():
        if folder.suffix not in (".safetensors", *PICKLE_SUFFIXES):
            raise ConvertError(f"{model}: no weight file; give a folder, or one of .safetensors, .bin, .pth")
        return Location(folder.parent, folder.name, None, file=folder.name)
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ConvertError(f"{model}: no such folder")
    return _download(model, revision)


def local(folder: Path) -> Location:
    """The location of an existing folder."""
    return Location(folder, folder.resolve().name, None)


def _download(repo: str, revision: str | None) -> Location:
    wanted = f"{repo} at revision {revision}" if revision else repo
    try:
        beside = [*SETTINGS_FILES, MODULES_FILE, *SENTENCE_FILES, *_MODULE_PATTERNS]
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[*beside, *_SAFETENSORS_PATTERNS]))
        commit = folder.name
        if not any((folder / name).exists() for name in WEIGHT_FILES):
            snapshot_download(repo, revision=commit, allow_patterns=list(_PICKLE_PATTERNS))
    except GatedRepoError as error:
        raise ConvertError(
            f"{wanted}: access to this model must be granted first. Visit its page, then log in."
        ) from error
    except RepositoryNotFoundError as error:
        raise ConvertError(f"{wanted}: neither a folder here nor a model on the Hub (or it is private)") from error
    except RevisionNotFoundError as error:
        raise ConvertError(f"{wanted}: the Hub has no such revision of this model") from error
    except HFValidationError as error:
        raise ConvertError(f"{repo}: no such folder, and no valid Hub id") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        message = f"{wanted}: no folder here, not in the local cache, and the Hub cannot be reached"
        raise ConvertError(f"{message}. Check the network and HF_HUB_OFFLINE, or give a local folder.") from error
    except (HfHubHTTPError, OSError) as error:
        raise ConvertError(f"{wanted}: the download failed ({error})") from error
    return Location(folder, repo, commit)


class Checkpoint:
    """A model folder or single weight file: its raw `config.json` and its tensors, loaded one at a time.

    Args:
        location: where it is.
        config: the config of a single file, by its name or as a JSON file; a folder has its own.

    Raises:
        ConvertError: a single file without config, a file that is missing or malformed, an index that names files
            outside the folder, or a tensor that the index lists and no shard holds.
    """

    def __init__(self, location: Location, config: str | None = None) -> None:
        self.location = location
        self.folder = location.folder
        self.config_name = f"--config {config}" if location.file else str(self.folder / "config.json")
        self.config = self._read_config(config)
        self.weight_files: list[str] = []
        self._homes: dict[str, TensorFile] = {}
        for name in self._find_weights():
            file = open_weights(self.folder / name)
            self.weight_files.append(name)
            for tensor in file.tensors:
                if tensor in self._homes:
                    raise ConvertError(f"{file.path}: tensor {tensor} is also in {self._homes[tensor].path.name}")
                self._homes[tensor] = file
        self._check_index()

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the checkpoint, by name."""
        return {name: file.tensors[name] for name, file in self._homes.items()}

    @property
    def misplaced(self) -> list[str]:
        """Tensors that the index, if there is one, does not list, or lists in another shard than theirs."""
        homes = self._homes.items() if self._index else ()
        return [name for name, file in homes if self._index.get(name) != file.path.name]

    @property
    def weights_name(self) -> str:
        """The weight file, or the folder where there are several."""
        return str(self.folder / self.weight_files[0] if len(self.weight_files) == 1 else self.folder)

    def file_of(self, name: str) -> Path:
        """The weight file that holds a tensor."""
        return self._homes[name].path

    def load(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        return self._homes[name].load(name)

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """Give the values of one tensor in order, flat, a few million at a time."""
        return self._homes[name].chunks(name)

    def side_files(self) -> list[Path]:
        """Tokenizer files and the generation config, those that exist; a single file has none."""
        if self.location.file:
            return []
        return [p for n in (*TOKENIZER_FILES, "generation_config.json") if (p := self.folder / n).is_file()]

    def _read_config(self, config: str | None) -> dict[str, Any]:
        if not self.location.file:
            if config is not None:
                raise ConvertError(f"{self.folder} has a config.json: --config is for single files")
            return read_json(self.folder / "config.json")
        if config is None:
            message = f"{self.location.file}: a single file does not say what model it is. Give --config with a JSON"
            raise ConvertError(f"{message} file, or one of {', '.join(KNOWN_CONFIGS)}.")
        return find_config(config)

    def _find_weights(self) -> list[str]:
        self._index: dict[str, str] = {}
        if self.location.file:
            return [self.location.file]
        for name in WEIGHT_FILES:
            path = self.folder / name
            if path.is_file() and name.endswith(".index.json"):
                self._index = _read_index(path)
                return sorted(set(self._index.values()))
            if path.is_file():
                return [name]
        raise ConvertError(f"{self.folder}: no weights. Expected one of {', '.join(WEIGHT_FILES)}.")

    def _check_index(self) -> None:
        for tensor, shard in self._index.items():
            if tensor not in self._homes:
                raise ConvertError(f"{self.folder / shard}: lacks tensor {tensor}, which the index says it holds")


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConvertError(f"{path}: has no weight_map")
    suffix = path.name.removesuffix(".index.json").rsplit(".", 1)[1]
    for shard in weight_map.values():
        # A shard is a plain name beside the index: anything else could lead out of the folder.
        if not isinstance(shard, str) or shard != Path(shard).name or not shard.endswith(f".{suffix}"):
            raise ConvertError(f"{path}: names {shard!r} as a shard, which is no .{suffix} file beside it")
    return weight_map
