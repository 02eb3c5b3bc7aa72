"""The stack: encoder or decoder, from embeddings to normalised hidden states."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import ModuleUtilsMixin

from .attention_mask import AttentionMask, kernels_take
from .configuration_flash_t5 import FlashT5Config
from .layers_flash_t5 import FlashT5Block, add_branch, dropout_probability
from .norm_flash_t5 import FlashT5LayerNorm
from .packed_inputs import Segments
from .packed_stack import PackedStack, Rows, pack_stack
from .position_rotary import RotaryTables, rotary_tables


class FlashT5Stack(nn.Module, ModuleUtilsMixin):
    """Encoder or decoder, which says its `device` and `dtype` as models do.

    Args:
        config: the model's configuration.
        embed: the model's method that embeds `(input_ids, inputs_embeds)`, of which one is None. The stack owns no
            embedding: there is one, under one name (`shared`), whatever replaces, resizes or wraps it.
        is_decoder: causal, with cross-attention and cache.
    """

    main_input_name = "input_ids"

    def __init__(self, config: FlashT5Config, embed: Callable[..., torch.Tensor], is_decoder: bool) -> None:
        super().__init__()
        self.config = config
        self.embed = embed
        self.is_decoder = is_decoder
        num_layers = config.num_decoder_layers if is_decoder else config.num_layers
        self.block = nn.ModuleList([FlashT5Block(config, i, is_decoder) for i in range(num_layers)])
        self.final_layer_norm = FlashT5LayerNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def __setattr__(self, name: str, value: Any) -> None:
        """As of any module; an embedding of its own, which a stack of stock T5 may get, would have no effect."""
        if name == "embed_tokens":
            raise AttributeError("The stacks share the model's embedding: call its `set_input_embeddings` instead.")
        super().__setattr__(name, value)

    @property
    def embed_tokens(self) -> nn.Module:
        """The model's embedding, by the name that it has in a stack of stock T5."""
        method: Any = self.embed
        return method.__self__.get_input_embeddings()

    def get_input_embeddings(self) -> nn.Module:
        """The model's embedding."""
        return self.embed_tokens

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        segments: Segments | None = None,
        encoder_segments: Segments | None = None,
    ) -> Any:
        """Run the stack.

        Where the kernels serve, it runs on the real tokens alone, `[1, T, D]` from the first layer to the last,
        whatever the mask, unless a cache already holds tokens, or a graph is compiled or captured. What it returns is
        padded again, with zeros. On "fat5" without kernels, as on a CPU, so does an encoder, but for attention itself.

        So do the kernels of attention, unless its bias needs the distances of the padded rows: T5's and ALiBi's between
        tokens with padding among them (holes in a mask), and every bias that is a matrix (FIRE, asymmetric ALiBi, T5's
        and ALiBi's of random positions). Then scores, softmax and weighted values of self-attention, nothing else, are
        computed in the rows as they came, and what comes of padding there is dropped.

        Args:
            input_ids: int64 `[B, L]`, or `inputs_embeds`.
            attention_mask: `[B, L]`, in a decoder with cache `[B, past + L]`; non-zero for real tokens. Or a matrix, as
                `matrix_mask` reads it.
            encoder_hidden_states: `[B, Le, D]`, in a decoder only, as all of the encoder.
            encoder_attention_mask: `[B, Le]`, or a matrix.
            inputs_embeds: `[B, L, D]`.
            past_key_values: in a decoder, cache to extend.
            use_cache: in a decoder, begin a cache if none is given.
            output_attentions: return attention weights (computed by the eager implementation).
            output_hidden_states: return the input of every layer and the output of the last norm.
            return_dict: False for a tuple.
            segments: the sequences packed in the rows.
            encoder_segments: those in the encoder's rows.

        Returns:
            `BaseModelOutputWithPastAndCrossAttentions`, or its values that are not None as a tuple.

        Raises:
            ValueError: if the inputs contradict each other; the message says how.
        """
        inputs_embeds = self.embed(input_ids, inputs_embeds)
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return_dict = self.config.return_dict if return_dict is None else return_dict
        # an encoder is given the decoder's by transformers 4; recomputing a layer would extend the cache twice
        if not self.is_decoder or (self.training and self.block[0].gradient_checkpointing):
            past_key_values = None
        elif use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())

        implementation = "eager" if output_attentions else self.config._attn_implementation
        cross = cross_matrix = None
        if encoder_hidden_states is not None:
            encoder_length = encoder_hidden_states.shape[1]
            encoder_mask = key_mask(encoder_attention_mask, encoder_length)
            cross = Rows((encoder_hidden_states.shape[0], encoder_length), encoder_mask, encoder_segments)
            cross_matrix = matrix_mask(encoder_attention_mask, inputs_embeds.shape[1], encoder_length)
        mask, cross_mask, packed = self._lay_out(
            inputs_embeds, attention_mask, segments, cross, cross_matrix, past_key_values, implementation
        )
        if packed is not None:
            inputs_embeds = packed.queries.pack(inputs_embeds)
            if encoder_hidden_states is not None:
                encoder_hidden_states = packed.keys.pack(encoder_hidden_states)
        hidden_states = self.dropout(inputs_embeds)
        all_hidden_states, all_weights, all_cross_weights = [], [], []
        wide = self.config.residual_in_fp32
        if not torch.is_grad_enabled() if wide is None else wide:
            hidden_states = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        branch = bias = cross_bias = None
        for block in self.block:
            if output_hidden_states:
                dropout_p = dropout_probability(self.dropout)
                hidden_states, branch = add_branch(hidden_states, branch, self.final_layer_norm, dropout_p), None
                all_hidden_states.append(hidden_states.to(inputs_embeds.dtype))
            hidden_states, branch, bias, cross_bias, weights, cross_weights = block(
                hidden_states,
                branch,
                None if self.config.relative_attention_per_layer else bias,
                encoder_hidden_states,
                cross_bias,
                mask,
                cross_mask,
                past_key_values=past_key_values,
                output_attentions=output_attentions,
            )
            all_weights.append(weights)
            all_cross_weights.append(cross_weights)
        hidden_states, _ = self.final_layer_norm(hidden_states, branch, dropout_probability(self.dropout))
        hidden_states = self.dropout(hidden_states)
        if packed is not None:
            hidden_states = packed.queries.unpack(hidden_states)
            all_hidden_states = [packed.queries.unpack(states) for states in all_hidden_states]
        output = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
            attentions=tuple(all_weights) if output_attentions else None,
            cross_attentions=tuple(all_cross_weights) if output_attentions and self.is_decoder else None,
        )
        return output if return_dict else output.to_tuple()

    def may_pack(self, device: torch.device, dtype: torch.dtype, implementation: str | None = None) -> bool:
        """Whether the kernels serve states of this kind, so that the stack may run without padding."""
        return kernels_take(implementation or self.config._attn_implementation, device, dtype, self.config.d_kv)

    @staticmethod
    def _may_pack_all_but_attention(cross: Rows | None, segments: Segments | None, implementation: str | None) -> bool:
        """Whether an encoder without kernels may run without padding, but for attention in the rows as they came.

        That is on a CPU, say, where products, in proportion to their rows, take most of the time.
        """
        return implementation == "fat5" and cross is None and segments is None

    def _lay_out(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        segments: Segments | None,
        cross: Rows | None,
        cross_matrix: torch.Tensor | None,
        past_key_values: EncoderDecoderCache | None,
        implementation: str | None,
    ) -> tuple[AttentionMask, AttentionMask | None, PackedStack | None]:
        """Masks of self- and cross-attention, prepared, and how the stack is packed; None for what there is not."""
        (batch, length), device, dtype = inputs_embeds.shape[:2], inputs_embeds.device, inputs_embeds.dtype
        config, cross_mask, packed = self.config, None, None
        mask = self._self_attention_mask(inputs_embeds, attention_mask, segments, past_key_values)
        mask.drawn = self._draw_positions(length, device, past_key_values)
        biased = config.position_encoding_type in ("t5", "ALiBi", "FIRE")
        mask.dense_bias = config.has_dense_bias or (biased and mask.drawn is not None)
        of_keys = mask.matrix is None and cross_matrix is None
        by_kernels = self.may_pack(device, dtype, implementation)
        may_pack = by_kernels or self._may_pack_all_but_attention(cross, segments, implementation)
        if of_keys and may_pack and is_new(past_key_values):
            packed = pack_stack(Rows((batch, length), mask.key_mask, segments), cross, device)
        # of packed tokens the kernels take no matrix, and count distances between those that are there
        in_rows = packed is None or not by_kernels or mask.dense_bias or (biased and not packed.queries.neighbours)
        if in_rows:
            mask.prepare(implementation, dtype, config.d_kv)
        places = mask.places()[0] if config.position_encoding_type == "RoPE" else None
        if packed is None:
            if cross is not None:
                cross_mask = cross_attention_mask(length, cross, segments, device)
                cross_mask.matrix = cross_matrix
                cross_mask.prepare(implementation, dtype, config.d_kv)
        else:
            cross_mask = None if cross is None else packed.cross_attention()
            if in_rows:
                mask.rows = packed.queries
            else:
                mask = packed.self_attention(causal=self.is_decoder)
                if places is not None:
                    places = packed.queries.pack(places.expand(batch, length)[..., None])[..., 0]
        if places is not None:
            mask.rotary = self._rotary_tables(places)
        return mask, cross_mask, packed

    def _draw_positions(
        self, length: int, device: torch.device, past_key_values: EncoderDecoderCache | None
    ) -> torch.Tensor | None:
        """Random positions int64 `[L]` for a call in training, rising from 0; None where they are 0, 1, 2, ...

        Raises:
            ValueError: if there are fewer to draw from than tokens, or earlier tokens whose positions are unknown.
        """
        if not (self.training and self.config.use_randomized_position_encoding):
            return None
        available = self.config.max_sequence_length
        if length > available:
            raise ValueError(f"{length} tokens cannot be spread over `max_sequence_length` {available} positions.")
        if not is_new(past_key_values):
            raise ValueError("Random positions cannot be continued from a cache: generate in evaluation mode.")
        drawn = torch.randperm(available, device=device)[:length].sort().values
        return torch.cat([torch.zeros_like(drawn[:1]), drawn[1:]])

    def _rotary_tables(self, places: torch.Tensor) -> RotaryTables:
        config = self.config
        return rotary_tables(
            places,
            config.rotary_size,
            config.rotary_base,
            config.rotary_interleaved,
            config.rotary_scale_base,
            center=config.max_sequence_length // 2,
        )

    def _self_attention_mask(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        segments: Segments | None,
        past_key_values: EncoderDecoderCache | None,
    ) -> AttentionMask:
        length = key_length = inputs_embeds.shape[1]
        offset: int | torch.Tensor = 0
        if past_key_values is not None:
            cache = past_key_values.self_attention_cache
            offset = cache.get_seq_length()
            if cache.is_compileable:  # a static cache is attended to over its whole allocation
                key_length = static_length(cache)
            else:
                key_length = offset + length
            if isinstance(offset, torch.Tensor):
                offset = offset.clone()  # the cache counts on in place
            if segments is not None and not (isinstance(offset, int) and offset == 0):
                raise ValueError("Packed segments cannot be continued from a cache: run them in one call.")
        segment_ids = None if segments is None else segments.ids
        return AttentionMask(
            query_length=length,
            key_length=key_length,
            device=inputs_embeds.device,
            query_offset=offset,
            causal=self.is_decoder,
            key_mask=key_mask(attention_mask, key_length),
            query_segments=segment_ids,
            key_segments=segment_ids,
            matrix=matrix_mask(attention_mask, length, key_length),
        )


