"""The two stacks of FlashT5 and their embedding, which all models with a decoder share."""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqModelOutput
from transformers.utils import ModelOutput

from .attention_layout import host_may_look
from .configuration_flash_t5 import FlashT5Config
from .packed_inputs import read_segments, require_a_pair, shift_right, until_last_label
from .pretrained_flash_t5 import FlashT5PreTrainedModel
from .stack_flash_t5 import FlashT5Stack, is_new


class FlashT5EncoderDecoder(FlashT5PreTrainedModel):
    """The two stacks and their embedding, and how they run one after the other. A head may do without the decoder."""

    def __init__(self, config: FlashT5Config, has_decoder: bool = True) -> None:
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = FlashT5Stack(config, self.embed, is_decoder=False)
        if has_decoder:
            self.decoder = FlashT5Stack(config, self.embed, is_decoder=True)

    def run(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: ModelOutput | tuple[torch.Tensor, ...] | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        encoder_segment_ids: torch.Tensor | None = None,
        decoder_segment_ids: torch.Tensor | None = None,
        encoder_cu_seqlens: torch.Tensor | None = None,
        decoder_cu_seqlens: torch.Tensor | None = None,
        encoder_max_length: int | torch.Tensor | None = None,
        decoder_max_length: int | torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        labels: torch.Tensor | None = None,
        loss_alone: bool = False,
    ) -> Seq2SeqModelOutput:
        """Encode, unless `encoder_outputs` are given, and decode.

        Args:
            input_ids: int64 `[B, Le]`, or `inputs_embeds` `[B, Le, D]`, or `encoder_outputs` of an earlier call.
            attention_mask: `[B, Le]`, non-zero for real tokens, on either side of the padding. Or a matrix, as
                `matrix_mask` reads it, for attention of the encoder and to it.
            decoder_input_ids: int64 `[B, Ld]`, or `decoder_inputs_embeds` `[B, Ld, D]`.
            decoder_attention_mask: `[B, past + Ld]`, non-zero for real tokens, or a matrix.
            encoder_outputs: what the encoder returned, or a tuple of last hidden state, hidden states, attentions.
            past_key_values: cache of an earlier call, whose tokens come before these.
            inputs_embeds: see `input_ids`.
            decoder_inputs_embeds: see `decoder_input_ids`.
            encoder_segment_ids: ints `[B, Le]`, 0 for padding and 1..n for the examples packed in a row, which do not
                see each other. Given together with the decoder's, or not at all.
            decoder_segment_ids: ints `[B, Ld]`; a segment attends to the encoder's segment of the same number.
            encoder_cu_seqlens: ints `[S + 1]`, in place of segment ids for a stream: examples one behind the other in a
                single row `[1, T]` without padding, where each of them begins, and T. Given for both sides, or neither.
            decoder_cu_seqlens: the same of the decoder's row; example s attends to the encoder's example s.
            encoder_max_length: tokens of the longest example of the encoder's stream, or more; an int, so that nobody
                has to wait for the device. Counted when left out.
            decoder_max_length: the same of the decoder's.
            use_cache: return a cache; None as the configuration says. Never under gradient checkpointing.
            output_attentions: return attention weights; the call then runs on the eager implementation.
            output_hidden_states: return all hidden states. Here as in the last one, what is padding has no meaning: on
                the kernels, which do not compute it, it is zero.
            labels: int64 `[B, Ld]`, from which decoder inputs are made where there are none; -100 behind the last label
                of a row is padding, of given decoder inputs too without a mask, if nobody sees what comes of them.
            loss_alone: the caller makes a loss of the last hidden states, and does not show them.

        Raises:
            ValueError: if inputs are missing or contradict each other; the message says which.
        """
        encoded: Any = encoder_outputs
        if encoder_outputs is not None and not isinstance(encoder_outputs, ModelOutput):
            encoded = BaseModelOutput(*encoded)
        embeds = self.embed(input_ids, inputs_embeds) if encoded is None else encoded.last_hidden_state
        segments = read_segments(
            "encoder", embeds.shape, attention_mask, encoder_segment_ids, encoder_cu_seqlens, encoder_max_length
        )
        target = next((x for x in (decoder_input_ids, decoder_inputs_embeds, labels) if x is not None), None)
        decoder_segments = (
            None
            if target is None
            else read_segments(
                "decoder",
                target.shape,
                decoder_attention_mask,
                decoder_segment_ids,
                decoder_cu_seqlens,
                decoder_max_length,
            )
        )
        require_a_pair(segments, decoder_segments)
        if labels is not None:
            shifts = decoder_input_ids is None and decoder_inputs_embeds is None
            if shifts:
                ids = None if decoder_segments is None else decoder_segments.ids
                start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
                decoder_input_ids = shift_right(labels, ids, start, pad)
            unseen = loss_alone and not (use_cache or self._shows(output_attentions, output_hidden_states))
            if (shifts or unseen) and decoder_attention_mask is None and decoder_segments is None:
                decoder_attention_mask = self._mask_of_labels(labels, target, past_key_values, embeds)
        outputs = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        if encoded is None:
            encoded = self.encoder(
                inputs_embeds=embeds, attention_mask=attention_mask, segments=segments, return_dict=True, **outputs
            )
        decoder_outputs = self.decoder(
            inputs_embeds=self.embed(decoder_input_ids, decoder_inputs_embeds),
            attention_mask=decoder_attention_mask,
            segments=decoder_segments,
            encoder_hidden_states=encoded.last_hidden_state,
            encoder_attention_mask=attention_mask,
            encoder_segments=segments,
            past_key_values=past_key_values,
            use_cache=self.config.use_cache if use_cache is None else use_cache,
            return_dict=True,
            **outputs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            past_key_values=decoder_outputs.past_key_values,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoded.last_hidden_state,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
        )

    def _shows(self, output_attentions: bool | None, output_hidden_states: bool | None) -> bool:
        """Whether more than the last hidden states is returned."""
        config = self.config
        attentions = config.output_attentions if output_attentions is None else output_attentions
        states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return bool(attentions or states)

    def _mask_of_labels(
        self,
        labels: torch.Tensor,
        target: torch.Tensor | None,
        past_key_values: EncoderDecoderCache | None,
        embeds: torch.Tensor,
    ) -> torch.Tensor | None:
        """Bool `[B, Ld]`, False behind the last label of a row, where the decoder can save what it hides; else None."""
        if target is None or target.shape[:2] != labels.shape or not is_new(past_key_values):
            return None
        # where lengths may not be read back, a mask is a matrix, and dearer than the padding
        if not (host_may_look(embeds.device) and self.decoder.may_pack(embeds.device, embeds.dtype)):
            return None
        return until_last_label(labels)
