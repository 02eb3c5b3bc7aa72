"""The stock `transformers` model that a FAT5 model corresponds to: its class, its config, and its weights as a mapping.

It is run by streaming where it is too large for memory, or where stock cannot read the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from transformers import MT5Config, PretrainedConfig, PreTrainedModel, T5Config, UMT5Config

from fat5.model import FlashT5Config
from fat5convert.encoder_heads import ORACLES
from fat5convert.layout import Layout
from fat5convert.precision import Form
from fat5convert.published_bias import replace_bias
from fat5convert.recognise import Recognised
from fat5convert.source import Checkpoint
from fat5convert.streaming import attach_weights, without_weights

_CONFIG_CLASSES: dict[str, type[PretrainedConfig]] = {"t5": T5Config, "mt5": MT5Config, "umt5": UMT5Config}
_CLASS_PREFIXES = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5", "flash_t5": "FlashT5"}

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


def class_name(model_type: str, layout: Layout) -> str:
    """Name of the class that holds a model, of stock T5 or of FAT5 (`flash_t5`)."""
    task = layout.head.task if layout.head else "ConditionalGeneration"
    encoder = layout.encoder_only and layout.head is None
    return _CLASS_PREFIXES[model_type] + ("EncoderModel" if encoder else f"For{task}")


def stock_class(model_type: str, layout: Layout) -> type[PreTrainedModel]:
    """The model class of stock `transformers`."""
    found: type[PreTrainedModel] = getattr(transformers, class_name(model_type, layout))
    return found


def stock_config(config: FlashT5Config, model_type: str, layout: Layout) -> dict[str, Any]:
    """The fields of a stock `config.json`, in the words that `transformers` 4 and 5 both read.

    Args:
        config: of the FAT5 model.
        model_type: of the stock model.
        layout: which parts it has.
    """
    scaled = bool(config.scale_decoder_outputs)
    fields: dict[str, Any] = {name: getattr(config, name) for name in _SHARED_FIELDS}
    fields |= {
        "architectures": [class_name(model_type, layout)],
        "model_type": model_type,
        "is_encoder_decoder": not layout.encoder_only,
        # Transformers 4 reads "tied and scaled" or "neither" from this; 5 reads the scale from its own key, and
        # finds out about tying from the file.
        "tie_word_embeddings": layout.tied and scaled,
    }
    if model_type == "t5":
        fields["scale_decoder_outputs"] = scaled
    if layout.head:
        fields |= {name: getattr(config, name) for name in ("id2label", "label2id", "problem_type")}
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
        prefix = recognised.layout.stock_prefix
        shared = self._pairs[f"{prefix}shared.weight"]
        for alias in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
            self._pairs.setdefault(prefix + alias, shared)
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
    layout, model_type = recognised.layout, recognised.model_type
    fields = stock_config(FlashT5Config(**recognised.config), model_type, layout)
    config = _CONFIG_CLASSES[model_type].from_dict(fields)
    oracle_class: Any = stock_class(model_type, layout)
    if layout.head and not layout.head.is_stock:
        oracle_class = ORACLES[layout.head.task]
    model = without_weights(oracle_class, config, "eager", torch.float32)
    if layout.positions != "t5":
        with torch.device("meta"):
            replace_bias(model, recognised.config)
    return attach_weights(model, weights)
