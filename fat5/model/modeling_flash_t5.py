"""FlashT5 models: encoder-decoder, the same with a language modeling head, and encoder only."""

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils import ModelOutput

from .attention import ATTENTION_FUNCTIONS, FlashT5Attention
from .configuration_flash_t5 import FlashT5Config
from .layers_flash_t5 import FlashT5Block, FlashT5LayerNorm
from .position_encoding import RelativePositionBias
from .runtime_files import copy_runtime_files
from .stack_flash_t5 import FlashT5Stack, static_length

# From a local folder transformers 4 copies only the files it reads in the imports of this one, run or not.
if TYPE_CHECKING:
    from .attention_layout import KernelLayout as KernelLayout
    from .attention_mask import AttentionMask as AttentionMask
    from .fused_attention import fused_attention as fused_attention
    from .ops_attention import attention as attention
    from .ops_attention_backward import launch_backward as launch_backward
    from .ops_attention_backward_configs import backward_config as backward_config
    from .ops_attention_backward_hopper import issue_tile as issue_tile
    from .ops_attention_backward_hopper_launch import launch_hopper as launch_hopper
    from .ops_attention_backward_keys import backward_keys_kernel as backward_keys_kernel
    from .ops_attention_backward_queries import backward_queries_kernel as backward_queries_kernel
    from .ops_attention_backward_tile import tile_probabilities as tile_probabilities
    from .ops_attention_bias import T5Bias as T5Bias
    from .ops_attention_bias_grad import line_gradient_kernel as line_gradient_kernel
    from .ops_attention_bias_grad_hopper import issue_keys as issue_keys
    from .ops_attention_bias_line import line_gradient as line_gradient
    from .ops_attention_configs import forward_config as forward_config
    from .ops_attention_diagonals_hopper import store_strips as store_strips
    from .ops_attention_forward import launch_forward as launch_forward
    from .ops_attention_forward_kernel import forward_kernel as forward_kernel
    from .ops_attention_forward_sm90 import shared_layout as shared_layout
    from .ops_attention_problem import Problem as Problem
    from .ops_attention_reference import reference_attention as reference_attention
    from .ops_attention_strips import expand_strips as expand_strips

__all__ = [
    "FlashT5Attention",
    "FlashT5Block",
    "FlashT5EncoderModel",
    "FlashT5ForConditionalGeneration",
    "FlashT5Model",
    "FlashT5PreTrainedModel",
    "FlashT5Stack",
    "RelativePositionBias",
]

REPEATED_EMBEDDINGS = [r"^(en|de)coder\.embed_tokens\.weight$"]
"""Other tools' files may repeat the embedding, which is `shared` here, under these names."""


