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
from fat5convert.keymap import LEFTOVERS, NAMINGS, STOCK, TABLE, Layout, Naming, Pair
from fat5convert.precision import CONVERTIBLE, short_name
from fat5convert.source import Checkpoint
from fat5convert.source_config import (
    is_published_fat5,
    read_decoder_start,
    read_layout,
    read_scaling,
    translate_published,
)

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
            "tie_word_embeddings": self.layout.tied,
            "scale_decoder_outputs": self.scaled,
            "decoder_start_token_id": self.config["decoder_start_token_id"],
        }
        if self.layout.encoder_only:
            del values["tie_word_embeddings"], values["scale_decoder_outputs"], values["decoder_start_token_id"]
        return {name: {"value": value, "reason": self.reasons[name]} for name, value in values.items()}


def recognise(checkpoint: Checkpoint) -> Recognised:
    """Understand a checkpoint, and check the name and shape of its every tensor against its config.

    Raises:
        ConvertError: no T5, a T5 with something FAT5 has not, or tensors that do not fit the config.
    """
    raw, tensors = checkpoint.config, checkpoint.tensors
    try:
        model_type, family_reason = _model_type(raw, tensors)
        _refuse_scaled_fp8(tensors)
        naming = next((naming for naming in NAMINGS if naming.marker in tensors), STOCK)
        published = is_published_fat5(raw)
        fields = translate_published(raw) if published else raw
        layout, config = read_layout(fields, FAMILIES[model_type])
        start, start_reason = read_decoder_start(fields)
        scaled, scaled_reason = read_scaling(fields, FAMILIES[model_type])
        layout = replace(layout, encoder_only=_is_encoder_only(raw, tensors, naming))
        embedding = next((name for name in naming.embeddings if name in tensors), naming.embeddings[0])
        layout, tied_reason = _tying(checkpoint, layout, naming, embedding)
        pairs = keymap.expand(layout, len(tensors), naming)
        pairs[0] = replace(pairs[0], source=embedding)
        leftovers = _leftovers(checkpoint, pairs, naming)
        inside = {name: info for name, info in tensors.items() if name.startswith(naming.prefix)}
        keymap.check({pair.source: pair.shape for pair in pairs}, inside, tuple(leftovers))
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
    _check_dtypes(checkpoint, pairs)
    reasons = {
        "family": family_reason,
        "tensor_names": f"the file has {naming.marker}",
        "tie_word_embeddings": tied_reason,
        "scale_decoder_outputs": scaled_reason,
        "decoder_start_token_id": start_reason,
    }
    name = "FAT5" if published else title(model_type, raw, layout.encoder_only)
    return Recognised(model_type, name, naming, layout, pairs, config, scaled, reasons, leftovers)


def _model_type(raw: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> tuple[str, str]:
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
    if STOCK.marker not in tensors:
        raise ConvertError("has no model_type, and the tensors are not those of any T5")
    if "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in tensors:
        return "umt5", "config.json has no model_type, every layer has its own position bias"
    return "t5", "config.json has no model_type, one position bias per stack"


def _is_encoder_only(raw: Mapping[str, Any], tensors: Iterable[str], naming: Naming) -> bool:
    """No decoder in the file, and no architecture stated that would have one: else it is an incomplete model."""
    if naming.column == "wan":
        return True
    copies = {naming.prefix + "decoder.embed_tokens.weight"}
    if any(name.startswith(naming.prefix + "decoder.") and name not in copies for name in tensors):
        return False
    architectures = raw.get("architectures")
    stated = architectures if isinstance(architectures, list) else []
    return all(isinstance(name, str) and "Encoder" in name for name in stated)


def _tying(checkpoint: Checkpoint, layout: Layout, naming: Naming, embedding: str) -> tuple[Layout, str]:
    head = naming.name(TABLE[-1])
    if layout.encoder_only:
        return replace(layout, tied=True), "an encoder has no head"
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
        if not name.startswith(naming.prefix):
            outside[name.split(".", 1)[0]] += 1
        elif name in known and name not in used:
            if known[name].copy and not _same_values(checkpoint, name, pairs[0].source):
                raise ConvertError(f"{name} differs from {pairs[0].source}: separate embeddings are not supported")
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


def _refuse_scaled_fp8(tensors: Iterable[str]) -> None:
    scales = [name for name in tensors if name.endswith(_FP8_SCALES)]
    if scales:
        raise ConvertError(
            f"{scales[0]}: fp8 weights with scales; their products do not fit float32 exactly, so they would convert "
            "to something else. Convert the fp16 or bf16 file of the same model"
        )


def _check_dtypes(checkpoint: Checkpoint, pairs: list[Pair]) -> None:
    for pair in pairs:
        dtype = checkpoint.tensors[pair.source].dtype
        if dtype not in CONVERTIBLE:
            supported = ", ".join(short_name(item) for item in CONVERTIBLE)
            raise ConvertError(
                f"{checkpoint.folder}: tensor {pair.source} is {short_name(dtype)}; supported are {supported}"
            )
