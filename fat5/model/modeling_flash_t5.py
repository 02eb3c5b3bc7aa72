"""FlashT5 models: encoder-decoder, and the same with a language modeling head. All others are reached from here too."""

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils import ModelOutput

from .attention import FlashT5Attention
from .configuration_flash_t5 import FlashT5Config
from .encoder_decoder_flash_t5 import FlashT5EncoderDecoder
from .encoder_flash_t5 import FlashT5EncoderModel
from .generation_flash_t5 import FlashT5Generative
from .heads_flash_t5 import (
    FlashT5ForQuestionAnswering,
    FlashT5ForSequenceClassification,
    FlashT5ForTokenClassification,
)
from .layers_flash_t5 import FlashT5Block
from .lm_head_flash_t5 import does_without_logits, loss_and_logits, places_of_labels
from .packed_inputs import shift_right
from .position_encoding import RelativePositionBias
from .pretrained_flash_t5 import REPEATED_EMBEDDINGS, FlashT5PreTrainedModel
from .stack_flash_t5 import FlashT5Stack

# From a local folder transformers 4 copies only the files it reads in the imports of this one, run or not.
if TYPE_CHECKING:
    from .attention_layout import KernelLayout as KernelLayout
    from .attention_mask import AttentionMask as AttentionMask
    from .constant_tensors import kept as kept
    from .decoding_graphs import DecodingGraphs as DecodingGraphs
    from .decoding_inputs import shapes_of as shapes_of
    from .decoding_state import state_of as state_of
    from .flash_attention import flash_attention as flash_attention
    from .fused_attention import fused_attention as fused_attention
    from .fused_linear import fused_linear as fused_linear
    from .norm_flash_t5 import NormedSum as NormedSum
    from .ops_attention import attention as attention
    from .ops_attention_backward import launch_backward as launch_backward
    from .ops_attention_backward_hopper import issue_tile as issue_tile
    from .ops_attention_backward_hopper_launch import launch_hopper as launch_hopper
    from .ops_attention_backward_keys import backward_keys_kernel as backward_keys_kernel
    from .ops_attention_backward_queries import backward_queries_kernel as backward_queries_kernel
    from .ops_attention_backward_tile import tile_probabilities as tile_probabilities
    from .ops_attention_bias import T5Bias as T5Bias
    from .ops_attention_bias_grad import line_gradient_kernel as line_gradient_kernel
    from .ops_attention_bias_grad_hopper import issue_keys as issue_keys
    from .ops_attention_bias_line import line_gradient as line_gradient
    from .ops_attention_checks import check_bias as check_bias
    from .ops_attention_configs import forward_config as forward_config
    from .ops_attention_diagonals_hopper import store_strips as store_strips
    from .ops_attention_forward import launch_forward as launch_forward
    from .ops_attention_forward_kernel import forward_kernel as forward_kernel
    from .ops_attention_forward_sm90 import shared_layout as shared_layout
    from .ops_attention_places_sm90 import block_of as block_of
    from .ops_attention_problem import Problem as Problem
    from .ops_attention_reference import reference_attention as reference_attention
    from .ops_attention_strips import expand_strips as expand_strips
    from .ops_attention_table import line_of_table as line_of_table
    from .ops_cache import append_to_cache as append_to_cache
    from .ops_cache_kernels import append_kernel as append_kernel
    from .ops_cross_entropy import cross_entropy as cross_entropy
    from .ops_cross_entropy_kernels import launch_loss as launch_loss
    from .ops_decode_attention import decode_attention as decode_attention
    from .ops_decode_attention_kernels import decode_attention_kernel as decode_attention_kernel
    from .ops_device import multiprocessors as multiprocessors
    from .ops_dropout_tile import keep_tile as keep_tile
    from .ops_early_launch import wait_for_earlier as wait_for_earlier
    from .ops_few_rows_linear import few_rows_linear as few_rows_linear
    from .ops_few_rows_linear_kernels import few_rows_linear_kernel as few_rows_linear_kernel
    from .ops_gated_act import gated_act as gated_act
    from .ops_gated_act_kernels import activate as activate
    from .ops_gated_linear import gated_linear as gated_linear
    from .ops_gated_linear_kernels import gated_linear_kernel as gated_linear_kernel
    from .ops_graph import is_captured as is_captured
    from .ops_linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
    from .ops_operator import Operator as Operator
    from .ops_philox import philox as philox
    from .ops_rms_norm import add_rms_norm as add_rms_norm
    from .ops_rms_norm_kernels import block_width as block_width
    from .packed_stack import pack_stack as pack_stack
    from .position_alibi import AlibiPositionBias as AlibiPositionBias
    from .position_bias import build_position_bias as build_position_bias
    from .position_fire import FirePositionBias as FirePositionBias
    from .position_rotary import rotary_tables as rotary_tables
    from .recomputed_linear import norm_linear as norm_linear
    from .runtime_files import copy_runtime_files as copy_runtime_files

