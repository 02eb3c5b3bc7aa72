"""What decides which tensors a model has, and their shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fat5convert.heads import Head, Task

Where = Literal["always", "untied", "gated", "plain", "bias", "FIRE"] | Task
"""In which models, and layers of them, there is a tensor."""


@dataclass(frozen=True)
class Layout:
    """The sizes and choices of a model that decide which tensors it has, and their shapes."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    num_buckets: int
    gated: bool
    per_layer_bias: bool
    tied: bool = True
    encoder_only: bool = False
    positions: str = "t5"  # as FlashT5Config's position_encoding_type
    fire_mlp_width: int = 0
    head: Head | None = None  # other than the language model's
    num_labels: int = 0

    @property
    def inner_dim(self) -> int:
        """Width of the heads together; need not be d_model."""
        return self.num_heads * self.d_kv

    @property
    def is_language_model(self) -> bool:
        """Whether it generates text."""
        return not self.encoder_only and self.head is None

    @property
    def stock_prefix(self) -> str:
        """What stock files put before every name but those of the head."""
        return self.head.prefix if self.head else ""

    def has(self, where: Where, layer: int) -> bool:
        """Whether a model of this layout has the tensors of such a row in this layer."""
        if where == "bias":
            return self.positions == "t5" and (layer == 0 or self.per_layer_bias)
        if where == "FIRE":
            return self.positions == "FIRE" and layer == 0
        if where == "untied":
            return self.is_language_model and not self.tied
        if where == "gated":
            return self.gated
        if where == "plain":
            return not self.gated
        return where == "always" or (self.head is not None and self.head.task == where)
