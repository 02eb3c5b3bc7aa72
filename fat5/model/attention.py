"""Attention of FlashT5: implementations that need a matrix, and the module that calls one of them or the kernels."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import EncoderDecoderCache

from .attention_layout import host_may_look
from .attention_mask import AttentionMask
from .configuration_flash_t5 import FlashT5Config
from .flash_attention import FLASH_ATTENTION, flash_attention
from .fused_attention import fused_attention
from .fused_linear import linear, project
from .norm_flash_t5 import NormedSum
from .ops_cache import append_serves, append_to_cache
from .ops_decode_attention import decode_attention, decode_attention_serves
from .ops_operator import is_watched
from .position_alibi import AlibiPositionBias
from .position_bias import build_position_bias, kernel_bias
from .position_encoding import RelativePositionBias
from .position_fire import FirePositionBias


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
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if bias is not None:  # in fp16 the sum with a mask would be infinite, and the gradient of a masked row NaN
        scores = scores + bias
    weights = F.softmax(scores, dim=-1).to(query.dtype)
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


ATTENTION_FUNCTIONS = {
    "eager": eager_attention,
    "sdpa": sdpa_attention,
    "fat5": sdpa_attention,
    FLASH_ATTENTION: sdpa_attention,
}
"""What runs when there is no kernel for a device, or none for a mask."""


class FlashT5Attention(nn.Module):
    """Multi-head attention, over its own input or over an encoder's output.

    Args:
        config: the model's configuration.
        layer_idx: index of the layer in its stack, which is its index in the cache.
        is_decoder: the position bias looks backward only.
        has_position_bias: the layer owns the position bias, if the model has one.
    """

    def __init__(self, config: FlashT5Config, layer_idx: int, is_decoder: bool, has_position_bias: bool) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads, self.head_dim, self.scale = config.num_heads, config.d_kv, config.softmax_scale
        inner_dim = config.num_heads * config.d_kv
        self.Wq = nn.Linear(config.d_model, inner_dim, bias=False)
        self.Wk = nn.Linear(config.d_model, inner_dim, bias=False)
        self.Wv = nn.Linear(config.d_model, inner_dim, bias=False)
        self.o = nn.Linear(inner_dim, config.d_model, bias=False)
        self.Wq.init_std = (config.d_model * config.d_kv) ** -0.5
        self.Wk.init_std = self.Wv.init_std = config.d_model**-0.5
        self.o.init_std = inner_dim**-0.5
        self.pe_encoding = build_position_bias(config, bidirectional=not is_decoder) if has_position_bias else None

    def forward(
        self,
        hidden_states: torch.Tensor | NormedSum,
        mask: AttentionMask,
        bias: torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Attend, and hand on the bias for the next layer to share.

        Args:
            hidden_states: `[B, Lq, D]`, or `[1, Tq, D]` in a packed stack, normalised or about to be.
            mask: who may attend to whom, prepared.
            bias: what an earlier layer handed on; None to begin here.
            key_value_states: `[B, Lk, D]` or `[1, Tk, D]` for cross-attention.
            past_key_values: cache to extend, or, for cross-attention, to fill once and reuse.
            output_attentions: return the weights, which only the eager implementation can.

        Returns:
            Output, shaped as `hidden_states`; the bias: for the kernels T5's table `[num_buckets, H]` or ALiBi's slopes
            `[H]`, else `[B|1, H|1, Lq|1, Lk]`, or None; weights `[B, H, Lq, Lk]` or None.
        """
        query, key, value = self._project(hidden_states, mask, key_value_states, past_key_values)
        weights = None
        dropout = self.config.dropout_rate if self.training else 0.0
        if mask.layout is not None:
            if bias is None:
                bias = self._kernel_operand(mask, query.dtype)
            its_bias = kernel_bias(self.config, bias, mask.causal)
            if self.config._attn_implementation == FLASH_ATTENTION:
                output = flash_attention(query, key, value, its_bias, mask.layout, mask.causal, self.scale, dropout)
            else:
                output = fused_attention(query, key, value, its_bias, mask, self.scale, dropout)
        else:
            if bias is None:
                bias = mask.additive(self._dense_bias(mask), query.dtype)
            implementation = "eager" if output_attentions else mask.implementation
            # which takes the least finite number for a hidden key; the user's own floats hide none, as in stock T5
            may_hide = mask.matrix is None or mask.matrix.dtype == torch.bool
            if implementation == "fat5" and dropout == 0 and may_hide and decode_attention_serves(query, key, bias):
                output = decode_attention(query, key, value, bias, self.scale)
            else:
                output, weights = ATTENTION_FUNCTIONS[implementation](query, key, value, bias, self.scale, dropout)
                if mask.visible is not None:
                    output = torch.where(mask.visible.to(output.device), output, 0.0)
        output = output.transpose(1, 2).flatten(2)
        output = linear(self.o, output if mask.rows is None else mask.rows.pack(output))
        return output, bias, weights

    def _dense_bias(self, mask: AttentionMask) -> torch.Tensor | None:
        """`[B|1, H, Lq, Lk]`, or None in a layer that owns no bias."""
        if self.pe_encoding is None:
            return None
        if isinstance(self.pe_encoding, FirePositionBias):
            return self.pe_encoding(*mask.places())
        # not with a gradient, which cannot keep buckets made without, nor where what is made now is no lasting tensor
        lasting = not (torch.is_grad_enabled() or is_watched()) and host_may_look(mask.device)
        if lasting and mask.is_last_row and isinstance(self.pe_encoding, RelativePositionBias):
            return self.pe_encoding.last_row(mask.key_length, mask.device)
        return self.pe_encoding(*mask.encoded_positions())

    def _kernel_operand(self, mask: AttentionMask, dtype: torch.dtype) -> torch.Tensor | None:
        """The bias as the kernels begin with it: T5's table, ALiBi's slopes, or a dense bias in `dtype`."""
        if self.pe_encoding is None:
            return None
        if mask.dense_bias or isinstance(self.pe_encoding, FirePositionBias):
            dense = self._dense_bias(mask)
            return None if dense is None else dense.to(dtype)
        if isinstance(self.pe_encoding, AlibiPositionBias):
            return self.pe_encoding.slopes(mask.device)
        return self.pe_encoding.table()

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """`[B, L, H * Dk]` to `[B, H, L, Dk]`."""
        return states.view(*states.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)

    def _project(
        self,
        hidden_states: torch.Tensor | NormedSum,
        mask: AttentionMask,
        key_value_states: torch.Tensor | None,
        past_key_values: EncoderDecoderCache | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries `[B, H, Lq, Dk]`, keys and values `[B, H, Lk, Dk]`, or packed as the stack is, rotated if need be.

        Of a packed stack they are in rows if the mask says so, with zeros where there is no real token.
        """
        if key_value_states is None:
            states = project(hidden_states, (self.Wq, self.Wk, self.Wv))
        elif past_key_values is not None and past_key_values.is_updated.get(self.layer_idx):
            cached: Any = past_key_values.cross_attention_cache.layers[self.layer_idx]
            return self._split_heads(project(hidden_states, (self.Wq,))[0]), cached.keys, cached.values
        else:
            states = [*project(hidden_states, (self.Wq,)), *project(key_value_states, (self.Wk, self.Wv))]
        query, key, value = map(self._split_heads, states)
        if mask.rows is not None:
            query, key, value = (mask.rows.scatter(x.squeeze(0).transpose(0, 1)) for x in (query, key, value))
        if mask.rotary is not None:
            query, key = mask.rotary.rotate_query(query), mask.rotary.rotate_key(key)
        if past_key_values is not None:
            key, value = self._extend_cache(key, value, mask, key_value_states is not None, past_key_values)
        return query, key, value

    def _extend_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: AttentionMask,
        is_cross_attention: bool,
        past_key_values: EncoderDecoderCache,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values `[B, H, Lk, Dk]` there are then, or packed as the stack is.

        What is cached is never packed: beams reorder its rows, and later queries come row by row.
        """
        layout = mask.layout
        if layout is not None and layout.of_stack and layout.keys is not None:  # a prompt: the cache is still empty
            keys, values = (layout.keys.scatter(x[0].transpose(0, 1)) for x in (key, value))
            if is_cross_attention:
                past_key_values.is_updated[self.layer_idx] = True
                past_key_values.cross_attention_cache.update(keys, values, self.layer_idx)
            else:
                past_key_values.self_attention_cache.update(keys, values, self.layer_idx)
            return key, value
        if is_cross_attention:
            past_key_values.is_updated[self.layer_idx] = True
            return past_key_values.cross_attention_cache.update(key, value, self.layer_idx)
        cache, offset = past_key_values.self_attention_cache, mask.query_offset
        if not isinstance(offset, torch.Tensor):
            return cache.update(key, value, self.layer_idx)
        if append_serves(cache, self.layer_idx, key, value):
            return append_to_cache(cache.layers[self.layer_idx], key, value, offset)
        # a static cache of transformers 4 takes the positions from here, others keep count themselves
        return cache.update(key, value, self.layer_idx, {"cache_position": mask.query_positions})
