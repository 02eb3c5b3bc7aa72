"""The stock `transformers` model that a FAT5 model corresponds to: its class, its config, and its weights as a mapping.

It is run by streaming where it is too large for memory, or where stock cannot read the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import (
    MT5Config,
    MT5EncoderModel,
    MT5ForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5EncoderModel,
    UMT5ForConditionalGeneration,
)

from fat5.model import FlashT5Config
from fat5convert.precision import Form
from fat5convert.recognise import Recognised
from fat5convert.source import Checkpoint
from fat5convert.streaming import streamed

STOCK_CLASSES: dict[str, type[PreTrainedModel]] = {
    "t5": T5ForConditionalGeneration,
    "mt5": MT5ForConditionalGeneration,
    "umt5": UMT5ForConditionalGeneration,
}
STOCK_ENCODERS: dict[str, type[PreTrainedModel]] = {
    "t5": T5EncoderModel,
    "mt5": MT5EncoderModel,
    "umt5": UMT5EncoderModel,
}
_CONFIG_CLASSES: dict[str, type[PreTrainedConfig]] = {"t5": T5Config, "mt5": MT5Config, "umt5": UMT5Config}

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


def stock_class(model_type: str, encoder_only: bool) -> type[PreTrainedModel]:
    """The model class of stock `transformers`."""
    return (STOCK_ENCODERS if encoder_only else STOCK_CLASSES)[model_type]


def stock_config(config: FlashT5Config, model_type: str, tied: bool, encoder_only: bool) -> dict[str, Any]:
    """The fields of a stock `config.json`, in the words that `transformers` 4 and 5 both read.

    Args:
        config: of the FAT5 model.
        model_type: of the stock model.
        tied: whether the head is the embedding.
        encoder_only: whether there is no decoder.
    """
    scaled = bool(config.scale_decoder_outputs)
    fields: dict[str, Any] = {name: getattr(config, name) for name in _SHARED_FIELDS}
    fields |= {
        "architectures": [stock_class(model_type, encoder_only).__name__],
        "model_type": model_type,
        "is_encoder_decoder": not encoder_only,
        # Transformers 4 reads "tied and scaled" or "neither" from this; 5 reads the scale from its own key, and
        # finds out about tying from the file.
        "tie_word_embeddings": tied and scaled,
    }
    if model_type == "t5":
        fields["scale_decoder_outputs"] = scaled
    return fields


class Weights(Mapping[str, torch.Tensor]):
    """Weights in fp32 by the names of the stock model, read when asked for.

    Args:
        checkpoint: the source.
        recognised: which tensor is which.
        forms: what each becomes (by FAT5 name): then these are the fp32 values that the results stand for.
    """

    def __init__(self, checkpoint: Checkpoint, recognised: Recognised, forms: Mapping[str, Form] | None = None) -> None:
        self._checkpoint, self._forms = checkpoint, forms
        self._pairs = {pair.t5: pair for pair in recognised.pairs}
        shared = self._pairs["shared.weight"]
        for alias in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
            self._pairs.setdefault(alias, shared)
        # Stock has no scale of its own: the queries take it on, up to rounding.
        self._scale = recognised.config["attention_scale"]

    def __getitem__(self, name: str) -> torch.Tensor:
        pair = self._pairs[name]
        values = self._checkpoint.load(pair.source)
        if self._forms is not None:
            form = self._forms[pair.fat5]
            values = form.undo(form.apply(values))
        values = values.float()
        return values * self._scale if name.endswith("Attention.q.weight") and self._scale != 1.0 else values

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)


def streamed_stock(recognised: Recognised, weights: Mapping[str, torch.Tensor]) -> Any:
    """The stock model of a checkpoint, whose layers fetch their weights as they are called."""
    layout = recognised.layout
    config = FlashT5Config(**recognised.config)
    fields = stock_config(config, recognised.model_type, layout.tied, layout.encoder_only)
    stock = _CONFIG_CLASSES[recognised.model_type].from_dict(fields)
    return streamed(stock_class(recognised.model_type, layout.encoder_only), stock, weights, "eager", torch.float32)
