"""What stands beside the weights in OUT: the configuration, the tokenizer and the generation settings."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from transformers import GenerationConfig

from fat5.model import AUTO_MAP, ENCODER_AUTO_MAP, FlashT5Config
from fat5convert.errors import ConvertError
from fat5convert.families import FAMILIES
from fat5convert.formats import TensorInfo
from fat5convert.json_files import read_json, write_json
from fat5convert.layout import Layout
from fat5convert.precision import short_name
from fat5convert.recognise import Recognised
from fat5convert.source import Checkpoint
from fat5convert.stock_models import class_name

# Configs written by early releases of transformers also hold what is for generation.
_GENERATION_KEYS = set(GenerationConfig().to_dict()) - {"transformers_version"}
_MODEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def write_config(
    folder: Path,
    fields: Mapping[str, Any],
    layout: Layout,
    outputs: Mapping[str, TensorInfo],
    raw: Mapping[str, Any],
    keep: bool,
) -> None:
    """Write config.json.

    Args:
        folder: OUT to be.
        fields: of FlashT5Config.
        layout: which parts the model has.
        outputs: the tensors in OUT.
        raw: the source's config.
        keep: whether the weights keep their dtype, so that the dtype which the source states is still right.
    """
    config = FlashT5Config(**fields, architectures=[class_name("flash_t5", layout)])
    stated = raw.get("dtype", raw.get("torch_dtype"))
    if not keep or stated not in [short_name(dtype) for dtype in _MODEL_DTYPES]:
        # The dtype that `from_pretrained` gives the model: the widest in the file.
        stated = short_name(max((info.dtype for info in outputs.values()), key=lambda dtype: torch.finfo(dtype).bits))
    written = config.to_diff_dict() | dict(fields) | {"auto_map": _auto_map(layout), "dtype": stated}
    write_json(folder / "config.json", dict(sorted(written.items())))


def _auto_map(layout: Layout) -> dict[str, str]:
    """The auto-classes that find what they load in the file."""
    if layout.head:
        names = ["AutoConfig", "AutoModel", "AutoModelForTextEncoding", f"AutoModelFor{layout.head.task}"]
        return {name: AUTO_MAP[name] for name in names}
    return ENCODER_AUTO_MAP if layout.encoder_only else AUTO_MAP


def check_side_files(checkpoint: Checkpoint) -> None:
    """See that what is carried over can be read: a repo whose tokenizer does not load is of no use.

    Raises:
        ConvertError: a file is damaged.
    """
    for path in checkpoint.side_files():
        try:
            if path.name == "tokenizer.json":
                Tokenizer.from_file(str(path))
            elif path.suffix == ".model":
                SentencePieceProcessor(model_file=str(path))
            elif path.suffix == ".json":
                read_json(path)
        except Exception as error:  # `tokenizers` raises no class of its own
            what = f"damaged, or not what its name says ({str(error).removeprefix(f'{path}: ')})"
            raise ConvertError(
                f"{path}: {what}. Download or copy it again, or remove it to convert without it."
            ) from error


def write_side_files(folder: Path, checkpoint: Checkpoint, recognised: Recognised) -> None:
    """Carry the tokenizer and generation config over, and add what only the stock model type implied."""
    raw, files = checkpoint.config, checkpoint.side_files()
    for path in files:
        shutil.copyfile(path, folder / path.name)
    names = {path.name for path in files}
    published = recognised.naming.column == "fat5"  # where pad_token_id -100 is usual
    path = checkpoint.folder / "generation_config.json"
    if recognised.layout.is_language_model and (published or path.name not in names):
        settings = {key: value for key, value in raw.items() if key in _GENERATION_KEYS and value is not None}
        settings |= read_json(path) if path.name in names else {}
        for key in ("decoder_start_token_id", "eos_token_id", "pad_token_id"):
            if published or settings.get(key) is None:
                settings[key] = recognised.config[key]
        write_json(folder / path.name, settings)
    if names - {"generation_config.json"}:
        # AutoTokenizer finds the class by model type when this file does not name it; flash_t5 has none.
        path = checkpoint.folder / "tokenizer_config.json"
        settings = read_json(path) if path.name in names else {}
        if "tokenizer_class" not in settings:
            stated = raw.get("tokenizer_class")
            name = stated if isinstance(stated, str) else FAMILIES[recognised.model_type].tokenizer_class
            write_json(folder / path.name, settings | {"tokenizer_class": name})
