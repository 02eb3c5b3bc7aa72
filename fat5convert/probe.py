"""The fixed inputs that models are compared on, and how a model is run on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from fat5convert.heads import Head
from fat5convert.layout import Layout

# Beyond 128 positions, so that the far buckets are seen from both sides; the shorter rows are padded.
ENCODER_LENGTHS = (160, 57, 3)
DECODER_LENGTHS = (140, 24, 2)


@dataclass(frozen=True)
class Probe:
    """Token ids made from a fixed seed, padded on the right: the same for every model of a vocabulary."""

    input_ids: torch.Tensor  # [B, Le]
    attention_mask: torch.Tensor  # [B, Le]
    decoder_input_ids: torch.Tensor  # [B, Ld]
    labels: torch.Tensor  # [B, Ld], -100 where padded


@dataclass(frozen=True)
class Outputs:
    """What a model computes on the probe, at real positions only."""

    encoder: torch.Tensor  # [real encoder positions, D]
    logits: torch.Tensor | None = None  # [real decoder positions, V], or a head's [N, labels]; None for encoders
    loss: float | None = None  # of language models


def make_probe(config: Mapping[str, Any], layout: Layout) -> Probe:
    """Random token ids for batch rows of unequal length, for a model of this (FlashT5) configuration.

    For a head that reads the state at the end-of-sequence token every row ends in one, and has no other; the decoder of
    a head reads the encoder's tokens.
    """
    vocab_size, pad, start = config["vocab_size"], config["pad_token_id"] or 0, config["decoder_start_token_id"]
    generator = torch.Generator().manual_seed(0)
    rows, longest, target = len(ENCODER_LENGTHS), max(ENCODER_LENGTHS), max(DECODER_LENGTHS)
    input_ids = torch.randint(vocab_size, (rows, longest), generator=generator)
    labels = torch.randint(vocab_size, (rows, target), generator=generator)
    attention_mask = (torch.arange(longest) < torch.tensor(ENCODER_LENGTHS)[:, None]).long()
    if layout.head is not None and layout.head.task == "SequenceClassification":
        end = config["eos_token_id"]
        input_ids = torch.where(input_ids == end, (end + 1) % vocab_size, input_ids)
        input_ids[torch.arange(rows), torch.tensor(ENCODER_LENGTHS) - 1] = end
    input_ids = input_ids.masked_fill(attention_mask == 0, pad)
    real_labels = torch.arange(target) < torch.tensor(DECODER_LENGTHS)[:, None]
    # Shifted here, as models cannot do it whose padding token is null.
    first = torch.full((rows, 1), start or 0)
    targets = labels.masked_fill(~real_labels, pad) if layout.head is None else input_ids
    decoder_input_ids = torch.cat([first, targets[:, :-1]], dim=1)
    return Probe(input_ids, attention_mask, decoder_input_ids, labels.masked_fill(~real_labels, -100))


@torch.no_grad()
def run_probe(model: Any, probe: Probe, layout: Layout, *, unscaled: bool = False, own_loss: bool = False) -> Outputs:
    """Run a model.

    Args:
        model: stock or FAT5, in any dtype.
        probe: the inputs.
        layout: says what there is to compare.
        unscaled: apply the head to the decoder's states as they are, whatever the model does.
        own_loss: let the model compute the loss, which takes the memory of two more copies of its logits.

    Returns:
        What it computes, in fp32.
    """
    if layout.head is not None:
        return _run_head(model, probe, layout.head)
    seen = probe.attention_mask == 1
    if layout.encoder_only:
        output = model(input_ids=probe.input_ids, attention_mask=probe.attention_mask)
        return Outputs(output.last_hidden_state[seen].float())
    output = model(
        input_ids=probe.input_ids,
        attention_mask=probe.attention_mask,
        decoder_input_ids=probe.decoder_input_ids,
        labels=probe.labels if own_loss and not unscaled else None,
        output_hidden_states=unscaled,
        use_cache=False,
    )
    real = probe.labels != -100
    logits = model.lm_head(output.decoder_hidden_states[-1]) if unscaled else output.logits
    logits, loss = logits[real].float(), output.loss
    if loss is None:
        loss = F.cross_entropy(logits, probe.labels[real])
    return Outputs(output.encoder_last_hidden_state[seen].float(), logits, float(loss))


def _run_head(model: Any, probe: Probe, head: Head) -> Outputs:
    inputs: dict[str, Any] = {"input_ids": probe.input_ids, "attention_mask": probe.attention_mask}
    if head.reads_decoder:
        output = model(**inputs, decoder_input_ids=probe.decoder_input_ids, use_cache=False)
        encoder = output.encoder_last_hidden_state
    else:
        output = model(**inputs, output_hidden_states=True)
        encoder = output.hidden_states[-1]
    seen = probe.attention_mask == 1
    if head.task == "QuestionAnswering":
        logits = torch.stack([output.start_logits, output.end_logits], dim=-1)[seen]
    else:
        logits = output.logits[seen] if head.task == "TokenClassification" else output.logits
    return Outputs(encoder[seen].float(), logits.float())
