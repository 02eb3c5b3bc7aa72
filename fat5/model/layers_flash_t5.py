"""Layers of FlashT5: feed-forward and attention sub-layers, and the block made of them."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import AttentionMask, FlashT5Attention
from .configuration_flash_t5 import FlashT5Config
from .fused_linear import fused_linear, is_untouched, linear, plain_weights, project, recomputing_weight
from .norm_flash_t5 import FlashT5LayerNorm, NormedSum
from .ops_gated_act import ACTIVATIONS, gated_act
from .ops_gated_linear import gated_linear, gated_linear_serves
from .ops_operator import is_launch_bound
from .recomputed_linear import gated_act_linear


class FlashT5DenseAct(nn.Module):
    """`dropout(act(x wi))`."""

    def __init__(self, config: FlashT5Config) -> None:
        super().__init__()
        self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi.init_std = config.d_model**-0.5
        self.act = ACT2FN[config.dense_act_fn]
        self.act_name = config.dense_act_fn

    def forward(self, states: torch.Tensor, dropout_p: float = 0.0) -> torch.Tensor:
        """`[..., D]` to `[..., F]`."""
        return self.activate(*self.product(states), dropout_p)

    def product(self, states: torch.Tensor | NormedSum) -> tuple[torch.Tensor, None]:
        """What is activated, `[..., F]`."""
        return project(states, (self.wi,))[0], None

    def activate(self, x: torch.Tensor, up: torch.Tensor | None, dropout_p: float) -> torch.Tensor:
        """`[..., F]`, of what `product` returned."""
        if self.act_name in ACTIVATIONS:
            return gated_act(x, self.act_name, gated=False, dropout_p=dropout_p)
        return F.dropout(self.act(x), dropout_p, training=dropout_p > 0)


class FlashT5DenseGatedAct(nn.Module):
    """`dropout(act(x wi_0) * (x wi_1))` (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: FlashT5Config) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_0.init_std = self.wi_1.init_std = config.d_model**-0.5
        self.act = ACT2FN[config.dense_act_fn]
        self.act_name = config.dense_act_fn

    def forward(self, states: torch.Tensor, dropout_p: float = 0.0) -> torch.Tensor:
        """`[..., D]` to `[..., F]`."""
        # not in training, where reentrant checkpointing runs a layer without gradients and then once more with them,
        # nor in a step of decoding outside a graph, where torch's two products and activation are sooner launched
        together = not self.training and self.act_name in ACTIVATIONS and gated_linear_serves(states)
        if together and (states.shape[-2] > 1 or not is_launch_bound(states)):
            weights = plain_weights((self.wi_0, self.wi_1), states.device)
            if weights is not None and weights[0].dtype == states.dtype:
                return gated_linear(states, weights[0], weights[1], self.act_name)
        return self.activate(*self.product(states), dropout_p)

    def product(self, states: torch.Tensor | NormedSum) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is activated and its factor, both `[..., F]`, or the two in one, `[..., 2 F]`."""
        if self.act_name in ACTIVATIONS:
            both = fused_linear(states, (self.wi_0, self.wi_1))
            if both is not None:
                return both, None
        given = states.states() if isinstance(states, NormedSum) else states
        x = self.wi_0(given)
        return x, self.wi_1(given).to(x.dtype)

    def activate(self, x: torch.Tensor, up: torch.Tensor | None, dropout_p: float) -> torch.Tensor:
        """`[..., F]`, of what `product` returned."""
        if self.act_name in ACTIVATIONS:
            return gated_act(x, self.act_name, up=up, dropout_p=dropout_p)
        return F.dropout(self.act(x) * up, dropout_p, training=dropout_p > 0)


class FlashT5SubLayer(nn.Module):
    """What the pre-norm sub-layers share: the norm, and the residual sum that it begins with.

    A sub-layer takes the residual stream and what the one before adds to it, and returns their sum and what it adds
    itself. Adding, dropout and the norm are then one pass over memory.
    """

    def __init__(self, config: FlashT5Config) -> None:
        super().__init__()
        self.layer_norm = FlashT5LayerNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def normalise(self, hidden_states: torch.Tensor, branch: torch.Tensor | None) -> NormedSum:
        """The sub-layer's input and the residual stream, both `[..., D]`."""
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return NormedSum(self.layer_norm, hidden_states, branch, dropout_probability(self.dropout), dtype)


