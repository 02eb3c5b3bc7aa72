"""From a FAT5 folder back to a stock T5 folder that transformers 4 and 5 both load."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fat5.model import FlashT5Config
from fat5convert import keymap
from fat5convert.errors import ConvertError
from fat5convert.families import FAMILIES
from fat5convert.heads import read_head
from fat5convert.json_files import read_json, write_json
from fat5convert.keymap import Pair
from fat5convert.layout import Layout
from fat5convert.precision import Form, short_name
from fat5convert.rescaling import Rescaling
from fat5convert.sentence_modules import carry_modules
from fat5convert.side_files import check_side_files
from fat5convert.source import Checkpoint, local
from fat5convert.staging import check_apart, check_space, holds_model, staged
from fat5convert.stock_models import stock_config
from fat5convert.writer import Advance, Item, write_weights


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
    transformers: int | None = None,
    overwrite: bool = False,
    shard_size: int = 2_000_000_000,
    progress: Callable[[int], Advance] | None = None,
) -> Exported:
    """Write the stock T5 folder of a FAT5 folder, converted or trained since.

    Tensors are renamed, never changed, except that a rescaling for float16 is undone, in float32, and that the queries
    take on an attention scale that is a power of two. Where the head is not (tied and scaled), it is stored, with
    `tie_word_embeddings: false`: the one form that every release of `transformers` reads rightly.

    Args:
        out: the FAT5 folder; its `conversion.json` is used if there, not needed.
        t5_dir: folder to make; appears complete or not at all.
        transformers: 4 or 5, whose words `config.json` uses for the dtype and the scale; None for both's. Either
            release loads either.
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
    provenance = _read_provenance(folder / "conversion.json")
    try:
        layout = _layout(config, checkpoint)
        pairs = keymap.expand(layout, len(checkpoint.tensors))
    except ConvertError as error:
        raise ConvertError(f"{folder / 'config.json'}: {error}") from error
    keymap.check(checkpoint, {pair.fat5: pair.shape for pair in pairs})
    check_side_files(checkpoint)

    rescaling = Rescaling.from_dict(provenance.get("rescaling"))
    config.layer_norm_epsilon = config.layer_norm_epsilon * 2.0 ** (2 * rescaling.residual)
    model_type = _model_type(config, provenance)
    sources = {pair.t5: pair.fat5 for pair in pairs}
    forms = {pair.t5: _form(checkpoint, pair, layout, rescaling, config.softmax_scale) for pair in pairs}
    raw = _carried(provenance) | stock_config(config, model_type, layout)
    shared = f"{layout.stock_prefix}shared.weight"
    if layout.is_language_model and not raw["tie_word_embeddings"]:
        sources.setdefault("lm_head.weight", "shared.weight")
        forms.setdefault("lm_head.weight", forms[shared])
    dtype = short_name(forms[shared].dtype)
    if transformers != 4:
        raw["dtype"] = dtype
    if transformers != 5:
        raw["torch_dtype"] = dtype
    if transformers == 4:
        raw.pop("scale_decoder_outputs", None)
    items = [Item(t5, checkpoint, fat5, checkpoint.tensors[fat5], forms[t5]) for t5, fat5 in sources.items()]
    nbytes = sum(item.info.nbytes for item in items)
    check_apart(target, folder)
    check_space(target, nbytes)
    with staged(target, overwrite, holds_model(*FAMILIES)) as staging:
        write_weights(staging, items, shard_size, progress(nbytes) if progress else lambda count: None)
        write_json(staging / "config.json", dict(sorted(raw.items())))
        for path in checkpoint.side_files():
            shutil.copyfile(path, staging / path.name)
        carry_modules(folder, staging)
    leftovers = {name: why for name, why in provenance.get("leftovers", {}).items() if name not in sources}
    return Exported(model_type, len(items), nbytes, leftovers, _warnings(config, model_type, layout))


