"""Recognise the T5 family of a checkpoint from its raw config and its tensors, and say why.

The raw `config.json` is read, never `AutoConfig`, which rewrites what decides tying and scaling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from fat5.model import FlashT5Config
from fat5convert import keymap
from fat5convert.errors import ConvertError
from fat5convert.formats import TensorInfo
from fat5convert.keymap import EMBEDDINGS, LEFTOVERS, Layout, Pair
from fat5convert.precision import CONVERTIBLE, short_name
from fat5convert.source import Checkpoint


class Family(NamedTuple):
    """A supported `model_type`, with what its stock config class assumes when the file is silent."""

    title: str
    per_layer_bias: bool
    may_scale: bool
    feed_forward_proj: str
    tokenizer_class: str


FAMILIES: dict[str, Family] = {
    "t5": Family("T5", per_layer_bias=False, may_scale=True, feed_forward_proj="relu", tokenizer_class="T5Tokenizer"),
    "mt5": Family("mT5", False, False, "gated-gelu", "T5Tokenizer"),
    "umt5": Family("umT5", True, False, "gated-gelu", "T5Tokenizer"),
}

# Model types that people may take for a T5, and why they are none.
REFUSED: dict[str, str] = {
    "bert": "BERT is an encoder with absolute positions",
    "roberta": "RoBERTa is an encoder with absolute positions",
    "gpt2": "GPT-2 is a decoder with absolute positions",
    "bart": "BART has absolute positions and biases in its layers",
    "mbart": "mBART has absolute positions and biases in its layers",
    "pegasus": "Pegasus has absolute positions and biases in its layers",
    "longt5": "LongT5 has local or transient-global attention",
    "switch_transformers": "Switch Transformers has a mixture of experts",
    "t5gemma": "T5Gemma is an encoder-decoder of Gemma layers with rotary positions",
    "t5gemma2": "T5Gemma 2 is an encoder-decoder of Gemma layers with rotary positions",
    "udop": "UDOP adds image patches and two-dimensional position biases",
    "pop2piano": "Pop2Piano takes spectrograms, through a conditioned embedding",
    "pix2struct": "Pix2Struct has an image encoder",
    "flash_t5": "this is a FAT5 model already (`fat5convert export` leads back to a stock T5)",
}

ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu", "gated-relu", "gated-gelu", "gated-silu")

# Sizes that a config must state, with the other name that stock T5 configs accept for some.
_SIZES = {
    "vocab_size": None,
    "d_model": "hidden_size",
    "d_kv": "head_dim",
    "d_ff": None,
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}
_MAX_SIZE = 1 << 31


@dataclass(frozen=True)
class Recognised:
    """A checkpoint understood: what becomes of each tensor, and every decision with its reason."""

    model_type: str
    title: str
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
            "tie_word_embeddings": self.layout.tied,
            "scale_decoder_outputs": self.scaled,
            "decoder_start_token_id": self.config["decoder_start_token_id"],
        }
        return {name: {"value": value, "reason": self.reasons[name]} for name, value in values.items()}


def recognise(checkpoint: Checkpoint) -> Recognised:
    """Understand a checkpoint, and check the name and shape of its every tensor against its config.

    Raises:
        ConvertError: no T5, a T5 with something FAT5 has not, or tensors that do not fit the config.
    """
    raw, tensors = checkpoint.config, checkpoint.tensors
    where = str(checkpoint.folder / "config.json")
    try:
        model_type, family_reason = _model_type(raw, tensors)
        layout, config = _read_config(raw, FAMILIES[model_type])
        start, start_reason = _decoder_start(raw)
        scaled, scaled_reason = _scaling(raw, FAMILIES[model_type])
        embedding = next((name for name in EMBEDDINGS if name in tensors), "shared.weight")
        layout = replace(layout, tied=False)
        tied_reason = "lm_head.weight differs from the embedding"
        if "lm_head.weight" not in tensors:
            layout, tied_reason = replace(layout, tied=True), "the file has no lm_head.weight"
        elif embedding in tensors and _same_values(checkpoint, "lm_head.weight", embedding):
            layout, tied_reason = replace(layout, tied=True), "lm_head.weight equals the embedding"
        pairs = keymap.expand(layout, len(tensors))
        pairs[0] = replace(pairs[0], t5=embedding)
        leftovers = _leftovers(checkpoint, pairs)
        keymap.check({pair.t5: pair.shape for pair in pairs}, tensors, tuple(leftovers))
    except ConvertError as error:
        raise ConvertError(f"{where}: {error}") from error
    _check_dtypes(checkpoint, pairs)
    config |= {
        "tie_word_embeddings": layout.tied,
        "scale_decoder_outputs": scaled,
        "decoder_start_token_id": start,
    }
    try:
        FlashT5Config(**config)
    except ValueError as error:
        raise ConvertError(f"{where}: {error}") from error
    reasons = {
        "family": family_reason,
        "tie_word_embeddings": tied_reason,
        "scale_decoder_outputs": scaled_reason,
        "decoder_start_token_id": start_reason,
    }
    title = _title(model_type, layout, raw)
    return Recognised(model_type, title, layout, pairs, config, scaled, reasons, leftovers)


def _model_type(raw: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> tuple[str, str]:
    stated = raw.get("model_type")
    if isinstance(stated, str) and stated in REFUSED:
        raise ConvertError(f"model_type {stated!r} is not supported: {REFUSED[stated]}")
    if isinstance(stated, str) and stated in FAMILIES:
        return stated, f"config.json has model_type {stated!r}"
    if stated is not None:
        raise ConvertError(f"model_type {stated!r} is no T5; supported are {', '.join(FAMILIES)}")
    if "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight" not in tensors:
        raise ConvertError("has no model_type, and the tensors are not those of any T5")
    if "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in tensors:
        return "umt5", "config.json has no model_type, every layer has its own position bias"
    return "t5", "config.json has no model_type, one position bias per stack"


def _read_config(raw: Mapping[str, Any], family: Family) -> tuple[Layout, dict[str, Any]]:
    """Map the raw config to the fields of FlashT5Config, all but tying and scaling."""
    if "quantization_config" in raw:
        raise ConvertError("quantization_config: quantised checkpoints are not supported")
    sizes = {name: _size(raw, name, other) for name, other in _SIZES.items()}
    decoder_layers = raw.get("num_decoder_layers")
    sizes["num_decoder_layers"] = sizes["num_layers"] if decoder_layers is None else _size(raw, "num_decoder_layers")
    activation = raw.get("feed_forward_proj", family.feed_forward_proj)
    if activation not in ACTIVATIONS:
        raise ConvertError(f"feed_forward_proj {activation!r} is unknown; supported are {', '.join(ACTIVATIONS)}")
    # Stock derives these two from feed_forward_proj and writes them too; one edited by hand would win there.
    derived = {
        "dense_act_fn": "gelu_new" if activation == "gated-gelu" else activation.removeprefix("gated-"),
        "is_gated_act": activation.startswith("gated-"),
    }
    for name, value in derived.items():
        if raw.get(name, value) != value:
            raise ConvertError(f"{name} {raw[name]!r} contradicts feed_forward_proj {activation!r}")
    buckets = _size(raw, "relative_attention_num_buckets", default=32)
    config = {
        **sizes,
        "relative_attention_num_buckets": buckets,
        # Configs from before the field existed mean the constant 128.
        "relative_attention_max_distance": _size(raw, "relative_attention_max_distance", default=128),
        "relative_attention_per_layer": family.per_layer_bias,
        "position_encoding_type": "t5",
        "attention_scale": 1.0,
        "feed_forward_proj": activation,
        "is_encoder_decoder": True,
    }
    for name, default in (
        ("dropout_rate", 0.1),
        ("layer_norm_epsilon", 1e-6),
        ("initializer_factor", 1.0),
        ("classifier_dropout", 0.0),
    ):
        config[name] = _number(raw, name, default)
    config["use_cache"] = raw.get("use_cache", True)
    if not isinstance(config["use_cache"], bool):
        raise ConvertError(f"use_cache must be true or false, not {config['use_cache']!r}")
    for name, token in (("pad_token_id", 0), ("eos_token_id", 1), ("bos_token_id", None)):
        config[name] = _token(raw, name, token)
    layout = Layout(
        **sizes,
        num_buckets=buckets,
        gated=activation.startswith("gated-"),
        per_layer_bias=family.per_layer_bias,
        tied=True,
    )
    return layout, config


def _size(raw: Mapping[str, Any], name: str, other: str | None = None, default: int | None = None) -> int:
    value = raw.get(name, raw.get(other, default) if other else default)
    if value is None:
        raise ConvertError(f"{name} is missing")
    if type(value) is not int or not 0 < value < _MAX_SIZE:
        raise ConvertError(f"{name} must be a positive integer, not {value!r}")
    return value


def _number(raw: Mapping[str, Any], name: str, default: float) -> float:
    value = raw.get(name, default)
    if type(value) not in (int, float) or not 0 <= value < float("inf"):
        raise ConvertError(f"{name} must be a number, not {value!r}")
    return value


def _token(raw: Mapping[str, Any], name: str, default: int | None) -> Any:
    """A token id, or null; a list of ids where generation may end at any of them."""
    value = raw.get(name, default)
    ids = value if name == "eos_token_id" and isinstance(value, list) else [value]
    if not all(item is None or (type(item) is int and item >= 0) for item in ids):
        raise ConvertError(f"{name} must be a token id or null, not {value!r}")
    return value


def _scaling(raw: Mapping[str, Any], family: Family) -> tuple[bool, str]:
    """Whether the decoder's output is multiplied by d_model**-0.5 before the head."""
    if not family.may_scale:
        return False, f"{family.title} never scales"
    if isinstance(raw.get("scale_decoder_outputs"), bool):
        # Written by transformers 5, where tie_word_embeddings says nothing.
        return raw["scale_decoder_outputs"], f"config.json has scale_decoder_outputs {raw['scale_decoder_outputs']}"
    if raw.get("tie_word_embeddings") is False:
        return False, "config.json has tie_word_embeddings false, which in transformers 4 also means unscaled"
    return True, "config.json does not have tie_word_embeddings false, which in transformers 4 means scaled"


