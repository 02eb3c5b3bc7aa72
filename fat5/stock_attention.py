"""Attention modules that stand in for those of stock T5, mT5 and umT5, and the masks they take."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from .model.attention_mask import AttentionMask
from .model.fused_attention import fused_attention
from .model.ops_attention_bias import T5Bias
from .model.position_encoding import relative_position_bucket


def fused_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    *,
    config: Any,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **options: Any,
) -> AttentionMask | torch.Tensor | None:
    """The mask of a stack, as `transformers` asks for it once per call: a description, not a matrix.

    Args:
        batch_size: B, or what broadcasts to it.
        q_length, kv_length: Lq and Lk.
        q_offset, kv_offset: positions of the first query and of the first key.
        mask_function: `causal_mask_function`, `bidirectional_mask_function` or a combination of such.
        attention_mask: bool `[B, Lk]`, True for real keys; None when all are real.
        use_vmap: `mask_function` is the user's own.
        config: of the stack; bidirectional attention in a decoder is cross-attention.
        dtype: of the hidden states.
        device: of the hidden states.
        options: whatever else `sdpa_mask` takes.

    Returns:
        The description, prepared; a matrix `[B, 1, Lq, Lk]`, True where attention is allowed, for a static cache, whose
        masks `generate` handles as tensors, and for functions that are neither of the first two.
    """
    causal = mask_function is causal_mask_function
    described = (
        (causal or mask_function is bidirectional_mask_function)
        and not use_vmap
        and not isinstance(q_offset, torch.Tensor)
        and kv_offset == 0
        and (attention_mask is None or attention_mask.shape[1] == kv_length)
        and (not causal or kv_length == q_offset + q_length)
    )
    if not described:
        options.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        options.update(use_vmap=use_vmap, config=config, dtype=dtype, device=device, q_offset=q_offset)
        return sdpa_mask(
            batch_size, q_length, kv_length, kv_offset=kv_offset, mask_function=mask_function,
            attention_mask=attention_mask, **options,
        )  # fmt: skip
    mask = AttentionMask(
        query_length=q_length,
        key_length=kv_length,
        device=torch.device(device),
        query_offset=q_offset,
        causal=causal,
        cross=not causal and config.is_decoder,
        key_mask=attention_mask,
    )
    return mask.prepare(config._attn_implementation, dtype, config.d_kv)


class EnabledAttention(nn.Module):
    """Attention of one layer of a stock model, on the submodules of the module it stands for.

    It returns the position bias in the form of its mask: the table `[num_buckets, H]` for the kernels, otherwise
    `[B|1, H|1, Lq|1, Lk]` with the mask written into it, or None.
    """

    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    relative_attention_bias: nn.Module

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.replaced = (original,)  # in a tuple, lest its parameters count twice
        for name, module in original.named_children():
            self.add_module(name, module)
        self.train(original.training)
        config: Any = original.config
        self.config = config
        self.replaced_implementation: str = config._attn_implementation
        self.layer_idx: Any = original.layer_idx
        self.is_decoder: bool = config.is_decoder

    def original(self) -> nn.Module:
        """The module that this one stands for, with the submodules as they are now (wrapped by adapters, say)."""
        (original,) = self.replaced
        for name, module in self.named_children():
            setattr(original, name, module)
        original.training = self.training
        return original

    def attend(
        self,
        hidden_states: torch.Tensor,
        mask: AttentionMask | torch.Tensor | None,
        bias: torch.Tensor | None,
        key_value_states: torch.Tensor | None,
        past_key_values: Cache | None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend, and hand on the bias for the next layer to share.

        Args:
            hidden_states: `[B, Lq, D]`.
            mask: from `fused_mask`, or the user's own `[B, 1|H, Lq|1, Lk]`, bool or added to the scores; None for none.
            bias: what an earlier layer handed on.
            key_value_states: `[B, Lk, D]` for cross-attention.
            past_key_values: cache to extend, or, for cross-attention, to fill once and reuse.
            output_attentions: refused, because no kernel returns weights.

        Returns:
            Output `[B, Lq, D]` and the bias.

        Raises:
            ValueError: if attention weights are asked for, or the model was set to another implementation.
        """
        if self.config._attn_implementation != "fat5":
            raise ValueError(
                f"This model attends by fat5, and was then set to {self.config._attn_implementation!r}: call "
                "`fat5.disable(model)` before another implementation."
            )
        if output_attentions:
            raise ValueError("The kernels return no attention weights: call `fat5.disable(model)` and use 'eager'.")
        offset = 0 if past_key_values is None else past_key_values.get_seq_length(self.layer_idx)
        if isinstance(offset, torch.Tensor):
            offset = offset.clone()  # the cache counts on in place
        query = self._split_heads(self.q(hidden_states))
        key, value = self._keys_and_values(hidden_states, key_value_states, past_key_values)
        dropout = self.config.dropout_rate if self.training else 0.0
        if isinstance(mask, AttentionMask) and mask.layout is not None:
            if bias is None and hasattr(self, "relative_attention_bias"):
                embedding = self.relative_attention_bias
                bias = embedding(torch.arange(self.config.relative_attention_num_buckets, device=query.device))
            distance = self.config.relative_attention_max_distance
            t5_bias = None if bias is None else T5Bias(bias, not mask.causal, distance)
            output = fused_attention(query, key, value, t5_bias, mask, 1.0, dropout)
        else:
            if bias is None:
                bias = self._dense_bias(query, key, mask, offset)
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=1.0)
            if isinstance(mask, AttentionMask) and mask.visible is not None:
                output = torch.where(mask.visible.to(output.device), output, 0.0)
        return self.o(output.transpose(1, 2).flatten(2)), bias

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """`[B, L, H * Dk]` to `[B, H, L, Dk]`."""
        return states.unflatten(-1, (self.config.num_heads, self.config.d_kv)).transpose(1, 2)

    def _keys_and_values(
        self, hidden_states: torch.Tensor, key_value_states: torch.Tensor | None, past_key_values: Cache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[B, H, Lk, Dk]`, through the cache if there is one."""
        cross = key_value_states is not None
        cache: Any = past_key_values
        if isinstance(past_key_values, EncoderDecoderCache):
            cache = past_key_values.cross_attention_cache if cross else past_key_values.self_attention_cache
            if cross and past_key_values.is_updated.get(self.layer_idx):
                layer = cache.layers[self.layer_idx]
                return layer.keys, layer.values
        states = hidden_states if key_value_states is None else key_value_states
        key, value = self._split_heads(self.k(states)), self._split_heads(self.v(states))
        if cache is None:
            return key, value
        if cross and isinstance(past_key_values, EncoderDecoderCache):
            past_key_values.is_updated[self.layer_idx] = True
        return cache.update(key, value, self.layer_idx)

    def _dense_bias(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: AttentionMask | torch.Tensor | None,
        offset: int | torch.Tensor,
    ) -> torch.Tensor | None:
        """Position bias and mask in one, `[B|1, H|1, Lq|1, Lk]` in the queries' dtype, or None."""
        bias = None
        if hasattr(self, "relative_attention_bias"):
            queries = torch.arange(query.shape[2], device=query.device)[:, None] + offset
            buckets = relative_position_bucket(
                torch.arange(key.shape[2], device=query.device) - queries,
                not self.is_decoder,
                self.config.relative_attention_num_buckets,
                self.config.relative_attention_max_distance,
            )
            bias = self.relative_attention_bias(buckets).permute(2, 0, 1)[None].to(query.dtype)
        if mask is None:
            return bias
        if isinstance(mask, AttentionMask):
            return mask.additive(bias, query.dtype)
        if not mask.is_floating_point():
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
        return mask.to(query.dtype) if bias is None else bias + mask


class EnabledT5Attention(EnabledAttention):
    """Stands in for `T5Attention` and `MT5Attention`, which share one table of biases per stack."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: AttentionMask | torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """Output `[B, Lq, D]`, the bias to share, and no weights. Arguments as in `attend`."""
        output, bias = self.attend(
            hidden_states, mask, position_bias, key_value_states, past_key_values, output_attentions
        )
        return output, bias, None


class EnabledUMT5Attention(EnabledAttention):
    """Stands in for `UMT5Attention`, in which every layer has its own table."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: AttentionMask | torch.Tensor | None = None,
        output_attentions: bool = False,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Output `[B, Lq, D]` and no weights. Arguments as in `attend`."""
        output, _bias = self.attend(
            hidden_states, attention_mask, None, encoder_hidden_states, past_key_values, output_attentions
        )
        return output, None