class FlashT5PreTrainedModel(PreTrainedModel):
    """What all FlashT5 models share: loading, saving, initialisation."""

    shared: nn.Module
    encoder: FlashT5Stack
    config_class = FlashT5Config
    base_model_prefix = "transformer"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _no_split_modules = ["FlashT5Block"]  # noqa: RUF012 (declared without ClassVar in transformers)
    _keep_in_fp32_modules = ["wo"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = REPEATED_EMBEDDINGS

    def embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """Embeddings `[B, L, D]` of ids `[B, L]`, or those given in their place.

        Raises:
            ValueError: unless exactly one of the two is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "Give exactly one of `input_ids` and `inputs_embeds`, and to a model with a decoder exactly one of "
                "`decoder_input_ids` and `decoder_inputs_embeds`, or `labels`."
            )
        return self.shared(input_ids) if inputs_embeds is None else inputs_embeds

    def get_input_embeddings(self) -> nn.Module:
        """The embedding that encoder and decoder share."""
        return self.shared

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding of encoder and decoder."""
        self.shared = value

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """The encoder, whatever the modality."""
        return self.encoder

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """The implementation that a request stands for, "sdpa" where there is none.

        "fat5" is resolved call by call: the kernels on the devices that have them, sdpa on others.

        Raises:
            ValueError: if FlashT5 has no such implementation.
        """
        implementation = "sdpa" if requested_attention is None else requested_attention
        if implementation not in ATTENTION_FUNCTIONS:
            reason = "cannot add T5's position bias" if "flash" in implementation else "does not exist here"
            raise ValueError(
                f"attn_implementation={implementation!r} {reason}: FlashT5 runs on {', '.join(ATTENTION_FUNCTIONS)}."
            )
        return implementation

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as in transformers, and always with the code files that the saved `auto_map` names."""
        if kwargs.get("is_main_process", args[0] if args else True):
            copy_runtime_files(save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """T5's initialisation (Mesh TensorFlow's, as in `transformers`), scaled by `initializer_factor`.

        Layers carry their standard deviation as `init_std`, without which it is 1 (embedding and head), because
        transformers 5 calls this only on modules that own parameters. It guards `torch.nn.init` against overwriting
        loaded weights.
        """
        factor = self.config.initializer_factor
        if isinstance(module, FlashT5LayerNorm):
            nn.init.constant_(module.weight, factor)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=factor * getattr(module, "init_std", 1.0))


class FlashT5EncoderDecoder(FlashT5PreTrainedModel):
    """The two stacks and their embedding, and how they run one after the other."""

    def __init__(self, config: FlashT5Config) -> None:
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = FlashT5Stack(config, self.embed, is_decoder=False)
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
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> Seq2SeqModelOutput:
        """Encode, unless `encoder_outputs` are given, and decode.

        Args:
            input_ids: int64 `[B, Le]`, or `inputs_embeds` `[B, Le, D]`, or `encoder_outputs` of an earlier call.
            attention_mask: `[B, Le]`, non-zero for real tokens, on either side of the padding.
            decoder_input_ids: int64 `[B, Ld]`, or `decoder_inputs_embeds` `[B, Ld, D]`.
            decoder_attention_mask: `[B, past + Ld]`, non-zero for real tokens.
            encoder_outputs: what the encoder returned, or a tuple of last hidden state, hidden states, attentions.
            past_key_values: cache of an earlier call, whose tokens come before these.
            inputs_embeds: see `input_ids`.
            decoder_inputs_embeds: see `decoder_input_ids`.
            encoder_segment_ids: ints `[B, Le]`, 0 for padding and 1..n for the examples packed in a row, which do not
                see each other. Given together with the decoder's, or not at all.
            decoder_segment_ids: ints `[B, Ld]`; a segment attends to the encoder's segment of the same number.
            use_cache: return a cache; None as the configuration says. Never under gradient checkpointing.
            output_attentions: return attention weights; the call then runs on the eager implementation.
            output_hidden_states: return all hidden states.

        Raises:
            ValueError: if inputs are missing or contradict each other; the message says which.
        """
        if (encoder_segment_ids is None) != (decoder_segment_ids is None):
            raise ValueError("Give both `encoder_segment_ids` and `decoder_segment_ids`, or neither.")
        outputs = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        encoded: Any = encoder_outputs
        if encoder_outputs is None:
            encoded = self.encoder(
                inputs_embeds=self.embed(input_ids, inputs_embeds),
                attention_mask=attention_mask,
                segment_ids=encoder_segment_ids,
                return_dict=True,
                **outputs,
            )
        elif not isinstance(encoder_outputs, ModelOutput):
            encoded = BaseModelOutput(*encoded)
        decoder_outputs = self.decoder(
            inputs_embeds=self.embed(decoder_input_ids, decoder_inputs_embeds),
            attention_mask=decoder_attention_mask,
            segment_ids=decoder_segment_ids,
            encoder_hidden_states=encoded.last_hidden_state,
            encoder_attention_mask=attention_mask,
            encoder_segment_ids=encoder_segment_ids,
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
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Seq2SeqModelOutput | tuple[torch.Tensor, ...]:
        """Last hidden state `[B, Ld, D]` and the rest. Arguments as in `run`; `return_dict=False` for a tuple."""
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
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


class FlashT5ForConditionalGeneration(FlashT5EncoderDecoder, GenerationMixin):
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
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Seq2SeqLMOutput | tuple[torch.Tensor, ...]:
        """Logits `[B, Ld, V]` in the model's dtype and, given labels, the loss in fp32.

        Arguments as in `run`, and these:

        Args:
            labels: int64 `[B, Ld]`, -100 where nothing is to be predicted. Without decoder inputs these are the
                labels shifted right, within each segment if there are segments. With labels no cache is made unless
                `use_cache` asks for it.
            return_dict: False for a tuple.
            num_items_in_batch: what the summed loss is divided by, as `Trainer` gives it under gradient
                accumulation; None for the number of labels that are not -100.
        """
        if labels is not None:
            use_cache = bool(use_cache)
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels, decoder_segment_ids)
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
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        hidden_states = outputs.last_hidden_state
        if self.config.scale_decoder_outputs:
            hidden_states = hidden_states * self.config.d_model**-0.5
        logits = self.lm_head(hidden_states)
        output = Seq2SeqLMOutput(
            loss=None if labels is None else cross_entropy(logits, labels, num_items_in_batch),
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
        shifted = labels.roll(1, dims=-1)
        starts = torch.zeros_like(labels, dtype=torch.bool)
        starts[:, 0] = True
        if decoder_segment_ids is not None:
            starts[:, 1:] = decoder_segment_ids[:, 1:] != decoder_segment_ids[:, :-1]
        shifted = shifted.masked_fill(shifted == -100, self.config.pad_token_id)
        return shifted.masked_fill(starts, self.config.decoder_start_token_id)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Inputs of one step of `generate`.

        Raises:
            ValueError: if there are segment ids, since packed rows cannot be continued.
        """
        if kwargs.get("encoder_segment_ids") is not None or kwargs.get("decoder_segment_ids") is not None:
            raise ValueError("`generate` continues one sequence per row: give it unpacked inputs, without segment ids.")
        prepare: Any = GenerationMixin.prepare_inputs_for_generation  # its `self` is annotated with a protocol
        inputs = prepare(self, *args, **kwargs)
        inputs.pop("cache_position", None)  # transformers 4 passes it; the cache knows
        return inputs

    @staticmethod
    def create_masks_for_generate(
        attention_mask: torch.Tensor | None, past_key_values: Cache, **_: Any
    ) -> torch.Tensor | None:
        """Mask for a step with a static cache: as long as the cache, whose later part causality hides anyway.

        `generate` calls this where it would build a 4-d mask, which FlashT5 does not take.
        """
        if attention_mask is None:
            return None
        cache = past_key_values
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        return F.pad(attention_mask, (0, static_length(cache) - attention_mask.shape[1]), value=1)


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
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple[torch.Tensor, ...]:
        """Last hidden state `[B, Le, D]` and the rest. Arguments as in `FlashT5EncoderDecoder.run`."""
        return self.encoder(
            inputs_embeds=self.embed(input_ids, inputs_embeds),
            attention_mask=attention_mask,
            segment_ids=encoder_segment_ids,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross-entropy in fp32 of logits `[B, L, V]` on labels `[B, L]`, over those that are not -100.

    Summed, then divided by `num_items_in_batch`, or by the number of labels (1 if there are none).
    """
    labels = labels.to(logits.device)
    total = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    if num_items_in_batch is None:
        num_items_in_batch = (labels != -100).sum().clamp(min=1)
    elif isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


FlashT5Model.register_for_auto_class("AutoModel")
FlashT5ForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")
FlashT5EncoderModel.register_for_auto_class("AutoModelForTextEncoding")
