"""From the raw config of a source, in whichever dialect, to the fields of FlashT5Config, each checked.

The raw `config.json` is read, never `AutoConfig`, which rewrites what decides tying and scaling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fat5convert.errors import ConvertError
from fat5convert.families import Family
from fat5convert.layout import Layout

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


def read_layout(raw: Mapping[str, Any], family: Family) -> tuple[Layout, dict[str, Any]]:
    """Map a raw config in the words of stock T5 to the fields of FlashT5Config, all but tying and scaling.

    Raises:
        ConvertError: a field is missing, or has a value that no model can be built from.
    """
    if "quantization_config" in raw:
        raise ConvertError("quantization_config: quantised checkpoints are not supported")
    sizes = {name: read_size(raw, name, other) for name, other in _SIZES.items()}
    decoder_layers = raw.get("num_decoder_layers")
    sizes["num_decoder_layers"] = (
        sizes["num_layers"] if decoder_layers is None else read_size(raw, "num_decoder_layers")
    )
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
    buckets = read_size(raw, "relative_attention_num_buckets", default=32)
    config = {
        **sizes,
        "relative_attention_num_buckets": buckets,
        # Configs from before the field existed mean the constant 128.
        "relative_attention_max_distance": read_size(raw, "relative_attention_max_distance", default=128),
        "relative_attention_per_layer": family.per_layer_bias,
        "position_encoding_type": "t5",
        "attention_scale": _number(raw, "attention_scale", 1.0),
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
        vocab_size=sizes["vocab_size"],
        d_model=sizes["d_model"],
        d_kv=sizes["d_kv"],
        d_ff=sizes["d_ff"],
        num_layers=sizes["num_layers"],
        num_decoder_layers=sizes["num_decoder_layers"],
        num_heads=sizes["num_heads"],
        num_buckets=buckets,
        gated=activation.startswith("gated-"),
        per_layer_bias=family.per_layer_bias,
    )
    return layout, config


def read_scaling(raw: Mapping[str, Any], family: Family) -> tuple[bool, str]:
    """Whether the decoder's output is multiplied by d_model**-0.5 before the head, and why.

    Raises:
        ConvertError: what decides it is neither true nor false.
    """
    if not family.may_scale:
        return False, f"{family.title} never scales"
    for name in ("scale_decoder_outputs", "tie_word_embeddings"):
        if not isinstance(raw.get(name), bool | None):
            raise ConvertError(f"{name} must be true or false, not {raw[name]!r}")
    if isinstance(raw.get("scale_decoder_outputs"), bool):
        # Written by transformers 5, where tie_word_embeddings says nothing.
        return raw["scale_decoder_outputs"], f"config.json has scale_decoder_outputs {raw['scale_decoder_outputs']}"
    if raw.get("tie_word_embeddings") is False:
        return False, "config.json has tie_word_embeddings false, which in transformers 4 also means unscaled"
    return True, "config.json does not have tie_word_embeddings false, which in transformers 4 means scaled"


def read_decoder_start(raw: Mapping[str, Any]) -> tuple[int | None, str]:
    """The token that decoding starts from, and why."""
    if raw.get("decoder_start_token_id") is not None:
        return _token(raw, "decoder_start_token_id", None), "config.json states it"
    return _token(raw, "pad_token_id", 0), "config.json is silent: T5 starts from the padding token"


def read_size(raw: Mapping[str, Any], name: str, other: str | None = None, default: int | None = None) -> int:
    """A positive integer of a config, under either name.

    Raises:
        ConvertError: missing without a default, or no such number.
    """
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
