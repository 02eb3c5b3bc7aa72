"""The encoder of FlashT5 alone."""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from .configuration_flash_t5 import FlashT5Config
from .packed_inputs import read_segments
from .pretrained_flash_t5 import REPEATED_EMBEDDINGS, FlashT5PreTrainedModel
from .stack_flash_t5 import FlashT5Stack


class FlashT5EncoderModel(FlashT5PreTrainedModel):
    """The encoder alone. Loads from the files of a model with a decoder."""

    _keys_to_ignore_on_load_unexpected = [*REPEATED_EMBEDDINGS, r"^decoder\.", r"^lm_head\."]  # noqa: RUF012

    def __init__(self, config: FlashT5Config) -> None:
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = FlashT5Stack(config, self.embed, is_decoder=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_segment_ids: torch.Tensor | None = None,
        encoder_cu_seqlens: torch.Tensor | None = None,
        encoder_max_length: int | torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions | tuple[torch.Tensor, ...]:
        """Last hidden state `[B, Le, D]` and the rest. Arguments as in `FlashT5EncoderDecoder.run`."""
        self.refuse_others(others)
        states = self.embed(input_ids, inputs_embeds)
        segments = read_segments(
            "encoder", states.shape, attention_mask, encoder_segment_ids, encoder_cu_seqlens, encoder_max_length
        )
        return self.encoder(
            inputs_embeds=states,
            attention_mask=attention_mask,
            segments=segments,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )


FlashT5EncoderModel.register_for_auto_class("AutoModelForTextEncoding")
