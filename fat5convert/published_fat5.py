"""The configs of the published CATIE-AQ/FAT5 models, their traps, and their positions.

Source: https://github.com/catie-aq/flashT5 (`src/model/`, `src/utils/positional_encoding.py`), Apache-2.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fat5convert.errors import ConvertError
from fat5convert.source_config import read_size

# Fields that FlashT5Config does not have: they tell the one from the other.
_FIELDS = {
    "use_glu_mlp",
    "use_gelu_act",
    "use_flash_attention",
    "attention_type",
    "use_triton_layernorm",
    "use_triton_crossentropy",
    "use_triton_gated_mlp",
    "use_full_bias_size",
    "crossentropy_inplace_backward",
}
_ALIBI_MODES = {"symetric": "symmetric", "asymetric": "asymmetric"}
RANDOMISED = (
    "the published model draws those of queries and of keys apart, in every call; converted, it draws both as one, in "
    "training alone, and is compared at positions 0, 1, 2, ..."
)
"""What becomes of randomised positions, with which the published model computes nothing twice."""


def is_published_fat5(raw: Mapping[str, Any]) -> bool:
    """Whether this is the config of a published CATIE-AQ/FAT5 model, not of one made here."""
    return raw.get("model_type") == "flash_t5" and bool(_FIELDS & raw.keys())


def translate_published(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a published FAT5 in the words of stock T5, with `attention_scale` besides.

    Its `feed_forward_proj` is stale: the model is built by `use_glu_mlp` and `use_gelu_act`, and its gelu is the tanh
    approximation. `attention_scale` null or absent means 1/sqrt(num_heads), `pad_token_id` may be -100,
    `is_encoder_decoder` false means nothing, the head is never tied and its input never scaled.
    """
    gated = "gated-" if raw.get("use_glu_mlp") else ""
    gelu = "gelu" if gated else "gelu_new"
    fields = {key: value for key, value in raw.items() if key not in ("dense_act_fn", "is_gated_act")}
    fields["feed_forward_proj"] = gated + (gelu if raw.get("use_gelu_act", True) else "relu")
    scale = raw.get("attention_scale")
    fields["attention_scale"] = read_size(raw, "num_heads", default=8) ** -0.5 if scale is None else scale
    start = raw.get("decoder_start_token_id", 0)
    pad = raw.get("pad_token_id", -100)
    fields["decoder_start_token_id"] = start
    fields["pad_token_id"] = start if isinstance(pad, int) and pad < 0 else pad
    fields["tie_word_embeddings"] = False
    fields["scale_decoder_outputs"] = False
    return fields


def read_positions(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of FlashT5Config that say which positions a published FAT5 has.

    Raises:
        ConvertError: positions that FlashT5 does not compute.
    """
    kind = raw.get("position_encoding_type", "t5")
    if kind == "RoPE":
        raise ConvertError(
            "position_encoding_type 'RoPE' does not convert: the published model turns values as well as queries and "
            "keys, and in cross-attention too; FlashT5 turns queries and keys of self-attention, and no weights make "
            "the one compute the other"
        )
    if kind not in ("t5", "ALiBi", "FIRE", "none", None):
        raise ConvertError(
            f"position_encoding_type {kind!r} is none of 't5', 'ALiBi', 'RoPE', 'FIRE', and the published model then "
            "has no positions. If that is meant, write 'none'"
        )
    fields: dict[str, Any] = {"position_encoding_type": kind or "none"}
    randomised = raw.get("use_randomized_position_encoding", False)
    if not isinstance(randomised, bool):
        raise ConvertError(f"use_randomized_position_encoding must be true or false, not {randomised!r}")
    if randomised and kind == "ALiBi":
        raise ConvertError(
            "use_randomized_position_encoding with 'ALiBi': the published model then takes the biases of pairs of "
            "positions in place of all, which is no position bias. Set it to false to convert the model with positions "
            "0, 1, 2, ..."
        )
    if randomised and kind == "t5":  # FIRE, like no positions, takes no notice of it
        fields |= {
            "use_randomized_position_encoding": True,
            "max_sequence_length": read_size(raw, "max_sequence_length", default=1024),
        }
    if kind == "ALiBi":
        mode = raw.get("alibi_mode", "symetric")
        if not isinstance(mode, str) or mode not in _ALIBI_MODES:
            raise ConvertError(f"alibi_mode must be {' or '.join(map(repr, _ALIBI_MODES))}, not {mode!r}")
        fields["alibi_mode"] = _ALIBI_MODES[mode]
    if kind == "FIRE":
        fields["fire_mlp_width"] = read_size(raw, "fire_mlp_width", default=32)
    return fields
