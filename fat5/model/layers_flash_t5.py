"""Layers of FlashT5: normalisation, feed-forward, attention sub-layers, and the block made of them."""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import AttentionMask, FlashT5Attention
from .configuration_flash_t5 import FlashT5Config


class FlashT5LayerNorm(nn.Module):
    """RMSNorm: scale only, no mean or bias, statistics in fp32 or better (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[..., D]` to `[..., D]`, in the weight's dtype where that is fp16 or bf16."""
        statistics_dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        variance = hidden_states.to(statistics_dtype).square().mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.eps)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            hidden_states = hidden_states.to(self.weight.dtype)
        return self.weight * hidden_states


class FlashT5DenseAct(nn.Module):
    """`act(x wi)`."""

    def __init__(self, config: FlashT5Config) -> None:
        super().__init__()
        self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi.init_std = config.d_model**-0.5
        self.act = ACT2FN[config.dense_act_fn]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[B, L, D]` to `[B, L, F]`."""
        return self.act(self.wi(hidden_states))


class FlashT5DenseGatedAct(nn.Module):
    """`act(x wi_0) * (x wi_1)` (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: FlashT5Config) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_0.init_std = self.wi_1.init_std = config.d_model**-0.5
        self.act = ACT2FN[config.dense_act_fn]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[B, L, D]` to `[B, L, F]`."""
        return self.act(self.wi_0(hidden_states)) * self.wi_1(hidden_states)


class FlashT5LayerFF(nn.Module):
    """Pre-norm feed-forward sub-layer with its residual."""

    def __init__(self, config: FlashT5Config) -> None:
        super().__init__()
        self.act = FlashT5DenseGatedAct(config) if config.is_gated_act else FlashT5DenseAct(config)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.wo.init_std = config.d_ff**-0.5
        self.layer_norm = FlashT5LayerNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[B, L, D]` to `[B, L, D]`."""
        inner = self.dropout(self.act(self.layer_norm(hidden_states)))
        if self.wo.weight.dtype == torch.float32:  # kept so under fp16, where its output overflows
            inner = inner.float()
        return hidden_states + self.dropout(self.wo(inner))


class FlashT5LayerSelfAttention(nn.Module):
    """Pre-norm self-attention sub-layer with its residual."""

    def __init__(self, config: FlashT5Config, layer_idx: int, is_decoder: bool) -> None:
        super().__init__()
        has_position_bias = layer_idx == 0 or config.relative_attention_per_layer
        self.self_attention = FlashT5Attention(config, layer_idx, is_decoder, has_position_bias)
        self.layer_norm = FlashT5LayerNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: AttentionMask,
        bias: torch.Tensor | None,
        past_key_values: EncoderDecoderCache | None,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Hidden states `[B, L, D]`, the bias to share and the attention weights (see `FlashT5Attention`)."""
        output, bias, weights = self.self_attention(
            self.layer_norm(hidden_states),
            mask,
            bias,
            past_key_values=past_key_values,
            output_attentions=output_attentions,
        )
        return hidden_states + self.dropout(output), bias, weights


class FlashT5LayerCrossAttention(nn.Module):
    """Pre-norm cross-attention sub-layer with its residual. It has no position bias."""

    def __init__(self, config: FlashT5Config, layer_idx: int) -> None:
        super().__init__()
        self.cross_attention = FlashT5Attention(config, layer_idx, is_decoder=True, has_position_bias=False)
        self.layer_norm = FlashT5LayerNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: AttentionMask,
        bias: torch.Tensor | None,
        key_value_states: torch.Tensor,
        past_key_values: EncoderDecoderCache | None,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Hidden states `[B, Ld, D]`, the mask to share and the attention weights (see `FlashT5Attention`)."""
        output, bias, weights = self.cross_attention(
            self.layer_norm(hidden_states),
            mask,
            bias,
            key_value_states=key_value_states,
            past_key_values=past_key_values,
            output_attentions=output_attentions,
        )
        return hidden_states + self.dropout(output), bias, weights


class FlashT5Block(GradientCheckpointingLayer):
    """One layer of a stack: self-attention, in the decoder cross-attention, feed-forward."""

    def __init__(self, config: FlashT5Config, layer_idx: int, is_decoder: bool) -> None:
        super().__init__()
        self.self_attention_layer = FlashT5LayerSelfAttention(config, layer_idx, is_decoder)
        self.cross_attention_layer = FlashT5LayerCrossAttention(config, layer_idx) if is_decoder else None
        self.ff_layer = FlashT5LayerFF(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        bias: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor | None,
        cross_bias: torch.Tensor | None,
        mask: AttentionMask,
        cross_mask: AttentionMask | None,
        past_key_values: EncoderDecoderCache | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor | None, ...]:
        """Run the layer. What needs a gradient comes first, by position, for reentrant checkpointing.

        Returns:
            Hidden states `[B, L, D]`, self-attention bias, cross-attention bias, self-attention weights and
            cross-attention weights; what does not apply is None.
        """
        hidden_states, bias, weights = self.self_attention_layer(
            hidden_states, mask, bias, past_key_values, output_attentions
        )
        hidden_states = clamp_fp16(hidden_states)
        cross_weights = None
        if self.cross_attention_layer is not None:
            hidden_states, cross_bias, cross_weights = self.cross_attention_layer(
                hidden_states, cross_mask, cross_bias, encoder_hidden_states, past_key_values, output_attentions
            )
            hidden_states = clamp_fp16(hidden_states)
        hidden_states = clamp_fp16(self.ff_layer(hidden_states))
        return hidden_states, bias, cross_bias, weights, cross_weights


def clamp_fp16(hidden_states: torch.Tensor) -> torch.Tensor:
    """Keep fp16 activations finite: T5's residual stream exceeds fp16's range in some checkpoints."""
    if hidden_states.dtype != torch.float16:
        return hidden_states
    largest = torch.finfo(torch.float16).max
    return hidden_states.clamp(min=-largest, max=largest)