def _decoder_start(raw: Mapping[str, Any]) -> tuple[int | None, str]:
    if raw.get("decoder_start_token_id") is not None:
        return _token(raw, "decoder_start_token_id", None), "config.json states it"
    return _token(raw, "pad_token_id", 0), "config.json is silent: T5 starts from the padding token"


def _leftovers(checkpoint: Checkpoint, pairs: list[Pair]) -> dict[str, str]:
    """Tensors that stay behind, with the reason; a copy that is none is not one of them."""
    used = {pair.t5 for pair in pairs}
    result = {}
    for leftover in LEFTOVERS:
        if leftover.name in used or leftover.name not in checkpoint.tensors:
            continue
        if leftover.equal_to and not _same_values(checkpoint, leftover.name, pairs[0].t5):
            raise ConvertError(f"{leftover.name} differs from {pairs[0].t5}: separate embeddings are not supported")
        result[leftover.name] = leftover.reason
    return result


def _same_values(checkpoint: Checkpoint, one: str, other: str) -> bool:
    if checkpoint.tensors[one] != checkpoint.tensors[other]:
        return False
    a, b = checkpoint.load(one), checkpoint.load(other)
    return a.data_ptr() == b.data_ptr() or torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _check_dtypes(checkpoint: Checkpoint, pairs: list[Pair]) -> None:
    for pair in pairs:
        dtype = checkpoint.tensors[pair.t5].dtype
        if dtype not in CONVERTIBLE:
            supported = ", ".join(short_name(item) for item in CONVERTIBLE)
            raise ConvertError(
                f"{checkpoint.folder}: tensor {pair.t5} is {short_name(dtype)}; supported are {supported}"
            )


def _title(model_type: str, layout: Layout, raw: Mapping[str, Any]) -> str:
    if model_type != "t5":
        return FAMILIES[model_type].title
    if raw.get("tokenizer_class") == "ByT5Tokenizer" or layout.vocab_size == 384:
        return "ByT5"
    return "T5 v1.1" if layout.gated else "T5 v1.0"
