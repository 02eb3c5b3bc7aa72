"""Attention of FlashT5: who may attend to whom, the implementations, and the module that calls one of them."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import EncoderDecoderCache

from .configuration_flash_t5 import FlashT5Config
from .position_encoding import RelativePositionBias


@dataclass(eq=False)
class AttentionMask:
    """Who may attend to whom, described without a matrix. One per stack and kind of attention.

    Attributes:
        query_length, key_length: Lq and Lk. Keys include those of the cache.
        device: where dense forms are built.
        query_offset: position of the first query: the number of cached tokens, an int, or an int64 scalar tensor
            when the cache is static.
        causal: no query may attend to a later position.
        key_mask: bool `[B, Lk]`, True for real keys; None when all are real.
        query_segments, key_segments: ints `[B, Lq]` and `[B, Lk]`, 0 for padding; a query attends only to keys
            of its own segment. Both or neither.
        allowed: bool `[B|1, 1, Lq|1, Lk]`, True where attention is allowed; None when it is everywhere.
        visible: bool `[B|1, 1, Lq|1, 1]`, False for queries that may attend to nothing; None when there are none.
            These two are for implementations that need a matrix, and are filled by `build_dense`.
    """

    query_length: int
    key_length: int
    device: torch.device
    query_offset: int | torch.Tensor = 0
    causal: bool = False
    key_mask: torch.Tensor | None = None
    query_segments: torch.Tensor | None = None
    key_segments: torch.Tensor | None = None
    allowed: torch.Tensor | None = field(default=None, init=False)
    visible: torch.Tensor | None = field(default=None, init=False)

    @property
    def query_positions(self) -> torch.Tensor:
        """int64 `[Lq]`."""
        return torch.arange(self.query_length, device=self.device) + self.query_offset

    @property
    def key_positions(self) -> torch.Tensor:
        """int64 `[Lk]`."""
        return torch.arange(self.key_length, device=self.device)

    def build_dense(self) -> "AttentionMask":
        """Fill `allowed` and `visible`, and return the mask itself. Called once per stack, not by every layer."""
        allowed = None
        static_offset = isinstance(self.query_offset, torch.Tensor)
        if self.causal and (static_offset or self.key_length > self.query_offset + 1):
            allowed = (self.key_positions[None, :] <= self.query_positions[:, None])[None, None]
        if self.key_mask is not None:
            real = self.key_mask[:, None, None, :].to(self.device)
            allowed = real if allowed is None else allowed & real
        if self.query_segments is not None and self.key_segments is not None:
            queries = self.query_segments[:, None, :, None].to(self.device)
            keys = self.key_segments[:, None, None, :].to(self.device)
            same = (queries == keys) & (keys != 0)
            allowed = same if allowed is None else allowed & same
        self.allowed = allowed
        if allowed is not None and (self.key_mask is not None or self.query_segments is not None):
            self.visible = allowed.any(dim=-1, keepdim=True)
        return self

    def additive(self, table: RelativePositionBias | None, dtype: torch.dtype) -> torch.Tensor | None:
        """Dense bias with the mask written into it, `[B|1, H|1, Lq|1, Lk]` in `dtype`; None when there is neither.

        Masked entries hold the most negative finite value, so that a row without any key gives no NaN.
        """
        bias = None if table is None else table(self.query_positions, self.key_positions).to(dtype)
        if self.allowed is None:
            return bias
        masked = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=self.device)
        return torch.where(self.allowed, torch.zeros_like(masked) if bias is None else bias, masked)


def eager_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention as the formula reads, softmax in fp32 or better.

    Args:
        query, key, value: `[B, H, Lq, Dk]`, `[B, H, Lk, Dk]`, `[B, H, Lk, Dk]`, one floating dtype.
        bias: added to the scores, broadcastable to `[B, H, Lq, Lk]`.
        scale: factor on QK^T.
        dropout: probability of dropping an attention weight; 0 outside training.

    Returns:
        Output `[B, H, Lq, Dk]` and weights `[B, H, Lq, Lk]` in the dtype of the inputs.
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if bias is not None:
        scores = scores + bias
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=dropout > 0)
    return torch.matmul(weights, value), weights


def sdpa_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Same as `eager_attention` by torch's fused attention, which returns no weights."""
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scale)
    return output, None