def _form(checkpoint: Checkpoint, pair: Pair, layout: Layout, rescaling: Rescaling, scale: float) -> Form:
    exponent = -rescaling.exponent(pair.t5, layout)
    if pair.t5.endswith("Attention.q.weight"):
        exponent += round(math.log2(scale))  # stock T5 has no scale: the queries take it on
    dtype = checkpoint.tensors[pair.fat5].dtype
    return Form(torch.float32 if rescaling != Rescaling() else dtype, exponent)


def _read_provenance(path: Path) -> dict[str, Any]:
    """What the conversion recorded; nothing for a model made otherwise."""
    provenance = read_json(path) if path.is_file() else {}
    for key in ("leftovers", "source_config"):
        if not isinstance(provenance.get(key, {}), dict):
            raise ConvertError(f"{path}: {key} is malformed. Restore the file, or remove it to export without it.")
    return provenance


def _read_config(checkpoint: Checkpoint) -> FlashT5Config:
    where, raw = checkpoint.folder / "config.json", checkpoint.config
    if raw.get("model_type") != "flash_t5":
        raise ConvertError(f"{where}: no FAT5 model (model_type {raw.get('model_type')!r})")
    try:
        config = FlashT5Config.from_dict(raw)
    except (ValueError, TypeError) as error:
        raise ConvertError(f"{where}: {error}") from error
    if config.position_encoding_type != "t5":
        raise ConvertError(f"{where}: stock T5 has no positions of type {config.position_encoding_type!r}")
    if math.frexp(config.softmax_scale)[0] != 0.5:
        scale = f"{config.softmax_scale!r} is no power of two, and stock T5 has no scale but 1.0"
        raise ConvertError(f"{where}: attention_scale {scale}, so that nothing exact can be exported")
    return config


def _layout(config: FlashT5Config, checkpoint: Checkpoint) -> Layout:
    names = checkpoint.tensors
    head, _ = read_head(checkpoint.config, names)
    encoder_only = not any(name.startswith("decoder.") for name in names)
    if head and head.reads_decoder and (encoder_only or not config.head_reads_decoder):
        raise ConvertError(f"its head for {head.title} reads the encoder, and that of stock T5 the decoder")
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
        tied="lm_head.weight" not in names and (config.tie_word_embeddings or encoder_only or head is not None),
        encoder_only=encoder_only,
        head=head,
        num_labels=len(config.id2label or {}),
    )


def _model_type(config: FlashT5Config, provenance: dict[str, Any]) -> str:
    """The stock type that was converted, if it still describes the model; else the one that can hold it."""
    if config.relative_attention_per_layer:
        return "umt5"
    stated = getattr(config, "source_model_type", provenance.get("model_type"))
    return "mt5" if stated == "mt5" and not config.scale_decoder_outputs else "t5"


def _carried(provenance: dict[str, Any]) -> dict[str, Any]:
    """What the source's config said beyond the model itself, such as settings of a pipeline."""
    source = provenance.get("source_config", {})
    if source.get("model_type") == "flash_t5":  # published FAT5: its words mean nothing to stock T5
        return {}
    derived = ("dtype", "torch_dtype", "is_gated_act", "dense_act_fn")
    return {key: value for key, value in source.items() if key not in derived}


def _warnings(config: FlashT5Config, model_type: str, layout: Layout) -> list[str]:
    warnings: list[str] = []
    if not layout.is_language_model:
        return warnings
    if model_type == "umt5" and not config.scale_decoder_outputs:
        warnings.append(
            f"stock umT5 in transformers 5 multiplies its logits by d_model**-0.5 = {config.d_model**-0.5:.4g}; "
            "this model was not trained so: greedy tokens agree, but probabilities, losses and beams do not"
        )
    if config.scale_decoder_outputs and not layout.tied:
        warnings.append("an untied head with scaled decoder outputs: transformers 5 loads it rightly, 4 does not scale")
    return warnings
