"""Stock transformers models of every T5 family at toy size, and the same weights in FlashT5."""

import re

import torch
from torch import nn
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from fat5.model import FlashT5Config, FlashT5ForConditionalGeneration

# inner_dim (4 x 6) differs from d_model; max_distance is short, so that the inputs reach the last buckets
SHAPE = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_max_distance": 20,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
FAMILIES = {
    "t5": (T5ForConditionalGeneration, T5Config, {"feed_forward_proj": "relu", "tie_word_embeddings": True}, {}),
    "t5_v1_1": (T5ForConditionalGeneration, T5Config, V1_1, {}),
    "mt5": (MT5ForConditionalGeneration, MT5Config, V1_1, {}),
    "umt5": (UMT5ForConditionalGeneration, UMT5Config, V1_1, {"relative_attention_per_layer": True}),
    "byt5": (T5ForConditionalGeneration, T5Config, {**V1_1, "num_layers": 4, "num_decoder_layers": 1}, {}),
    "ul2": (T5ForConditionalGeneration, T5Config, {**V1_1, "feed_forward_proj": "gated-silu"}, {}),
    "ankh": (
        T5ForConditionalGeneration,
        T5Config,
        {**V1_1, "relative_attention_num_buckets": 24, "relative_attention_max_distance": 31},
        {},
    ),
    "tied_unscaled": (
        T5ForConditionalGeneration,
        T5Config,
        {**V1_1, "feed_forward_proj": "gelu"},
        {"tie_word_embeddings": True, "scale_decoder_outputs": False},
    ),
}


def flash_name(name: str) -> str:
    """FlashT5's name of a stock parameter."""
    stack, *rest = name.split(".")
    if stack not in ("encoder", "decoder") or rest[0] != "block":
        return name
    kinds = ["self_attention_layer", "cross_attention_layer", "ff_layer"]
    kind = kinds[int(rest[3])] if stack == "decoder" else kinds[int(rest[3]) * 2]
    inner = ".".join(rest[4:]).replace("SelfAttention", "self_attention").replace("EncDecAttention", "cross_attention")
    inner = re.sub(r"attention\.([qkv])\.", r"attention.W\1.", inner)
    inner = inner.replace("DenseReluDense.wi", "act.wi").replace("DenseReluDense.", "")
    inner = inner.replace("relative_attention_bias", "pe_encoding.relative_attention_bias")
    return f"{stack}.block.{rest[1]}.{kind}.{inner}"


def randomise(model: nn.Module) -> None:
    """Weights under which every part of the model matters to its output."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layer_norm" in name:
                weight.normal_(1.0, 0.2)
            elif "relative_attention_bias" in name or "shared" in name:
                weight.normal_()
            else:
                weight.normal_(0.0, 1.2 * weight.shape[1] ** -0.5)


def build_stock(family: str, **overrides):
    """A stock model of the family, with a separate random head if the family is untied."""
    cls, config_cls, fields, ours = FAMILIES[family]
    config = config_cls(**{**SHAPE, **fields, **overrides}, attn_implementation="eager")
    model = cls(config).eval()
    model.lm_head.weight = model.shared.weight
    if not ours.get("tie_word_embeddings", fields["tie_word_embeddings"]):
        model.lm_head.weight = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
    if family == "umt5":
        model.config.tie_word_embeddings = False  # stock would scale the logits, which umT5 was not trained with
    randomise(model)
    return model


def build_flash(family: str, stock: nn.Module, attn_implementation: str = "sdpa", **overrides):
    """FlashT5 with the weights of the stock model."""
    _, _, fields, ours = FAMILIES[family]
    config = FlashT5Config(**{**SHAPE, **fields, **ours, **overrides}, attn_implementation=attn_implementation)
    model = FlashT5ForConditionalGeneration(config).eval()
    weights = {flash_name(name): weight for name, weight in stock.state_dict().items() if "embed_tokens" not in name}
    model.load_state_dict(weights, strict=True)
    return model


def build_pair(family: str, attn_implementation: str = "sdpa", **overrides):
    """Stock and FlashT5, equal weights."""
    stock = build_stock(family, **overrides)
    return stock, build_flash(family, stock, attn_implementation, **overrides)


def batch(padding: str, encoder_length: int = 37, decoder_length: int = 23, rows: int = 3) -> dict[str, torch.Tensor]:
    """Random tokens, padded on one side by different amounts: `none`, `right` or `left`."""
    inputs = {
        "input_ids": torch.randint(2, 99, (rows, encoder_length)),
        "attention_mask": torch.ones(rows, encoder_length, dtype=torch.long),
        "decoder_input_ids": torch.randint(2, 99, (rows, decoder_length)),
        "decoder_attention_mask": torch.ones(rows, decoder_length, dtype=torch.long),
        "labels": torch.randint(2, 99, (rows, decoder_length)),
    }
    for row in range(rows if padding != "none" else 0):
        for name, pad in (("input_ids", 7 * row), ("decoder_input_ids", 5 * row)):
            where = slice(inputs[name].shape[1] - pad, None) if padding == "right" else slice(0, pad)
            inputs[name][row, where] = 0
            inputs[name.replace("input_ids", "attention_mask")][row, where] = 0
            if name == "decoder_input_ids":
                inputs["labels"][row, where] = -100
    return inputs


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a fraction of the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def gradient_scale(name, weights):
    """Largest entry of a weight's gradient; of its module's for a scalar, which sums scores that nearly cancel."""
    beside = [name] if weights[name].ndim else [other for other in weights if other.startswith(name.rpartition(".")[0])]
    return max(weights[other].grad.abs().max() for other in beside if weights[other].requires_grad)
