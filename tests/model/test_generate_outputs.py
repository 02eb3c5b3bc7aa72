"""`generate` beyond tokens: what it returns beside them, speculation, and embeddings, all as in stock T5."""

import pytest
import torch
from model_parity import batch, build_flash, build_pair, build_stock
from transformers.cache_utils import Cache

FAMILY = "t5_v1_1"
ALL = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_attentions": True,
    "output_hidden_states": True,
}
MODES = {
    "greedy": {},
    "beam": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True},
    "beam_sampling": {"do_sample": True, "num_beams": 2},
}


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(3)
    return build_pair(FAMILY, "eager")


def flat(value):
    """All tensors of an output, in order; caches left out."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [] if value is None or isinstance(value, Cache) else [x for part in value for x in flat(part)]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_all_that_is_returned_is_stock_s(mode, use_cache, pair):
    inputs = batch("right")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    options = {**ALL, **MODES[mode], "max_new_tokens": 6, "min_new_tokens": 6, "use_cache": use_cache}
    outputs = []
    for model in pair:
        torch.manual_seed(5)
        outputs.append(model.generate(**inputs, **options))
    expected, output = outputs
    assert type(output) is type(expected)
    assert list(output) == list(expected)
    assert torch.equal(output.sequences, expected.sequences)
    real = inputs["attention_mask"].bool()
    for name in output:
        ours, stock = flat(output[name]), flat(expected[name])
        assert [x.shape for x in ours] == [x.shape for x in stock], name
        for x, y in zip(ours, stock, strict=True):
            if name == "encoder_hidden_states":
                x, y = x[real], y[real]  # what is padding has no meaning
            if name == "encoder_attentions":
                x, y = x.transpose(1, 2)[real], y.transpose(1, 2)[real]
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4, msg=name)


def test_speculation_changes_no_token(pair):
    stock, model = pair
    inputs = {"input_ids": batch("none", rows=1)["input_ids"], "max_new_tokens": 12, "do_sample": False}
    expected = stock.generate(**inputs)
    assert torch.equal(model.generate(**inputs), expected)
    assert torch.equal(model.generate(**inputs, prompt_lookup_num_tokens=2), expected)
    draft = build_stock(FAMILY, num_layers=1, num_decoder_layers=1)
    assistant = build_flash(FAMILY, draft, num_layers=1, num_decoder_layers=1)
    assert torch.equal(model.generate(**inputs, assistant_model=assistant), expected)
    assert torch.equal(model.generate(**inputs, assistant_model=model), expected)  # whose every token is accepted


@pytest.mark.parametrize("cache", [None, "static"])
def test_from_embeddings_by_every_cache(cache, pair):
    inputs = batch("right")
    given = {"inputs_embeds": pair[1].shared(inputs["input_ids"]), "attention_mask": inputs["attention_mask"]}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 2, "cache_implementation": cache}
    expected = pair[0].generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)
    assert torch.equal(pair[1].generate(**given, **options), expected)


@pytest.mark.parametrize("masked", [True, False])
def test_goes_on_from_the_cache_that_a_call_returned(masked, pair):
    """As stock T5 does, rightly so in transformers 5 if the decoder's mask says what is cached."""
    inputs = {name: x for name, x in batch("right").items() if name in ("input_ids", "attention_mask")}
    ends = []
    for model in pair:
        begun = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True)
        given = {"decoder_input_ids": begun.sequences, "past_key_values": begun.past_key_values}
        if masked:
            given["decoder_attention_mask"] = torch.ones_like(begun.sequences)
        ends.append(model.generate(**inputs, **given, max_new_tokens=5, min_new_tokens=5))
    assert torch.equal(*ends)
