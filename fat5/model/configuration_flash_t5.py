"""Configuration of FlashT5, for every member of the T5 family."""

import copy
import os
from typing import Any

from transformers import PretrainedConfig
from transformers.activations import ACT2FN

AUTO_MAP = {
    "AutoConfig": "configuration_flash_t5.FlashT5Config",
    "AutoModel": "modeling_flash_t5.FlashT5Model",
    "AutoModelForSeq2SeqLM": "modeling_flash_t5.FlashT5ForConditionalGeneration",
    "AutoModelForTextEncoding": "modeling_flash_t5.FlashT5EncoderModel",
    "AutoModelForSequenceClassification": "modeling_flash_t5.FlashT5ForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_flash_t5.FlashT5ForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_flash_t5.FlashT5ForQuestionAnswering",
}
"""Which class each auto-class loads: written to the `config.json` of every saved model."""

ENCODER_AUTO_MAP = {name: cls for name, cls in AUTO_MAP.items() if name != "AutoModelForSeq2SeqLM"}
ENCODER_AUTO_MAP["AutoModel"] = AUTO_MAP["AutoModelForTextEncoding"]
"""The same where only an encoder is saved: `AutoModel`, which many libraries ask for, is that encoder."""


class FlashT5Config(PretrainedConfig):
    """Shape and conventions of a FlashT5 model.

    The names and defaults are those of `transformers.T5Config`, plus what T5 variants differ in:

    Args:
        relative_attention_per_layer: every layer has its own table of position biases (umT5); otherwise the
            first layer of each stack owns one table that the whole stack shares (T5, mT5, ByT5).
        position_encoding_type: "t5" (relative position buckets), "ALiBi", "RoPE", "FIRE", or "none", of self-attention:
            cross-attention has no positions.
        alibi_mode: "symmetric", all heads look both ways, or "asymmetric", half of them back and half ahead.
        rotary_emb_fraction: part of each head's dimensions that RoPE turns.
        rotary_base: the longest wavelength of RoPE is about `2 pi rotary_base` tokens.
        rotary_interleaved: RoPE turns neighbouring dimensions as pairs; otherwise one of each half.
        rotary_scale_base: the length of xPos' scaling, in tokens; None for RoPE without it.
        fire_mlp_width: width of FIRE's hidden layer. Its L starts as `relative_attention_max_distance`.
        use_randomized_position_encoding: in training, positions are drawn anew in every call: as many as there are
            tokens, in order, out of `max_sequence_length` (Ruoss et al. 2023, arXiv:2305.16843). Otherwise, and in
            evaluation, they are 0, 1, 2, ...
        max_sequence_length: how many positions there are to draw from. It limits nothing else.
        attention_scale: factor on QK^T. T5 uses 1.0. None means `num_heads**-0.5`, as in the published FAT5 files.
        feed_forward_proj: "relu", "gated-gelu", "gated-silu", or any `{act}` / `gated-{act}` that transformers knows.
            As in T5, "gated-gelu" means the tanh approximation of GELU.
        tie_word_embeddings: True exactly when `lm_head` is the input embedding (T5 v1.0).
        scale_decoder_outputs: multiply the decoder's output by `d_model**-0.5` before the head. None: as T5 v1.0
            and v1.1 do, that is when the head is tied.
        decoder_start_token_id: None means the padding token, as in T5.
        residual_in_fp32: keep the residual stream in fp32 in a model in 16 bits. None: wherever no gradient is
            recorded, which brings the encoder's output nearer to fp32; training keeps its memory.
        classifier_dropout: dropout in the heads for classification.
        head_reads_decoder: the heads for sequence classification and question answering read the decoder's output, as
            in stock T5; otherwise the encoder's, as in the published FAT5.

    The published FAT5 configurations are read too: `use_glu_mlp` and `use_gelu_act`, where present, replace
    `feed_forward_proj`; a negative `pad_token_id` becomes `decoder_start_token_id`; `is_encoder_decoder: false` is
    ignored, since the architecture has both stacks (`FlashT5EncoderModel` just does not build the second).

    Raises:
        ValueError: if a field has a value that no model can be built from.
    """

    model_type = "flash_t5"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012 (transformers reads and copies it as a plain dict)
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    }

    def __init__(
        self,
        vocab_size: int = 32128,
        d_model: int = 512,
        d_kv: int = 64,
        d_ff: int = 2048,
        num_layers: int = 6,
        num_decoder_layers: int | None = None,
        num_heads: int = 8,
        relative_attention_num_buckets: int = 32,
        relative_attention_max_distance: int = 128,
        relative_attention_per_layer: bool = False,
        position_encoding_type: str | None = "t5",
        alibi_mode: str = "symmetric",
        rotary_emb_fraction: float = 1.0,
        rotary_base: float = 10000,
        rotary_interleaved: bool = False,
        rotary_scale_base: float | None = None,
        fire_mlp_width: int = 32,
        use_randomized_position_encoding: bool = False,
        max_sequence_length: int = 1024,
        attention_scale: float | None = 1.0,
        feed_forward_proj: str = "relu",
        dropout_rate: float = 0.1,
        layer_norm_epsilon: float = 1e-6,
        initializer_factor: float = 1.0,
        tie_word_embeddings: bool = True,
        scale_decoder_outputs: bool | None = None,
        pad_token_id: int | None = 0,
        eos_token_id: int | list[int] | None = 1,
        bos_token_id: int | None = None,
        decoder_start_token_id: int | None = None,
        is_encoder_decoder: bool = True,
        use_cache: bool = True,
        classifier_dropout: float = 0.0,
        residual_in_fp32: bool | None = None,
        head_reads_decoder: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.d_model = d_model
        self.d_kv = d_kv
        self.d_ff = d_ff
        self.num_layers = num_layers
        self.num_decoder_layers = num_layers if num_decoder_layers is None else num_decoder_layers
        self.num_heads = num_heads
        self.relative_attention_num_buckets = relative_attention_num_buckets
        self.relative_attention_max_distance = relative_attention_max_distance
        self.relative_attention_per_layer = relative_attention_per_layer
        self.position_encoding_type = _POSITIONS.get(str(position_encoding_type).lower(), position_encoding_type)
        self.alibi_mode = {"symetric": "symmetric", "asymetric": "asymmetric"}.get(alibi_mode, alibi_mode)
        self.rotary_emb_fraction = rotary_emb_fraction
        self.rotary_base = rotary_base
        self.rotary_interleaved = rotary_interleaved
        self.rotary_scale_base = rotary_scale_base
        self.fire_mlp_width = fire_mlp_width
        self.use_randomized_position_encoding = use_randomized_position_encoding
        self.max_sequence_length = max_sequence_length
        self.attention_scale = attention_scale
        self.feed_forward_proj = _published_feed_forward_proj(kwargs) or feed_forward_proj
        self.dropout_rate = dropout_rate
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_factor = initializer_factor
        self.scale_decoder_outputs = tie_word_embeddings if scale_decoder_outputs is None else scale_decoder_outputs
        self.use_cache = use_cache
        self.classifier_dropout = classifier_dropout
        self.residual_in_fp32 = residual_in_fp32
        self.head_reads_decoder = head_reads_decoder
        self._validate_fields()

        if pad_token_id is not None and pad_token_id < 0:
            pad_token_id = 0 if decoder_start_token_id is None else decoder_start_token_id
        if decoder_start_token_id is None:
            decoder_start_token_id = pad_token_id
        for derived in ("is_gated_act", "dense_act_fn"):  # stock T5 writes them, from feed_forward_proj
            kwargs.pop(derived, None)
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        shared_fields: dict[str, Any] = {
            "pad_token_id": pad_token_id,
            "eos_token_id": eos_token_id,
            "bos_token_id": bos_token_id,
            "decoder_start_token_id": decoder_start_token_id,
            "tie_word_embeddings": tie_word_embeddings,
            "is_encoder_decoder": True,
        }
        super().__init__(**shared_fields, **kwargs)

    @property
    def is_gated_act(self) -> bool:
        """Whether the feed-forward layer is a gated linear unit."""
        return self.feed_forward_proj.startswith("gated-")

    @property
    def dense_act_fn(self) -> str:
        """Name of the activation in `transformers.activations.ACT2FN`."""
        if self.feed_forward_proj == "gated-gelu":
            return "gelu_new"
        return self.feed_forward_proj.removeprefix("gated-")

    @property
    def softmax_scale(self) -> float:
        """The factor on QK^T that `attention_scale` stands for."""
        return self.num_heads**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def rotary_size(self) -> int:
        """How many of a head's dimensions RoPE turns."""
        return int(self.d_kv * self.rotary_emb_fraction)

    @property
    def has_dense_bias(self) -> bool:
        """Whether the position bias is no function of the distance and head alone that the kernels know."""
        asymmetric = self.position_encoding_type == "ALiBi" and self.alibi_mode == "asymmetric"
        return asymmetric or self.position_encoding_type == "FIRE"

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> "FlashT5Config":
        """The configuration seen from one stack: as the decoder's, `num_hidden_layers` counts the decoder's layers.

        `generate` sizes its caches by it, which matters when the two stacks differ in depth.
        """
        if not decoder or encoder:
            return self
        config = copy.copy(self)
        config.num_layers = self.num_decoder_layers
        return config

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `config.json` with the full `auto_map`, whichever way the model's class was found."""
        encoder_alone = self.architectures == ["FlashT5EncoderModel"]
        self.auto_map = dict(ENCODER_AUTO_MAP if encoder_alone else AUTO_MAP)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def _validate_fields(self) -> None:
        counts = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads")
        for name in (*counts, "fire_mlp_width", "max_sequence_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
        for name in ("dropout_rate", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 0 and below 1, got {getattr(self, name)!r}.")
        for name in ("layer_norm_epsilon", "initializer_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)!r}.")
        if self.attention_scale is not None and not self.attention_scale > 0:
            raise ValueError(f"`attention_scale` must be positive or null, got {self.attention_scale!r}.")
        self._validate_positions()
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if not (buckets >= 4 and distance > buckets // 2):
            raise ValueError(
                "`relative_attention_num_buckets` must be at least 4 and `relative_attention_max_distance` above half "
                f"of it, got {buckets!r} and {distance!r}."
            )
        if self.dense_act_fn not in ACT2FN:
            raise ValueError(
                f"`feed_forward_proj` {self.feed_forward_proj!r} is unknown: give an activation of transformers, "
                "such as 'relu' or 'silu', or one with a gate, such as 'gated-gelu'."
            )

    def _validate_positions(self) -> None:
        if self.position_encoding_type not in _POSITIONS.values():
            raise ValueError(
                f"`position_encoding_type` {self.position_encoding_type!r} is unknown: give one of "
                f"{', '.join(_POSITIONS.values())}."
            )
        if self.alibi_mode not in ("symmetric", "asymmetric"):
            raise ValueError(f"`alibi_mode` must be 'symmetric' or 'asymmetric', got {self.alibi_mode!r}.")
        if self.position_encoding_type == "ALiBi" and self.alibi_mode == "asymmetric" and self.num_heads % 2:
            raise ValueError(f"`alibi_mode` 'asymmetric' needs an even `num_heads`, got {self.num_heads}.")
        for name in ("rotary_base", "rotary_scale_base"):
            value = getattr(self, name)
            if not (value is None and name == "rotary_scale_base") and not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value!r}.")
        if not 0 < self.rotary_emb_fraction <= 1:
            raise ValueError(f"`rotary_emb_fraction` must be above 0 and at most 1, got {self.rotary_emb_fraction!r}.")
        if self.position_encoding_type == "RoPE" and (self.rotary_size < 2 or self.rotary_size % 2):
            raise ValueError(
                f"`rotary_emb_fraction` {self.rotary_emb_fraction!r} of `d_kv` {self.d_kv} is {self.rotary_size} "
                "dimensions: RoPE turns an even number of them."
            )


_POSITIONS = {name.lower(): name for name in ("t5", "ALiBi", "RoPE", "FIRE", "none")}


def _published_feed_forward_proj(fields: dict[str, Any]) -> str | None:
    """The feed-forward layer that the published FAT5 fields name (and remove them), or None without them.

    The published model builds `gelu` as its tanh approximation, gated or not.
    Source: https://github.com/catie-aq/flashT5 (`FlashT5LayerFF`), Apache-2.0.
    """
    if "use_glu_mlp" not in fields and "use_gelu_act" not in fields:
        return None
    gated = fields.pop("use_glu_mlp", False)
    gelu = fields.pop("use_gelu_act", True)
    if gated:
        return "gated-gelu" if gelu else "gated-relu"
    return "gelu_new" if gelu else "relu"


FlashT5Config.register_for_auto_class()
