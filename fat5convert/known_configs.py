"""Configurations by name, for single weight files, which state none: `--config NAME_OR_FILE`.

Sizes are those of the `config.json` of the models of these names on the Hub (google-t5, google).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fat5convert.errors import ConvertError
from fat5convert.json_files import read_json

_FIELDS = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads")
_T5 = {"model_type": "t5", "vocab_size": 32128, "feed_forward_proj": "relu"}
_GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_T5_SIZES = {
    "small": (512, 64, 2048, 6, 8),
    "base": (768, 64, 3072, 12, 12),
    "large": (1024, 64, 4096, 24, 16),
    "3b": (1024, 128, 16384, 24, 32),
    "11b": (1024, 128, 65536, 24, 128),
}
_GATED_SIZES = {
    "small": (512, 64, 1024, 8, 6),
    "base": (768, 64, 2048, 12, 12),
    "large": (1024, 64, 2816, 24, 16),
    "xl": (2048, 64, 5120, 24, 32),
    "xxl": (4096, 64, 10240, 24, 64),
}
_GATED_FAMILIES: dict[str, dict[str, Any]] = {
    "t5-v1_1": {"model_type": "t5", "vocab_size": 32128},
    "mt5": {"model_type": "mt5", "vocab_size": 250112},
    "umt5": {"model_type": "umt5", "vocab_size": 256384},
}
KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    f"t5-{size}": _T5 | dict(zip(_FIELDS, values, strict=True)) for size, values in _T5_SIZES.items()
} | {
    f"{family}-{size}": fields | _GATED | dict(zip(_FIELDS, values, strict=True))
    for family, fields in _GATED_FAMILIES.items()
    for size, values in _GATED_SIZES.items()
    if (family, size) != ("umt5", "large")  # was never published
}


def find_config(name: str) -> dict[str, Any]:
    """The raw config that `--config` names: one of `KNOWN_CONFIGS`, or a JSON file.

    Raises:
        ConvertError: neither.
    """
    if name in KNOWN_CONFIGS:
        return dict(KNOWN_CONFIGS[name])
    path = Path(name).expanduser()
    if path.is_file():
        return read_json(path)
    if path.is_dir():
        raise ConvertError(f"--config {name}: a folder. Give the config.json in it.")
    raise ConvertError(f"--config {name}: no such file, and no known name ({', '.join(KNOWN_CONFIGS)})")
