"""4-d attention masks: what stock T5 computes with them, or what masks of keys say in another form."""

import inspect

import pytest
import torch
from model_parity import SHAPE, build_flash, build_pair, relative_error
from position_kinds import kind_model
from transformers import T5ForConditionalGeneration

import fat5.model.attention_mask
from fat5.model import FlashT5Config, FlashT5ForSequenceClassification

LEAST = torch.finfo(torch.float32).min
implementations = pytest.mark.parametrize("implementation", ["eager", "sdpa", "fat5"])
STOCK_OF_4 = "cache_position" in inspect.signature(T5ForConditionalGeneration.forward).parameters


def inputs():
    return {"input_ids": torch.randint(2, 99, (3, 11)), "decoder_input_ids": torch.randint(2, 99, (3, 11))}


def added(allowed):
    """The mask of floats that says the same."""
    return torch.zeros(allowed.shape).masked_fill(~allowed, LEAST)


def any_matrix(*shape):
    """Who sees whom at random, everyone at least itself or the first."""
    allowed = torch.rand(shape) < 0.5
    allowed[..., 0] = True
    return allowed


@implementations
def test_floats_are_added_as_in_stock(implementation):
    stock, flash = build_pair("t5_v1_1", implementation)
    given = inputs()
    # T5 of transformers 4 takes the decoder's alone
    masks = {"decoder_attention_mask": added(any_matrix(3, 1, 11, 11)) + torch.randn(3, 4, 11, 11)}
    if not STOCK_OF_4:
        masks["attention_mask"] = added(any_matrix(3, 1, 11, 11)) + torch.randn(1, 4, 11, 11)
    stock_output, output = stock(**given, **masks), flash(**given, **masks)
    assert relative_error(output.logits, stock_output.logits) < 1e-4
    assert relative_error(output.logits, flash(**given).logits) > 1e-2
    gradients = []
    for model, loss in ((stock, stock_output.logits), (flash, output.logits)):
        model.zero_grad()
        loss.square().sum().backward()
        gradients.append(model.shared.weight.grad)
    assert relative_error(gradients[1], gradients[0]) < 1e-4


@implementations
@pytest.mark.parametrize("kind", ["t5", "rope", "fire", "alibi_asymmetric"])
def test_a_bool_matrix_says_what_a_mask_of_keys_does(kind, implementation):
    flash = kind_model(kind, implementation)
    given = inputs()
    keys = torch.ones(3, 11, dtype=torch.long)
    keys[1, 7:] = keys[2, 4:] = 0
    real = keys.bool()
    expected = flash(**given, attention_mask=keys, decoder_attention_mask=keys)
    allowed = real[:, None, None]
    causal = torch.ones(11, 11, dtype=torch.bool).tril()
    for form in (lambda x: x, added):
        actual = flash(**given, attention_mask=form(allowed), decoder_attention_mask=form(allowed & causal))
        assert relative_error(actual.logits[real], expected.logits[real]) < 1e-5


@implementations
def test_a_decoder_s_matrix_says_all_of_what_it_sees(implementation):
    """As in stock, causality is not added to it."""
    _, flash = build_pair("t5_v1_1", implementation)
    given = inputs()
    everything = torch.ones(1, 1, 11, 11, dtype=torch.bool)
    before = flash(**given, decoder_attention_mask=everything).logits[:, 0]
    given["decoder_input_ids"][:, -1] = 3
    assert not torch.equal(flash(**given, decoder_attention_mask=everything).logits[:, 0], before)


def test_with_a_cache_it_covers_the_cached_keys():
    _, flash = build_pair("t5_v1_1")
    given = inputs()
    allowed = any_matrix(3, 1, 11, 11) & torch.ones(11, 11, dtype=torch.bool).tril()
    whole = flash(**given, decoder_attention_mask=allowed).logits
    ids = given.pop("decoder_input_ids")
    begin = flash(**given, decoder_input_ids=ids[:, :6], decoder_attention_mask=allowed[:, :, :6, :6], use_cache=True)
    rest = flash(
        **given,
        decoder_input_ids=ids[:, 6:],
        decoder_attention_mask=allowed[:, :, 6:],
        past_key_values=begin.past_key_values,
    )
    torch.testing.assert_close(torch.cat([begin.logits, rest.logits], dim=1), whole)


@implementations
def test_rows_without_any_key_give_no_nan(implementation):
    stock, _ = build_pair("t5_v1_1")
    flash = build_flash("t5_v1_1", stock, implementation).half()
    nothing = torch.ones(1, 1, 11, 11, dtype=torch.bool)
    nothing[:, :, 4] = False
    for mask in (nothing, added(nothing), torch.zeros(nothing.shape).masked_fill(~nothing, -torch.inf)):
        assert flash.encoder(inputs()["input_ids"], mask).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_rows_without_any_key_give_what_a_row_of_padding_does(implementation):
    _, flash = build_pair("t5_v1_1", implementation)
    ids = inputs()["input_ids"]
    keys = torch.ones(3, 11, dtype=torch.bool)
    keys[1] = False
    expected = flash.encoder(ids, keys).last_hidden_state
    torch.testing.assert_close(flash.encoder(ids, keys[:, None, None]).last_hidden_state, expected)


def test_a_matrix_leaves_the_kernels_and_their_packing(monkeypatch):
    monkeypatch.setattr(fat5.model.attention_mask, "kernels_serve", lambda _: True)
    stock, eager = build_pair("t5_v1_1", "eager")
    flash = build_flash("t5_v1_1", stock, "fat5")
    labels = torch.randint(2, 99, (3, 11))
    labels[1, 6:] = -100  # behind which the decoder has nothing to compute
    given = {"input_ids": inputs()["input_ids"], "attention_mask": any_matrix(3, 1, 11, 11), "labels": labels}
    output, expected = flash(**given), eager(**given)
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert relative_error(output.encoder_last_hidden_state, expected.encoder_last_hidden_state) < 1e-5


def test_sequence_classification_reads_the_last_end_whatever_the_matrix_says():
    model = FlashT5ForSequenceClassification(FlashT5Config(**SHAPE)).eval()
    ids = torch.tensor([[5, 8, 1, 0], [7, 5, 8, 1]])
    expected = model(ids, attention_mask=(ids != 0).long()).logits
    torch.testing.assert_close(model(ids, attention_mask=(ids != 0)[:, None, None]).logits, expected)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(3, 1, 11, 11, dtype=torch.long),
        torch.ones(3, 1, 11, 10, dtype=torch.bool),
        torch.ones(3, 1, 4, 11, dtype=torch.bool),
    ],
)
def test_what_does_not_fit_is_refused_by_name(mask):
    _, flash = build_pair("t5_v1_1")
    with pytest.raises(ValueError, match=r"4-d attention mask must be .* 11 or 1, 11\], got"):
        flash(**inputs(), attention_mask=mask)
    ids = torch.randint(2, 99, (3, 5))
    with pytest.raises(ValueError, match="run the encoder first"):
        flash(ids, torch.ones(3, 1, 5, 5, dtype=torch.bool), decoder_input_ids=ids[:, :4])
