"""FlashT5 with heads for classification of sequences and tokens, and for extractive question answering."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import (
    BaseModelOutput,
    QuestionAnsweringModelOutput,
    Seq2SeqModelOutput,
    Seq2SeqQuestionAnsweringModelOutput,
    Seq2SeqSequenceClassifierOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import ModelOutput

from .attention_layout import host_may_look
from .configuration_flash_t5 import FlashT5Config
from .encoder_decoder_flash_t5 import FlashT5EncoderDecoder
from .pretrained_flash_t5 import REPEATED_EMBEDDINGS

Outputs = BaseModelOutput | Seq2SeqModelOutput


class FlashT5HeadedModel(FlashT5EncoderDecoder):
    """The encoder, with the decoder behind it where the head reads that. Loads from the files of any FlashT5.

    Args:
        config: the model's configuration.
        has_decoder: the head reads the decoder's output, whose input is the encoder's shifted right (stock T5);
            otherwise the encoder's (published FAT5).
    """

    _keys_to_ignore_on_load_unexpected = [*REPEATED_EMBEDDINGS, r"^decoder\.", r"^lm_head\."]  # noqa: RUF012
    accepts_loss_kwargs = False

    def __init__(self, config: FlashT5Config, has_decoder: bool) -> None:
        super().__init__(config, has_decoder)
        self.has_decoder = has_decoder
        self.num_labels = config.num_labels

    def read(self, inputs: dict[str, Any], use_cache: bool | None = None) -> Outputs:
        """Run the stacks on the inputs of a head.

        Args:
            inputs: arguments of `run`. `input_ids` beside `inputs_embeds` are what the decoder's are made from.
            use_cache: return a cache of the decoder.

        Raises:
            ValueError: if there are inputs for a decoder and no decoder, or none that it could read.
        """
        ids = inputs["input_ids"]
        if inputs["inputs_embeds"] is not None:
            inputs["input_ids"] = None
        if not self.has_decoder:
            of_decoder = [name for name in inputs if "decoder" in name or name == "encoder_outputs"]
            given = [name for name in of_decoder if inputs.pop(name) is not None]
            if given:
                raise ValueError(f"{type(self).__name__} has no decoder (see `head_reads_decoder`) for {given}.")
            return self.encoder(**inputs, return_dict=True)
        if inputs["decoder_input_ids"] is None and inputs["decoder_inputs_embeds"] is None:
            if ids is None:
                raise ValueError("Give `input_ids`, which the decoder reads too, or `decoder_input_ids`.")
            inputs["decoder_input_ids"] = self._shift_right(ids)
        return self.run(**inputs, use_cache=bool(use_cache))

    def finish(self, output: ModelOutput, return_dict: bool | None) -> Any:
        """The output, or its values as a tuple."""
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


class FlashT5ClassificationHead(nn.Module):
    """Two layers with tanh between them, from a state `[B, D]` to logits `[B, num_labels]`."""

    def __init__(self, config: FlashT5Config) -> None:
        super().__init__()
        num_labels: Any = config.num_labels
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out_proj = nn.Linear(config.d_model, num_labels)
        self.dense.init_std = self.out_proj.init_std = config.d_model**-0.5

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`[B, D]` to `[B, num_labels]`."""
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(states)))))


class FlashT5ForSequenceClassification(FlashT5HeadedModel):
    """A label, several, or a number for every sequence, read where its last end-of-sequence token stands."""

    def __init__(self, config: FlashT5Config) -> None:
        super().__init__(config, config.head_reads_decoder)
        self.classification_head = FlashT5ClassificationHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: ModelOutput | tuple[torch.Tensor, ...] | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> SequenceClassifierOutput | Seq2SeqSequenceClassifierOutput | tuple[torch.Tensor, ...]:
        """Logits `[B, num_labels]` and, given labels, the loss in fp32. Arguments as in `run`, and these:

        Args:
            input_ids: int64 `[B, L]`; needed, for the place of its end-of-sequence tokens.
            labels: int64 `[B]` for one label each, floats `[B, num_labels]` for several or `[B]` for a number; which
                of these `config.problem_type` says, or, where that is None, the labels themselves.

        Raises:
            ValueError: if a sequence has no end-of-sequence token.
        """
        self.refuse_others(others)
        if input_ids is None:
            raise ValueError(
                "Give `input_ids`: the head reads the state at the end-of-sequence token, found by its id."
            )
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "encoder_outputs": encoder_outputs,
            "inputs_embeds": inputs_embeds,
            "decoder_inputs_embeds": decoder_inputs_embeds,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        outputs = self.read(inputs, use_cache)
        states: Any = outputs.last_hidden_state
        place = last_end_of_sequence(input_ids, attention_mask, self.config.eos_token_id).to(states.device)
        logits = self.classification_head(states[torch.arange(len(states), device=states.device), place])
        loss = None if labels is None else sequence_loss(logits, labels.to(logits.device), self.config.problem_type)
        cls = Seq2SeqSequenceClassifierOutput if self.has_decoder else SequenceClassifierOutput
        return self.finish(cls(loss=loss, logits=logits, **without_last_state(outputs)), return_dict)