ATTENTION_FUNCTIONS = {"eager": eager_attention, "sdpa": sdpa_attention}


class FlashT5Attention(nn.Module):
    """Multi-head attention, over its own input or over an encoder's output.

    Args:
        config: the model's configuration.
        layer_idx: index of the layer in its stack, which is its index in the cache.
        is_decoder: the position bias looks backward only.
        has_position_bias: the layer owns a table of position biases.
    """

    def __init__(self, config: FlashT5Config, layer_idx: int, is_decoder: bool, has_position_bias: bool) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        inner_dim = config.num_heads * config.d_kv
        self.Wq = nn.Linear(config.d_model, inner_dim, bias=False)
        self.Wk = nn.Linear(config.d_model, inner_dim, bias=False)
        self.Wv = nn.Linear(config.d_model, inner_dim, bias=False)
        self.o = nn.Linear(inner_dim, config.d_model, bias=False)
        self.Wq.init_std = (config.d_model * config.d_kv) ** -0.5
        self.Wk.init_std = self.Wv.init_std = config.d_model**-0.5
        self.o.init_std = inner_dim**-0.5
        self.pe_encoding = None
        if has_position_bias:
            self.pe_encoding = RelativePositionBias(
                config.relative_attention_num_buckets,
                config.relative_attention_max_distance,
                config.num_heads,
                bidirectional=not is_decoder,
            )
            self.pe_encoding.relative_attention_bias.init_std = config.d_model**-0.5

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: AttentionMask,
        bias: torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Attend, and hand on the dense bias for the next layer to share.

        Args:
            hidden_states: `[B, Lq, D]`.
            mask: who may attend to whom.
            bias: what an earlier layer handed on; None to build it here.
            key_value_states: `[B, Lk, D]` for cross-attention.
            past_key_values: cache to extend, or, for cross-attention, to fill once and reuse.
            output_attentions: return the weights, which only the eager implementation can.

        Returns:
            Output `[B, Lq, D]`, bias `[B|1, H|1, Lq|1, Lk]` or None, weights `[B, H, Lq, Lk]` or None.
        """
        query = self._split_heads(self.Wq(hidden_states))
        key, value = self._keys_and_values(hidden_states, mask, key_value_states, past_key_values)
        if bias is None:
            bias = mask.additive(self.pe_encoding, query.dtype)
        attention = ATTENTION_FUNCTIONS["eager" if output_attentions else self.config._attn_implementation]
        dropout = self.config.dropout_rate if self.training else 0.0
        output, weights = attention(query, key, value, bias, self.config.softmax_scale, dropout)
        if mask.visible is not None:
            output = torch.where(mask.visible.to(output.device), output, 0.0)
        output = self.o(output.transpose(1, 2).flatten(2))
        return output, bias, weights

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """`[B, L, H * Dk]` to `[B, H, L, Dk]`."""
        return states.unflatten(-1, (self.config.num_heads, self.config.d_kv)).transpose(1, 2)

    def _keys_and_values(
        self,
        hidden_states: torch.Tensor,
        mask: AttentionMask,
        key_value_states: torch.Tensor | None,
        past_key_values: EncoderDecoderCache | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[B, H, Lk, Dk]`, through the cache if there is one."""
        is_cross_attention = key_value_states is not None
        if past_key_values is not None and is_cross_attention and past_key_values.is_updated.get(self.layer_idx):
            cached: Any = past_key_values.cross_attention_cache.layers[self.layer_idx]
            return cached.keys, cached.values
        states = hidden_states if key_value_states is None else key_value_states
        key, value = self._split_heads(self.Wk(states)), self._split_heads(self.Wv(states))
        if past_key_values is None:
            return key, value
        if is_cross_attention:
            past_key_values.is_updated[self.layer_idx] = True
            return past_key_values.cross_attention_cache.update(key, value, self.layer_idx)
        # transformers 4 takes the positions from here, 5 keeps count itself
        positions = {"cache_position": mask.query_positions}
        return past_key_values.self_attention_cache.update(key, value, self.layer_idx, positions)
