"""What scripts for stock T5 read off a model beside its outputs: there under the same names, and the same."""

import copy

import pytest
import torch
from model_parity import SHAPE, build_pair
from transformers import T5Config, T5Model

from fat5.model import FlashT5Config, FlashT5EncoderModel, FlashT5ForTokenClassification, FlashT5Model


def stacks(model):
    return [getattr(model, name) for name in ("encoder", "decoder") if hasattr(model, name)]


@pytest.mark.parametrize("cls", [FlashT5Model, FlashT5EncoderModel])
def test_stacks_say_where_and_what_they_are(cls):
    model = cls(FlashT5Config(**SHAPE))
    for moved in (model, copy.deepcopy(model).to("meta", torch.bfloat16)):
        for stack in stacks(moved):
            assert stack.device == moved.device
            assert stack.dtype == moved.dtype
            assert stack.embed_tokens is stack.get_input_embeddings() is moved.shared
            assert stack.num_parameters() == sum(weight.numel() for weight in stack.parameters())


def test_stacks_follow_the_embedding_and_do_not_own_it():
    _, flash = build_pair("t5_v1_1")
    flash.resize_token_embeddings(120, mean_resizing=False)
    assert flash.encoder.embed_tokens.num_embeddings == 120
    assert not any("embed" in name for name in flash.state_dict())
    ids = torch.randint(2, 99, (2, 5))
    embedded = flash.encoder(inputs_embeds=flash.encoder.embed_tokens(ids)).last_hidden_state
    assert torch.equal(embedded, flash.encoder(ids).last_hidden_state)
    with pytest.raises(AttributeError, match="set_input_embeddings"):
        flash.encoder.embed_tokens = torch.nn.Embedding(120, 8)


def test_a_stack_takes_its_inputs_in_the_order_of_stock():
    stock, flash = build_pair("t5_v1_1")
    ids = torch.randint(2, 99, (2, 7))
    mask = torch.ones_like(ids)
    for model in (stock, flash):
        encoder_mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
        states = model.encoder(ids, encoder_mask)[0]
        alone = model.decoder(ids, mask, states, encoder_mask).last_hidden_state
        whole = model(ids, encoder_mask, ids, mask, output_hidden_states=True).decoder_hidden_states[-1]
        torch.testing.assert_close(alone, whole)


def test_labels_are_shifted_as_in_stock():
    stock, flash = build_pair("t5_v1_1")
    labels = torch.tensor([[5, 6, 1, -100, -100], [7, 8, 9, 10, 1]])
    assert torch.equal(flash._shift_right(labels), stock._shift_right(labels))
    assert torch.equal(flash.prepare_decoder_input_ids_from_labels(labels), stock._shift_right(labels))


def test_sizes():
    stock, flash = build_pair("t5_v1_1")
    assert flash.model_dim == stock.model_dim == 32
    assert FlashT5ForTokenClassification(FlashT5Config(**SHAPE, num_labels=3)).num_labels == 3


def test_parts_are_found_as_in_stock():
    stock, flash = T5Model(T5Config(**SHAPE, attn_implementation="eager")), FlashT5Model(FlashT5Config(**SHAPE))
    for model in (stock, flash):
        assert model.get_encoder() is model.encoder
        assert model.get_decoder() is model.decoder
        assert model.get_input_embeddings() is model.shared