def cross_attention_mask(length: int, encoder: Rows, segments: Segments | None, device: torch.device) -> AttentionMask:
    """Mask of `length` queries, in the decoder's segments if there are any, towards the encoder's rows."""
    mask = AttentionMask(length, encoder.shape[1], device, cross=True, key_mask=encoder.mask)
    if segments is not None and encoder.segments is not None:
        mask.query_segments, mask.key_segments = segments.ids, encoder.segments.ids
    return mask


def is_new(past_key_values: EncoderDecoderCache | None) -> bool:
    """Whether there is no cache, or one that is empty and grows as needed."""
    if past_key_values is None:
        return True
    cache = past_key_values.self_attention_cache
    return not cache.is_compileable and cache.get_seq_length() == 0 and not any(past_key_values.is_updated.values())


def key_mask(attention_mask: torch.Tensor | None, key_length: int) -> torch.Tensor | None:
    """Bool `[B, Lk]` from the user's `[B, Lk]` of zeros and ones; None where that is a matrix.

    Raises:
        ValueError: if the mask does not cover every key.
    """
    if attention_mask is None or attention_mask.ndim == 4:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[1] != key_length:
        raise ValueError(
            f"An attention mask must be [batch, {key_length}], one entry for each key (cached tokens included), "
            f"got {list(attention_mask.shape)}. For packed sequences give segment ids."
        )
    return attention_mask.bool()