class FlashT5ForTokenClassification(FlashT5HeadedModel):
    """A label for every token, read off the encoder, in stock T5 as well."""

    def __init__(self, config: FlashT5Config) -> None:
        super().__init__(config, has_decoder=False)
        num_labels: Any = config.num_labels
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.d_model, num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> TokenClassifierOutput | tuple[torch.Tensor, ...]:
        """Logits `[B, L, num_labels]` and, given labels, the loss in fp32. Arguments as in `run`, and these:

        Args:
            labels: int64 `[B, L]`, -100 where nothing is to be predicted.
        """
        self.refuse_others(others)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        outputs = self.read(inputs)
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = mean_cross_entropy(logits.flatten(0, 1), labels.flatten())
        return self.finish(TokenClassifierOutput(loss=loss, logits=logits, **without_last_state(outputs)), return_dict)


class FlashT5ForQuestionAnswering(FlashT5HeadedModel):
    """Where in a sequence the answer begins, and where it ends.

    Raises:
        ValueError: if `config.num_labels` is not 2.
    """

    def __init__(self, config: FlashT5Config) -> None:
        if config.num_labels != 2:
            raise ValueError(f"Question answering has two outputs, start and end: `num_labels` is {config.num_labels}.")
        super().__init__(config, config.head_reads_decoder)
        self.qa_outputs = nn.Linear(config.d_model, 2)
        self.qa_outputs.init_std = config.d_model**-0.5
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: ModelOutput | tuple[torch.Tensor, ...] | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> QuestionAnsweringModelOutput | Seq2SeqQuestionAnsweringModelOutput | tuple[torch.Tensor, ...]:
        """Logits of start and end, `[B, L]` each, and, given positions, the loss in fp32. Arguments as in `run`, and:

        Args:
            start_positions: int64 `[B]`, first token of the answer; L or more where it is not in the sequence.
            end_positions: int64 `[B]`, its last token.
        """
        self.refuse_others(others)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "encoder_outputs": encoder_outputs,
            "inputs_embeds": inputs_embeds,
            "decoder_inputs_embeds": decoder_inputs_embeds,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        outputs = self.read(inputs, use_cache)
        logits = self.qa_outputs(outputs.last_hidden_state)  # [B, L, 2]
        loss = None
        if start_positions is not None and end_positions is not None:
            outside, losses = logits.shape[1], []
            for i, positions in enumerate((start_positions, end_positions)):
                losses.append(mean_cross_entropy(logits[..., i], positions.flatten().clamp(0, outside), outside))
            loss = (losses[0] + losses[1]) / 2
        cls = Seq2SeqQuestionAnsweringModelOutput if self.has_decoder else QuestionAnsweringModelOutput
        start, end = logits.unbind(-1)
        fields = without_last_state(outputs)
        return self.finish(
            cls(loss=loss, start_logits=start.contiguous(), end_logits=end.contiguous(), **fields), return_dict
        )


def without_last_state(outputs: Outputs) -> dict[str, Any]:
    """What a head hands on of the stacks' outputs: all but the state that it has read itself."""
    names = ["hidden_states", "attentions"]
    if isinstance(outputs, Seq2SeqModelOutput):
        names = [f"{stack}_{name}" for stack in ("encoder", "decoder") for name in names]
        names += ["past_key_values", "cross_attentions", "encoder_last_hidden_state"]
    return {name: getattr(outputs, name) for name in names}


def last_end_of_sequence(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, eos_token_id: int | list[int] | None
) -> torch.Tensor:
    """Place `[B]` of the last end-of-sequence token that is not padding, in ids `[B, L]`.

    Raises:
        ValueError: if a row has none, where looking does not break a graph.
    """
    ends = torch.isin(input_ids, torch.as_tensor(eos_token_id, device=input_ids.device))
    if attention_mask is not None and attention_mask.ndim == 2:  # a matrix does not say what is padding
        ends = ends & attention_mask.bool().to(ends.device)
    if host_may_look(ends.device) and not ends.any(1).all():
        raise ValueError(f"Every sequence must hold an end-of-sequence token (`eos_token_id` {eos_token_id}).")
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    return torch.where(ends, places, 0).amax(1)


def sequence_loss(logits: torch.Tensor, labels: torch.Tensor, problem_type: str | None) -> torch.Tensor:
    """Loss in fp32 of logits `[B, num_labels]`, by `problem_type`, or by the kind of labels where that is None."""
    if problem_type is None:
        if logits.shape[1] == 1:
            problem_type = "regression"
        else:
            problem_type = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
    if problem_type == "single_label_classification":
        return mean_cross_entropy(logits, labels.flatten())
    if problem_type == "regression":
        return F.mse_loss(logits.float(), labels.view_as(logits).float())
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float())


def mean_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Cross-entropy in fp32 of logits `[N, C]`, the mean over labels `[N]` not ignored; 0 where all of them are."""
    labels = labels.to(logits.device)
    total = F.cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)


FlashT5ForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
FlashT5ForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
FlashT5ForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
