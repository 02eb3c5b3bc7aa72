"""Arguments beyond those that `forward` names: stock T5 takes them all, ours those that change nothing."""

import inspect

import pytest
import torch
from model_parity import SHAPE
from transformers import (
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5ForQuestionAnswering,
    T5ForSequenceClassification,
    T5ForTokenClassification,
    T5Model,
)

from fat5.model import (
    FlashT5Config,
    FlashT5EncoderModel,
    FlashT5ForConditionalGeneration,
    FlashT5ForQuestionAnswering,
    FlashT5ForSequenceClassification,
    FlashT5ForTokenClassification,
    FlashT5Model,
)

PAIRS = {
    FlashT5Model: T5Model,
    FlashT5ForConditionalGeneration: T5ForConditionalGeneration,
    FlashT5EncoderModel: T5EncoderModel,
    FlashT5ForSequenceClassification: T5ForSequenceClassification,
    FlashT5ForTokenClassification: T5ForTokenClassification,
    FlashT5ForQuestionAnswering: T5ForQuestionAnswering,
}
IDS = torch.tensor([[5, 8, 40, 1], [9, 3, 17, 1]])
OF_NO_EFFECT = {
    "cache_position": torch.arange(4),
    "position_ids": torch.tensor([[3, 2, 1, 0]]),
    "num_items_in_batch": torch.tensor(7),
    "token_type_ids": torch.ones_like(IDS),
    "special_tokens_mask": torch.ones_like(IDS),
    "offset_mapping": torch.zeros(2, 4, 2),
    "head_mask": None,
}
every_model = pytest.mark.parametrize("cls", PAIRS)


def inputs_of(cls):
    return {"input_ids": IDS} | ({"decoder_input_ids": IDS} if "decoder_input_ids" in parameters(cls) else {})


def parameters(cls):
    return inspect.signature(cls.forward).parameters


def build(cls, config_cls, **fields):
    torch.manual_seed(0)
    return cls(config_cls(**SHAPE, attn_implementation="eager", **fields)).eval()


def first(output):
    return next(value for value in output.values() if isinstance(value, torch.Tensor))


@every_model
def test_what_changes_nothing_in_stock_is_taken_and_changes_nothing(cls):
    pairs = [(cls, build(cls, FlashT5Config, head_reads_decoder=True))]
    stock = PAIRS[cls]
    if "kwargs" in parameters(stock):  # not in transformers 4, whose T5 names what it takes
        pairs.append((stock, build(stock, T5Config)))
    for kind, model in pairs:
        inputs = inputs_of(kind)
        expected = first(model(**inputs))
        for name, value in OF_NO_EFFECT.items():
            assert torch.equal(first(model(**inputs, **{name: value})), expected), (kind, name)


@every_model
def test_what_stock_takes_by_name_is_taken_or_refused_by_name(cls):
    """Stock of transformers 4 names head masks, which transformers 5 has given up and ignores."""
    model = build(cls, FlashT5Config, head_reads_decoder=True)
    for name in parameters(PAIRS[cls]).keys() - parameters(cls).keys() - OF_NO_EFFECT.keys() - {"kwargs"}:
        assert name.endswith("head_mask")
        with pytest.raises(TypeError, match=f"{cls.__name__} has no argument {name}"):
            model(**inputs_of(cls), **{name: torch.ones(2, 4)})


@every_model
@pytest.mark.parametrize("name", ["is_causal", "cu_seq_lens_q", "head_mask", "atention_mask"])
def test_what_would_be_expected_to_matter_is_refused(cls, name):
    model = build(cls, FlashT5Config, head_reads_decoder=True)
    with pytest.raises(TypeError, match=f"{cls.__name__} has no argument {name}: it would have no effect"):
        model(**inputs_of(cls), **{name: torch.ones(2)})