__all__ = [
    "FlashT5Attention",
    "FlashT5Block",
    "FlashT5EncoderModel",
    "FlashT5ForConditionalGeneration",
    "FlashT5ForQuestionAnswering",
    "FlashT5ForSequenceClassification",
    "FlashT5ForTokenClassification",
    "FlashT5Model",
    "FlashT5PreTrainedModel",
    "FlashT5Stack",
    "RelativePositionBias",
]


class FlashT5Model(FlashT5EncoderDecoder):
    """Encoder and decoder without a head. Loads from the files of a model with one."""

    _keys_to_ignore_on_load_unexpected = [*REPEATED_EMBEDDINGS, r"^lm_head\."]  # noqa: RUF012

    def __init__(self, config: FlashT5Config) -> None:
        super().__init__(config)
        self.post_init()

    def forward(
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
        return_dict: bool | None = None,
        **others: Any,
    ) -> Seq2SeqModelOutput | tuple[torch.Tensor, ...]:
        """Last hidden state `[B, Ld, D]` and the rest. Arguments as in `run`; `return_dict=False` for a tuple."""
        self.refuse_others(others)
        output = self.run(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            encoder_segment_ids=encoder_segment_ids,
            decoder_segment_ids=decoder_segment_ids,
            encoder_cu_seqlens=encoder_cu_seqlens,
            decoder_cu_seqlens=decoder_cu_seqlens,
            encoder_max_length=encoder_max_length,
            decoder_max_length=decoder_max_length,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


class FlashT5ForConditionalGeneration(FlashT5Generative):
    """Encoder and decoder with a language modeling head, tied to the embedding or not."""

    _tied_weights_keys = {"lm_head.weight": "shared.weight"}  # noqa: RUF012 (transformers 4 reads its keys alone)

    def __init__(self, config: FlashT5Config) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The language modeling head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language modeling head."""
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: ModelOutput | tuple[torch.Tensor, ...] | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        encoder_segment_ids: torch.Tensor | None = None,
        decoder_segment_ids: torch.Tensor | None = None,
        encoder_cu_seqlens: torch.Tensor | None = None,
        decoder_cu_seqlens: torch.Tensor | None = None,
        encoder_max_length: int | torch.Tensor | None = None,
        decoder_max_length: int | torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **others: Any,
    ) -> Seq2SeqLMOutput | tuple[torch.Tensor, ...]:
        """Logits `[B, Ld, V]` in the model's dtype and, given labels, the loss in fp32.

        Training with labels on a GPU, the loss is computed without logits, which then are None. Arguments as in `run`,
        and these:

        Args:
            labels: int64 `[B, Ld]`, -100 where nothing is to be predicted. Without decoder inputs these are the
                labels shifted right, within each segment if there are segments. With labels no cache is made unless
                `use_cache` asks for it.
            return_dict: False for a tuple.
            num_items_in_batch: what the summed loss is divided by, as `Trainer` gives it under gradient
                accumulation; None for the number of labels that are not -100.
        """
        self.refuse_others(others)
        places = None
        if labels is not None:
            use_cache = bool(use_cache)
            if self.training and decoder_cu_seqlens is None:  # a stream has no padding, and needs no look at anything
                places = places_of_labels(labels)
        outputs = self.run(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            encoder_segment_ids=encoder_segment_ids,
            decoder_segment_ids=decoder_segment_ids,
            encoder_cu_seqlens=encoder_cu_seqlens,
            decoder_cu_seqlens=decoder_cu_seqlens,
            encoder_max_length=encoder_max_length,
            decoder_max_length=decoder_max_length,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            labels=labels,
            loss_alone=labels is not None and does_without_logits(self.lm_head, labels.device, self.training),
        )
        hidden_states: Any = outputs.last_hidden_state
        scale = self.config.d_model**-0.5 if self.config.scale_decoder_outputs else 1.0
        loss, logits = loss_and_logits(
            self.lm_head, hidden_states, labels, scale, self.training, num_items_in_batch, places
        )
        output = Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def prepare_decoder_input_ids_from_labels(
        self, labels: torch.Tensor, decoder_segment_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Labels `[B, Ld]` shifted right: every row, and every segment in it, begins with the start token."""
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        return shift_right(labels, decoder_segment_ids, start, pad)


# `generate` asks for the arguments of the forward pass at every token; to read them anew takes longer than to run a
# layer of the decoder.
vars(FlashT5ForConditionalGeneration)["forward"].__signature__ = inspect.signature(
    FlashT5ForConditionalGeneration.forward
)
FlashT5Model.register_for_auto_class("AutoModel")
FlashT5ForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")
