"""FlashT5 computes what stock transformers computes with the same weights."""

import pytest
import torch
from model_parity import FAMILIES, batch, build_pair, flash_name, relative_error
from transformers.models.t5.modeling_t5 import T5LayerNorm

from fat5.model.layers_flash_t5 import FlashT5LayerNorm

TOLERANCE = {"eager": 1e-5, "sdpa": 1e-4}
implementations = pytest.mark.parametrize("implementation", ["eager", "sdpa"])
families = pytest.mark.parametrize("family", FAMILIES)


@implementations
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@families
def test_logits_loss_and_encoder_states(family, padding, implementation):
    stock, flash = build_pair(family, implementation)
    inputs = batch(padding)
    with torch.no_grad():
        expected, actual = stock(**inputs), flash(**inputs)
    tolerance = TOLERANCE[implementation]
    real = inputs["decoder_attention_mask"].bool()
    assert relative_error(actual.logits[real], expected.logits[real]) < tolerance
    assert actual.loss.item() == pytest.approx(expected.loss.item(), rel=tolerance)
    real = inputs["attention_mask"].bool()
    states = actual.encoder_last_hidden_state, expected.encoder_last_hidden_state
    assert relative_error(states[0][real], states[1][real]) < tolerance


@implementations
@pytest.mark.parametrize("padding", ["right", "left"])
@families
def test_gradient_of_every_parameter(family, padding, implementation):
    stock, flash = build_pair(family, implementation)
    inputs = batch(padding)
    stock(**inputs).loss.backward()
    flash(**inputs).loss.backward()
    gradients = {name: parameter.grad for name, parameter in flash.named_parameters()}
    compared = set()
    for name, parameter in stock.named_parameters():
        assert relative_error(gradients[flash_name(name)], parameter.grad) < 1e-4, name
        compared.add(flash_name(name))
    assert compared == set(gradients)


@pytest.mark.parametrize("family", ["t5", "t5_v1_1"])
def test_without_decoder_inputs_the_labels_are_shifted_right(family):
    stock, flash = build_pair(family)
    inputs = batch("right")
    del inputs["decoder_input_ids"], inputs["decoder_attention_mask"]
    with torch.no_grad():
        expected, actual = stock(**inputs), flash(**inputs)
    assert relative_error(actual.logits, expected.logits) < 1e-4
    assert actual.loss.item() == pytest.approx(expected.loss.item(), rel=1e-4)


@pytest.mark.parametrize("family", ["t5", "umt5", "byt5"])
def test_hidden_states_and_attentions_have_stock_structure(family):
    stock, flash = build_pair(family, "eager")
    inputs = {**batch("right"), "output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected, actual = stock(**inputs), flash(**inputs)
    rows = {"encoder": inputs["attention_mask"].bool(), "decoder": inputs["decoder_attention_mask"].bool()}
    for stack, real in rows.items():
        ours, theirs = actual[f"{stack}_hidden_states"], expected[f"{stack}_hidden_states"]
        assert len(ours) == len(theirs)
        for state, stock_state in zip(ours, theirs, strict=True):
            assert relative_error(state[real], stock_state[real]) < 1e-5
    for name in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        real = rows["encoder" if name == "encoder_attentions" else "decoder"]
        assert len(actual[name]) == len(expected[name])
        for weights, stock_weights in zip(actual[name], expected[name], strict=True):
            assert weights.shape == stock_weights.shape
            of_real_queries = weights.transpose(1, 2)[real], stock_weights.transpose(1, 2)[real]
            assert relative_error(*of_real_queries) < 1e-5


def test_sdpa_gives_attentions_by_running_eager():
    stock, flash = build_pair("t5_v1_1", "sdpa")
    inputs = {**batch("none"), "output_attentions": True}
    with torch.no_grad():
        expected, actual = stock(**inputs), flash(**inputs)
    assert relative_error(actual.cross_attentions[1], expected.cross_attentions[1]) < 1e-5


def test_tuple_output_has_the_order_of_stock():
    stock, flash = build_pair("t5", "eager")
    inputs = {**batch("none"), "output_hidden_states": True, "output_attentions": True, "use_cache": True}
    with torch.no_grad():
        expected, actual = stock(**inputs, return_dict=False), flash(**inputs, return_dict=False)
    assert [type(value) for value in actual] == [type(value) for value in expected]
    assert relative_error(actual[1], expected[1]) < 1e-5


@implementations
def test_embeddings_in_place_of_ids(implementation):
    _, flash = build_pair("t5_v1_1", implementation)
    inputs = batch("right")
    embedded = {**inputs}
    embedded["inputs_embeds"] = flash.shared(embedded.pop("input_ids"))
    embedded["decoder_inputs_embeds"] = flash.shared(embedded.pop("decoder_input_ids"))
    with torch.no_grad():
        assert torch.equal(flash(**embedded).logits, flash(**inputs).logits)


@implementations
def test_bf16_stays_near_fp32(implementation):
    stock, flash = build_pair("t5_v1_1", implementation)
    inputs = batch("right")
    real = inputs["decoder_attention_mask"].bool()
    with torch.no_grad():
        expected = stock(**inputs).logits[real]
        from_stock = stock.bfloat16()(**inputs).logits[real].float()
        actual = flash.bfloat16()(**inputs)
    assert actual.logits.dtype == torch.bfloat16
    assert actual.loss.dtype == torch.float32
    error, stock_error = (actual.logits[real].float() - expected).norm(), (from_stock - expected).norm()
    assert error < 1.5 * stock_error < 0.15 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_is_that_of_stock_bit_for_bit(dtype):
    ours, stock = FlashT5LayerNorm(64, eps=1e-6).to(dtype), T5LayerNorm(64, eps=1e-6).to(dtype)
    with torch.no_grad():
        ours.weight.normal_()
        stock.weight.copy_(ours.weight)
    states = 1000 * torch.randn(5, 64, dtype=dtype)  # the squares exceed fp16's range
    assert torch.equal(ours(states)[0], stock(states))
    assert ours(states)[0].isfinite().all()
    assert torch.equal(ours(states.float())[0], stock(states.float()))  # the residual stream may be fp32


def test_inputs_that_contradict_each_other_are_refused():
    _, flash = build_pair("t5")
    inputs = batch("none")
    with pytest.raises(ValueError, match="exactly one of `input_ids`"):
        flash(attention_mask=inputs["attention_mask"], decoder_input_ids=inputs["decoder_input_ids"])
    with pytest.raises(ValueError, match=r"must be \[batch, 37\]"):
        flash(**{**inputs, "attention_mask": inputs["attention_mask"][:, 1:]})
    with pytest.raises(ValueError, match="neither"):
        flash(**inputs, encoder_segment_ids=inputs["attention_mask"])
