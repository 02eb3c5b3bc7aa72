"""Recognise the T5 family of a checkpoint from its raw config and its tensors, and say why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fat5.model import FlashT5Config
from fat5convert import keymap
from fat5convert.errors import ConvertError
from fat5convert.families import FAMILIES, FAT5_ALREADY, REFUSED, title
from fat5convert.formats import TensorInfo
from fat5convert.heads import Head, architectures, read_head, read_labels
from fat5convert.keymap import LEFTOVERS, LM_HEAD, NAMINGS, STOCK, Naming, Pair
from fat5convert.layout import Layout
from fat5convert.precision import CONVERTIBLE, short_name
from fat5convert.published_fat5 import RANDOMISED, is_published_fat5, read_positions, translate_published
from fat5convert.source import Checkpoint
from fat5convert.source_config import read_decoder_start, read_layout, read_scaling

# What ComfyUI's scaled fp8 files hold beside the weights.
_FP8_SCALES = ("scaled_fp8", ".scale_weight", ".scale_input", ".weight_scale", ".input_scale")


@dataclass(frozen=True)
class Recognised:
    """A checkpoint understood: what becomes of each tensor, and every decision with its reason."""

    model_type: str  # of the stock model that computes the same
    title: str
    naming: Naming
    layout: Layout
    pairs: list[Pair]
    config: dict[str, Any]
    scaled: bool
    reasons: dict[str, str]
    leftovers: dict[str, str]

    def decisions(self) -> dict[str, dict[str, Any]]:
        """Family, tying and scaling with the reason for each, for people and for JSON."""
        values: dict[str, Any] = {
            "family": self.title,
            "tensor_names": self.naming.title,
            "positions": self.layout.positions,
        }
        if self.layout.head:
            values["head"] = f"{self.layout.head.title}, {self.layout.num_labels} label(s)"
        if self.layout.is_language_model:
            values |= {"tie_word_embeddings": self.layout.tied, "scale_decoder_outputs": self.scaled}
        if not self.layout.encoder_only:
            values["decoder_start_token_id"] = self.config["decoder_start_token_id"]
        return {name: {"value": value, "reason": self.reasons[name]} for name, value in values.items()}


def recognise(checkpoint: Checkpoint) -> Recognised:
    """Understand a checkpoint, and check the name and shape of its every tensor against its config.

    Raises:
        ConvertError: no T5, a T5 with something FAT5 has not, or tensors that do not fit the config.
    """
    raw, tensors = checkpoint.config, checkpoint.tensors
    try:
        naming = next((naming for naming in NAMINGS if naming.marker in tensors), STOCK)
        model_type, family_reason = _model_type(raw, tensors, naming)
        published = is_published_fat5(raw)
        fields = translate_published(raw) if published else raw
        layout, config = read_layout(fields, FAMILIES[model_type])
        positions_reason = f"{FAMILIES[model_type].title} has these"
        if published:
            positions = read_positions(raw)
            config |= positions
            layout = replace(
                layout,
                positions=positions["position_encoding_type"],
                fire_mlp_width=positions.get("fire_mlp_width", 0),
            )
            positions_reason = f"config.json has position_encoding_type {raw.get('position_encoding_type', 't5')!r}"
            if positions.get("use_randomized_position_encoding"):
                positions_reason += f", drawn at random: {RANDOMISED}"
        start, start_reason = read_decoder_start(fields)
        scaled, scaled_reason = read_scaling(fields, FAMILIES[model_type])
        head, head_reason = read_head(raw, tensors)
        if published and head and head.reads_decoder and not any(name.startswith("decoder.block.") for name in tensors):
            head, head_reason = head.on_encoder(), f"{head_reason}, and no decoder"
        layout = replace(layout, head=head, encoder_only=_is_encoder_only(raw, tensors, naming, head))
        if head:
            labels = _read_head_fields(raw, config, head)
            layout = replace(layout, num_labels=len(labels["id2label"]))
            config |= labels
        embedding = next((name for name in naming.embeddings if name in tensors), naming.embeddings[0])
        layout, tied_reason = _tying(checkpoint, layout, naming, embedding)
        pairs = keymap.expand(layout, len(tensors), naming)
        pairs[0] = replace(pairs[0], source=embedding)
        config |= {
            "tie_word_embeddings": layout.tied,
            "scale_decoder_outputs": scaled,
            "decoder_start_token_id": start,
            # Travels with the model through training, so that export knows where to lead back to.
            "source_model_type": model_type,
        }
        FlashT5Config(**config)
    except (ConvertError, ValueError) as error:
        raise ConvertError(f"{checkpoint.config_name}: {error}") from error
    # From here on the weight files are, or may be, what is wrong: each message names its own.
    _refuse_scaled_fp8(checkpoint)
    leftovers = _leftovers(checkpoint, pairs, naming)
    outside = {name for name in tensors if not _is_inside(name, naming)}
    keymap.check(checkpoint, {pair.source: pair.shape for pair in pairs}, outside | leftovers.keys())
    _check_dtypes(checkpoint, pairs)
    reasons = {
        "family": family_reason,
        "tensor_names": f"the file has {naming.marker}",
        "positions": positions_reason,
        "head": head_reason,
        "tie_word_embeddings": tied_reason,
        "scale_decoder_outputs": scaled_reason,
        "decoder_start_token_id": start_reason,
    }
    name = "FAT5" if published else title(model_type, raw, layout)
    return Recognised(model_type, name, naming, layout, pairs, config, scaled, reasons, leftovers)


def _model_type(raw: Mapping[str, Any], tensors: Mapping[str, TensorInfo], naming: Naming) -> tuple[str, str]:
    stated = raw.get("model_type")
    if isinstance(stated, str) and stated in REFUSED:
        raise ConvertError(f"model_type {stated!r} is not supported: {REFUSED[stated]}")
    if isinstance(stated, str) and stated in FAMILIES:
        return stated, f"config.json has model_type {stated!r}"
    if stated == "flash_t5":
        if not is_published_fat5(raw):
            raise ConvertError(f"model_type {stated!r} is not supported: {FAT5_ALREADY}")
        return "t5", "config.json has model_type 'flash_t5' and the fields of the published FAT5"
    if stated is not None:
        raise ConvertError(f"model_type {stated!r} is no T5; supported are {', '.join(FAMILIES)}")
    if naming.column != "t5" or naming.marker not in tensors:
        raise ConvertError("has no model_type, and the tensors are not those of any T5")
    if f"{naming.prefix}encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in tensors:
        return "umt5", "config.json has no model_type, every layer has its own position bias"
    return "t5", "config.json has no model_type, one position bias per stack"


def _is_encoder_only(raw: Mapping[str, Any], tensors: Iterable[str], naming: Naming, head: Head | None) -> bool:
    """No decoder in the file, and no architecture stated that would have one: else it is an incomplete model."""
    if naming.column == "wan":
        return True
    if head is not None:
        return not head.reads_decoder
    copies = {naming.prefix + "decoder.embed_tokens.weight"}
    if any(name.startswith(naming.prefix + "decoder.") and name not in copies for name in tensors):
        return False
    return all("Encoder" in name for name in architectures(raw))


def _read_head_fields(raw: Mapping[str, Any], config: Mapping[str, Any], head: Head) -> dict[str, Any]:
    """The fields of FlashT5Config that the head of a checkpoint needs."""
    if head.task == "SequenceClassification" and type(config["eos_token_id"]) is not int:
        raise ConvertError(
            f"eos_token_id must be one token id, not {config['eos_token_id']!r}: the head reads the state there"
        )
    return read_labels(raw, head) | {"head_reads_decoder": head.reads_decoder}


def _is_inside(name: str, naming: Naming) -> bool:
    """Whether a tensor belongs to the T5, or to another part of the larger model that it is in."""
    return not naming.in_company or name.startswith(naming.prefix)


def _tying(checkpoint: Checkpoint, layout: Layout, naming: Naming, embedding: str) -> tuple[Layout, str]:
    head = naming.name(LM_HEAD)
    if not layout.is_language_model:
        return replace(layout, tied=True), "there is no head over the vocabulary"
    if head not in checkpoint.tensors:
        return replace(layout, tied=True), f"the file has no {head}"
    if embedding in checkpoint.tensors and _same_values(checkpoint, head, embedding):
        return replace(layout, tied=True), f"{head} equals the embedding"
    return replace(layout, tied=False), f"{head} differs from the embedding"


def _leftovers(checkpoint: Checkpoint, pairs: list[Pair], naming: Naming) -> dict[str, str]:
    """Tensors that stay behind, with the reason; a copy that is none is not one of them."""
    used = {pair.source for pair in pairs}
    known = {naming.prefix + leftover.name: leftover for leftover in LEFTOVERS}
    outside: Counter[str] = Counter()
    result = {}
    for name in checkpoint.tensors:
        if not _is_inside(name, naming):
            outside[name.split(".", 1)[0]] += 1
        elif name in known and name not in used:
            if known[name].copy and not _same_values(checkpoint, name, pairs[0].source):
                if name == naming.name(LM_HEAD):  # of a model that should have none
                    continue
                what = f"{name} differs from {pairs[0].source}: separate embeddings are not supported"
                raise ConvertError(f"{checkpoint.file_of(name)}: {what}")
            result[name] = known[name].reason
    for part, count in outside.items():
        result[f"{part}.*"] = f"{count} tensor(s) of other parts of the model"
    return result


def _same_values(checkpoint: Checkpoint, one: str, other: str) -> bool:
    if checkpoint.tensors[one] != checkpoint.tensors[other]:
        return False
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(checkpoint.chunks(one), checkpoint.chunks(other), strict=True)
    )


def _refuse_scaled_fp8(checkpoint: Checkpoint) -> None:
    scales = [name for name in checkpoint.tensors if name.endswith(_FP8_SCALES)]
    if scales:
        raise ConvertError(
            f"{checkpoint.file_of(scales[0])}: {scales[0]}: fp8 weights with scales; their products do not fit float32 "
            "exactly, so they would convert to something else. Convert the fp16 or bf16 file of the same model"
        )


def _check_dtypes(checkpoint: Checkpoint, pairs: list[Pair]) -> None:
    for pair in pairs:
        dtype = checkpoint.tensors[pair.source].dtype
        if dtype == torch.int64 and pair.t5.endswith(".init_L"):  # the published FIRE makes it from an integer
            continue
        if dtype not in CONVERTIBLE:
            supported = ", ".join(short_name(item) for item in CONVERTIBLE)
            raise ConvertError(
                f"{checkpoint.file_of(pair.source)}: tensor {pair.source} is {short_name(dtype)}; supported are "
                f"{supported}"
            )