def matrix_mask(attention_mask: torch.Tensor | None, query_length: int, key_length: int) -> torch.Tensor | None:
    """The user's own matrix `[B|1, H|1, Lq|1, Lk]`; None where the mask is one of keys, or missing.

    As in stock T5 it says all of who sees whom, causality of a decoder included, and floats are added to the scores. It
    needs attention that takes a matrix: on "fat5" too that is torch's.

    Raises:
        ValueError: if it does not fit queries and keys, or is neither bool nor floats.
    """
    if attention_mask is None or attention_mask.ndim != 4:
        return None
    fits = attention_mask.shape[2] in (1, query_length) and attention_mask.shape[3] == key_length
    if not fits or not (attention_mask.dtype == torch.bool or attention_mask.is_floating_point()):
        raise ValueError(
            f"A 4-d attention mask must be bool, or floats to add to the scores, [batch or 1, heads or 1, "
            f"{query_length} or 1, {key_length}], got {attention_mask.dtype} {list(attention_mask.shape)}. The "
            "encoder's is read by cross-attention too: to give that another, run the encoder first and give "
            "`encoder_outputs`."
        )
    return attention_mask


def static_length(cache: Cache) -> int:
    """Number of positions that a static cache holds."""
    layer: Any = cache.layers[0]
    return layer.max_cache_len
