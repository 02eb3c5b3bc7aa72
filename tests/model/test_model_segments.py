"""Examples packed in one row compute what they compute alone; rows that see nothing give zeros."""

import copy

import pytest
import torch
from model_parity import FAMILIES, SHAPE, build_pair, relative_error

from fat5.model import FlashT5Config, FlashT5EncoderModel, FlashT5ForConditionalGeneration
from fat5.model.attention import AttentionMask, FlashT5Attention

LENGTHS = [[(9, 5), (14, 8), (3, 11)], [(20, 2), (6, 9)]]  # (encoder, decoder) of the examples in each row


def examples():
    return [
        [(torch.randint(2, 99, (encoder,)), torch.randint(2, 99, (decoder,))) for encoder, decoder in row]
        for row in LENGTHS
    ]


def packed(rows, pad_left: int = 0, encoder_length: int = 31, decoder_length: int = 27):
    """One row for each list of examples: segment 0 is padding, on the left and on the right."""
    shape = {"encoder": (len(rows), encoder_length), "decoder": (len(rows), decoder_length)}
    batch = {
        "input_ids": torch.randint(2, 99, shape["encoder"]),  # whatever stands in the padding must not matter
        "labels": torch.full(shape["decoder"], -100),
        "encoder_segment_ids": torch.zeros(shape["encoder"], dtype=torch.long),
        "decoder_segment_ids": torch.zeros(shape["decoder"], dtype=torch.long),
    }
    for row, row_examples in enumerate(rows):
        at_encoder = at_decoder = pad_left
        for segment, (source, target) in enumerate(row_examples, start=1):
            batch["input_ids"][row, at_encoder : at_encoder + len(source)] = source
            batch["encoder_segment_ids"][row, at_encoder : at_encoder + len(source)] = segment
            batch["labels"][row, at_decoder : at_decoder + len(target)] = target
            batch["decoder_segment_ids"][row, at_decoder : at_decoder + len(target)] = segment
            at_encoder, at_decoder = at_encoder + len(source), at_decoder + len(target)
    return batch


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("pad_left", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_one_by_one_in_stock(family, pad_left, implementation):
    stock, flash = build_pair(family, implementation)
    rows = examples()
    flat = [example for row in rows for example in row]
    tokens = sum(len(target) for _, target in flat)
    with torch.no_grad():
        total = sum(stock(input_ids=source[None], labels=target[None]).loss * len(target) for source, target in flat)
    flash.double()  # what rounding alone does to gradients would hide small mistakes
    inputs = packed(rows, pad_left)
    output = flash(**inputs)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(total.item() / tokens, rel=1e-5)
    alone = copy.deepcopy(flash)
    alone.zero_grad()
    for source, target in flat:
        (alone(input_ids=source[None], labels=target[None]).loss * len(target) / tokens).backward()
    for (name, one), two in zip(flash.named_parameters(), alone.parameters(), strict=True):
        assert relative_error(one.grad, two.grad) < 1e-5, name


def test_attention_mask_and_segments_combine():
    _, flash = build_pair("t5")
    inputs = packed(examples())
    hidden = inputs["encoder_segment_ids"] == 2
    masked = {**inputs, "attention_mask": (~hidden).long()}
    dropped = {**inputs, "encoder_segment_ids": inputs["encoder_segment_ids"].masked_fill(hidden, 0)}
    with torch.no_grad():
        real = inputs["decoder_segment_ids"] > 0
        assert relative_error(flash(**masked).logits[real], flash(**dropped).logits[real]) < 1e-6


def test_encoder_model_takes_segments():
    model = FlashT5EncoderModel(FlashT5Config(**SHAPE)).eval()
    inputs = packed(examples())
    with torch.no_grad():
        together = model(inputs["input_ids"], encoder_segment_ids=inputs["encoder_segment_ids"]).last_hidden_state
        alone = model(inputs["input_ids"][:1, 9:23]).last_hidden_state
    assert relative_error(together[:1, 9:23], alone) < 1e-5


def test_segments_cannot_follow_a_cache():
    _, flash = build_pair("t5")
    inputs = packed(examples())
    cache = flash(**inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot be continued"):
        flash(**inputs, past_key_values=cache)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_of_a_query_without_keys_is_zero(dtype, implementation):
    config = FlashT5Config(**SHAPE, attn_implementation=implementation)
    attention = FlashT5Attention(config, layer_idx=0, is_decoder=True, has_position_bias=True).to(dtype).eval()
    states = torch.randn(2, 6, 32, dtype=dtype, requires_grad=True)
    mask = AttentionMask(6, 6, states.device, causal=True, key_mask=torch.tensor([[0] * 6, [0, 0, 1, 1, 1, 1]]).bool())
    output, _, _ = attention(states, mask.build_dense())
    output.float().square().sum().backward()
    assert torch.equal(output[0], torch.zeros_like(output[0]))
    assert torch.equal(output[1, :2], torch.zeros_like(output[1, :2]))
    assert output[1, 2:].abs().min() > 0
    assert states.grad.isfinite().all()
    assert states.grad[0].abs().max() == 0
    assert all(parameter.grad.isfinite().all() for parameter in attention.parameters())


def test_padding_belongs_to_no_segment():
    attention = FlashT5Attention(FlashT5Config(**SHAPE, attn_implementation="eager"), 0, False, True).eval()
    states, segments = torch.randn(1, 6, 32), torch.tensor([[0, 1, 1, 0, 2, 0]])
    mask = AttentionMask(6, 6, states.device, query_segments=segments, key_segments=segments).build_dense()
    output, _, weights = attention(states, mask, output_attentions=True)
    assert torch.equal(output.abs().sum(-1) > 0, segments > 0)
    assert torch.equal(weights[0, 0, 1] > 0, segments[0] == 1)
    assert torch.equal(weights[0, 0, 4] > 0, segments[0] == 2)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_example_that_is_all_padding_gives_no_nan_and_disturbs_nobody(implementation):
    _, flash = build_pair("t5_v1_1", implementation)
    ids, labels = torch.randint(2, 99, (2, 8)), torch.randint(2, 99, (2, 6))
    labels[1] = -100
    mask = torch.tensor([[1] * 8, [0] * 8])
    output = flash(input_ids=ids, attention_mask=mask, labels=labels, decoder_attention_mask=mask[:, :6])
    output.loss.backward()
    assert output.logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in flash.parameters())
    alone = flash(input_ids=ids[:1], labels=labels[:1])
    assert output.loss.item() == pytest.approx(alone.loss.item(), rel=1e-6)


def test_labels_are_shifted_within_their_segment():
    model = FlashT5ForConditionalGeneration(FlashT5Config(**{**SHAPE, "decoder_start_token_id": 3}, pad_token_id=1))
    labels = torch.tensor([[11, 12, 13, 21, 22, -100, -100]])
    segments = torch.tensor([[1, 1, 1, 2, 2, 0, 0]])
    assert model.prepare_decoder_input_ids_from_labels(labels, segments).tolist() == [[3, 11, 12, 3, 21, 3, 1]]
    assert model.prepare_decoder_input_ids_from_labels(labels).tolist() == [[3, 11, 12, 13, 21, 22, 1]]