class FlashT5LayerFF(FlashT5SubLayer):
    """Feed-forward sub-layer."""

    def __init__(self, config: FlashT5Config) -> None:
        super().__init__(config)
        self.act = FlashT5DenseGatedAct(config) if config.is_gated_act else FlashT5DenseAct(config)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.wo.init_std = config.d_ff**-0.5

    def forward(self, hidden_states: torch.Tensor, branch: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Residual stream `[B, L, D]` and what the layer adds to it."""
        normed = self.normalise(hidden_states, branch)
        output = self._feed_forward(normed, dropout_probability(self.dropout))
        return normed.total(), output

    def _feed_forward(self, normed: NormedSum, dropout_p: float) -> torch.Tensor:
        gated = isinstance(self.act, FlashT5DenseGatedAct)
        if torch.is_grad_enabled() and is_untouched(self.act, FlashT5DenseGatedAct if gated else FlashT5DenseAct):
            x, up = self.act.product(normed)
            weight = recomputing_weight(self.wo, x) if self.act.act_name in ACTIVATIONS else None
            if weight is not None:
                return gated_act_linear(x, up, self.act.act_name, gated, dropout_p, weight)
            inner = self.act.activate(x, up, dropout_p)
        else:
            inner = self.act(normed.states(), dropout_p)
        if self.wo.weight.dtype == torch.float32 and not torch.is_autocast_enabled(inner.device.type):
            inner = inner.float()  # kept so in a model in fp16, where its output overflows
        return linear(self.wo, inner)


class FlashT5LayerSelfAttention(FlashT5SubLayer):
    """Self-attention sub-layer."""

    def __init__(self, config: FlashT5Config, layer_idx: int, is_decoder: bool) -> None:
        super().__init__(config)
        has_position_bias = layer_idx == 0 or config.relative_attention_per_layer
        self.self_attention = FlashT5Attention(config, layer_idx, is_decoder, has_position_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        branch: torch.Tensor | None,
        mask: AttentionMask,
        bias: torch.Tensor | None,
        past_key_values: EncoderDecoderCache | None,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Residual stream `[B, L, D]`, what the layer adds, bias to share, attention weights."""
        normed = self.normalise(hidden_states, branch)
        untouched = is_untouched(self.self_attention, FlashT5Attention)
        output, bias, weights = self.self_attention(
            normed if untouched else normed.states(),
            mask,
            bias,
            past_key_values=past_key_values,
            output_attentions=output_attentions,
        )
        return normed.total(), output, bias, weights


class FlashT5LayerCrossAttention(FlashT5SubLayer):
    """Cross-attention sub-layer. It has no position bias."""

    def __init__(self, config: FlashT5Config, layer_idx: int) -> None:
        super().__init__(config)
        self.cross_attention = FlashT5Attention(config, layer_idx, is_decoder=True, has_position_bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        branch: torch.Tensor | None,
        mask: AttentionMask,
        bias: torch.Tensor | None,
        key_value_states: torch.Tensor,
        past_key_values: EncoderDecoderCache | None,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Residual stream `[B, Ld, D]`, what the layer adds, mask to share, attention weights."""
        normed = self.normalise(hidden_states, branch)
        untouched = is_untouched(self.cross_attention, FlashT5Attention)
        output, bias, weights = self.cross_attention(
            normed if untouched else normed.states(),
            mask,
            bias,
            key_value_states=key_value_states,
            past_key_values=past_key_values,
            output_attentions=output_attentions,
        )
        return normed.total(), output, bias, weights


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
        branch: torch.Tensor | None,
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
            Residual stream `[B, L, D]` and what is still to be added to it (see `FlashT5SubLayer`), self-attention
            bias, cross-attention bias, self-attention weights and cross-attention weights; what does not apply is None.
        """
        hidden_states, branch, bias, weights = self.self_attention_layer(
            hidden_states, branch, mask, bias, past_key_values, output_attentions
        )
        cross_weights = None
        if self.cross_attention_layer is not None:
            hidden_states, branch, cross_bias, cross_weights = self.cross_attention_layer(
                hidden_states,
                branch,
                cross_mask,
                cross_bias,
                encoder_hidden_states,
                past_key_values,
                output_attentions,
            )
        hidden_states, branch = self.ff_layer(hidden_states, branch)
        if self.training and self.gradient_checkpointing:  # which keeps what goes between layers: one tensor, not two
            dropout_p = dropout_probability(self.ff_layer.dropout)
            hidden_states, branch = add_branch(hidden_states, branch, self.ff_layer.layer_norm, dropout_p), None
        return hidden_states, branch, bias, cross_bias, weights, cross_weights


def dropout_probability(dropout: nn.Dropout) -> float:
    """What a dropout module does now: 0 outside training."""
    return dropout.p if dropout.training else 0.0


def add_branch(
    hidden_states: torch.Tensor, branch: torch.Tensor | None, norm: FlashT5LayerNorm, dropout_p: float
) -> torch.Tensor:
    """The sum that a norm would begin with, for whoever wants it before: the same numbers, the same dropout."""
    return hidden_states if branch is None else norm(hidden_states, branch, dropout_p)[1]
