"""From a FAT5 folder back to a stock T5 folder that transformers 4 and 5 both load."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fat5.model import FlashT5Config
from fat5convert import keymap
from fat5convert.errors import ConvertError
from fat5convert.families import FAMILIES
from fat5convert.formats import TensorInfo
from fat5convert.keymap import Layout
from fat5convert.parity import STOCK_CLASSES
from fat5convert.precision import short_name
from fat5convert.source import Checkpoint, local, read_json, write_json
from fat5convert.writer import Advance, Item, check_space, holds_model, staged, write_weights

# Fields whose names and meanings stock T5 shares with FlashT5Config.
_SHARED_FIELDS = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_decoder_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "feed_forward_proj",
    "dropout_rate",
    "layer_norm_epsilon",
    "initializer_factor",
    "classifier_dropout",
    "pad_token_id",
    "eos_token_id",
    "bos_token_id",
    "decoder_start_token_id",
    "use_cache",
)


@dataclass(frozen=True)
class Exported:
    """What an export wrote and left out."""

    model_type: str
    tensors: int
    nbytes: int
    not_restored: dict[str, str]  # tensors of the original that stock does not load, with the reason
    warnings: list[str]


def export(
    out: str | Path,
    t5_dir: str | Path,
    *,
    overwrite: bool = False,
    shard_size: int = 2_000_000_000,
    progress: Callable[[int], Advance] | None = None,
) -> Exported:
    """Write the stock T5 folder of a FAT5 folder, converted or trained since.

    Tensors are renamed, never changed. Where the head is not (tied and scaled), it is stored, with
    `tie_word_embeddings: false`: the one form that every release of `transformers` reads rightly.

    Args:
        out: the FAT5 folder; its `conversion.json` is used if there, not needed.
        t5_dir: folder to make; appears complete or not at all.
        overwrite: replace a T5_DIR that holds a T5.
        shard_size: most bytes per weight file.
        progress: given the bytes to write, returns a function to call with every count written.

    Raises:
        ConvertError: no FAT5 folder, a model that stock T5 cannot express, or T5_DIR cannot be written.
    """
    folder, target = Path(out), Path(t5_dir)
    if not folder.is_dir():
        raise ConvertError(f"{out}: no such folder")
    checkpoint = Checkpoint(local(folder))
    config = _read_config(checkpoint)
    provenance = read_json(folder / "conversion.json") if (folder / "conversion.json").is_file() else {}
    tied = "lm_head.weight" not in checkpoint.tensors
    layout = _layout(config, tied)
    try:
        pairs = keymap.expand(layout, len(checkpoint.tensors))
        keymap.check({pair.fat5: pair.shape for pair in pairs}, checkpoint.tensors)
    except ConvertError as error:
        raise ConvertError(f"{folder / 'config.json'}: {error}") from error

    model_type = _model_type(config, provenance)
    raw = _stock_config(config, provenance, model_type, tied, checkpoint.tensors["shared.weight"])
    sources = {pair.t5: pair.fat5 for pair in pairs}
    if not raw["tie_word_embeddings"]:
        sources.setdefault("lm_head.weight", "shared.weight")
    items = [_item(checkpoint, t5, fat5) for t5, fat5 in sources.items()]
    nbytes = sum(item.info.nbytes for item in items)
    if target.absolute() == folder.absolute():
        raise ConvertError(f"{target}: is the folder to export from; choose another")
    check_space(target, nbytes)
    with staged(target, overwrite, holds_model(*FAMILIES)) as staging:
        write_weights(staging, items, shard_size, progress(nbytes) if progress else lambda count: None)
        write_json(staging / "config.json", dict(sorted(raw.items())))
        for path in checkpoint.side_files():
            shutil.copyfile(path, staging / path.name)
    leftovers = {name: why for name, why in provenance.get("leftovers", {}).items() if name not in sources}
    return Exported(model_type, len(items), nbytes, leftovers, _warnings(config, model_type, tied))


def _item(checkpoint: Checkpoint, t5: str, fat5: str) -> Item:
    return Item(t5, checkpoint.tensors[fat5], lambda: checkpoint.load(fat5))


def _read_config(checkpoint: Checkpoint) -> FlashT5Config:
    where, raw = checkpoint.folder / "config.json", checkpoint.config
    if raw.get("model_type") != "flash_t5":
        raise ConvertError(f"{where}: no FAT5 model (model_type {raw.get('model_type')!r})")
    try:
        config = FlashT5Config.from_dict(raw)
    except (ValueError, TypeError) as error:
        raise ConvertError(f"{where}: {error}") from error
    if config.softmax_scale != 1.0:
        raise ConvertError(f"{where}: attention_scale {config.attention_scale!r}: stock T5 has no scale but 1.0")
    if config.position_encoding_type != "t5":
        raise ConvertError(f"{where}: stock T5 has no positions of type {config.position_encoding_type!r}")
    return config


def _layout(config: FlashT5Config, tied: bool) -> Layout:
    return Layout(
        vocab_size=config.vocab_size,
        d_model=config.d_model,
        d_kv=config.d_kv,
        d_ff=config.d_ff,
        num_layers=config.num_layers,
        num_decoder_layers=config.num_decoder_layers,
        num_heads=config.num_heads,
        num_buckets=config.relative_attention_num_buckets,
        gated=config.is_gated_act,
        per_layer_bias=config.relative_attention_per_layer,
        tied=tied,
    )


def _model_type(config: FlashT5Config, provenance: dict[str, Any]) -> str:
    """The stock type that was converted, if it still describes the model; else the one that can hold it."""
    if config.relative_attention_per_layer:
        return "umt5"
    return "mt5" if provenance.get("model_type") == "mt5" and not config.scale_decoder_outputs else "t5"


def _stock_config(
    config: FlashT5Config, provenance: dict[str, Any], model_type: str, tied: bool, embedding: TensorInfo
) -> dict[str, Any]:
    scaled = bool(config.scale_decoder_outputs)
    raw = dict(provenance.get("source_config", {}))
    raw.pop("dtype", None)
    raw |= {name: getattr(config, name) for name in _SHARED_FIELDS}
    raw |= {
        "architectures": [STOCK_CLASSES[model_type].__name__],
        "model_type": model_type,
        "is_encoder_decoder": True,
        # Transformers 4 reads "tied and scaled" or "neither" from this; 5 reads the scale from its own key, and
        # finds out about tying from the file.
        "tie_word_embeddings": tied and scaled,
        "torch_dtype": short_name(embedding.dtype),
    }
    if model_type == "t5":
        raw["scale_decoder_outputs"] = scaled
    return raw


def _warnings(config: FlashT5Config, model_type: str, tied: bool) -> list[str]:
    warnings = []
    if model_type == "umt5" and not config.scale_decoder_outputs:
        warnings.append(
            f"stock umT5 in transformers 5 multiplies its logits by d_model**-0.5 = {config.d_model**-0.5:.4g}; "
            "this model was not trained so: greedy tokens agree, but probabilities, losses and beams do not"
        )
    if config.scale_decoder_outputs and not tied:
        warnings.append("an untied head with scaled decoder outputs: transformers 5 loads it rightly, 4 does not scale")
    return warnings
