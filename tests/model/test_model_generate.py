"""`generate` gives stock's tokens, with every kind of cache and with none."""

import pytest
import torch
from model_parity import batch, build_pair, relative_error
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from fat5.model import FlashT5Config, FlashT5ForConditionalGeneration

MODES = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.8},
    "beam_returns_all": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
}


def generate(model, inputs, **mode):
    torch.manual_seed(7)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return model.generate(**inputs, max_new_tokens=17, min_new_tokens=9, **mode)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["t5", "t5_v1_1", "mt5", "umt5", "byt5"])
def test_same_tokens_as_stock(family, mode, padding, implementation):
    stock, flash = build_pair(family, implementation)
    inputs = batch(padding)
    assert torch.equal(generate(flash, inputs, **MODES[mode]), generate(stock, inputs, **MODES[mode]))


@pytest.mark.parametrize("mode", ["greedy", "beam"])
@pytest.mark.parametrize("family", ["t5", "umt5", "byt5"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_static_cache_and_no_cache_give_the_same_tokens(family, mode, implementation):
    _, flash = build_pair(family, implementation)
    inputs = batch("right")
    expected = generate(flash, inputs, **MODES[mode])
    assert torch.equal(generate(flash, inputs, **MODES[mode], cache_implementation="static"), expected)
    assert torch.equal(generate(flash, inputs, **MODES[mode], use_cache=False), expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoder_prompt_with_padding(cache):
    _, flash = build_pair("t5_v1_1")
    inputs = batch("left", decoder_length=12)
    prompt = {name: inputs[name] for name in inputs if name != "labels"}
    first = (prompt["decoder_attention_mask"] == 0).sum(1)
    prompt["decoder_input_ids"][range(3), first] = 0  # the start token, which `generate` would prepend
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    together = flash.generate(**prompt, **options, **({} if cache == "dynamic" else {"cache_implementation": cache}))
    for row in range(3):  # each row alone, without its padding
        alone = {name: value[row : row + 1] for name, value in prompt.items()}
        pad = int((alone["decoder_attention_mask"] == 0).sum())
        alone["decoder_input_ids"] = alone["decoder_input_ids"][:, pad:]
        alone["decoder_attention_mask"] = alone["decoder_attention_mask"][:, pad:]
        assert torch.equal(flash.generate(**alone, **options)[0, -8:], together[row, -8:])


@pytest.mark.parametrize("family", ["t5", "umt5"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_cached_logits_equal_uncached(family, implementation):
    _, flash = build_pair(family, implementation)
    inputs = batch("right")
    ids = inputs["decoder_input_ids"]
    given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with torch.no_grad():
        expected = flash(**given, decoder_input_ids=ids, use_cache=False).logits
        pieces = []
        for chunk in ids.split([5, 1, 1, 9, 7], dim=1):
            pieces.append(flash(**given, decoder_input_ids=chunk, past_key_values=cache, use_cache=True).logits)
    assert relative_error(torch.cat(pieces, dim=1), expected) < 1e-5


def test_decoder_deeper_than_encoder():
    shape = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_heads": 2}
    model = FlashT5ForConditionalGeneration(FlashT5Config(**shape, num_layers=1, num_decoder_layers=3)).eval()
    inputs = {"input_ids": torch.randint(2, 50, (2, 9)), "max_new_tokens": 6, "min_new_tokens": 6}
    expected = model.generate(**inputs, use_cache=False)
    assert torch.equal(model.generate(**inputs), expected)
    assert torch.equal(model.generate(**inputs, cache_implementation="static"), expected)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
def test_a_prompt_is_read_whole_whatever_the_size_of_chunks(cache):
    _, flash = build_pair("t5_v1_1")
    inputs = batch("right", decoder_length=12)
    prompt = {"decoder_input_ids": inputs["decoder_input_ids"], **cache}
    expected = generate(flash, inputs, **prompt)
    assert torch.equal(generate(flash, inputs, **prompt, prefill_chunk_size=4), expected)
    flash.generation_config.prefill_chunk_size = 4
    assert torch.equal(generate(flash, inputs, **prompt), expected)
    assert flash.generation_config.prefill_chunk_size == 4


def test_packed_rows_are_refused():
    _, flash = build_pair("t5")
    inputs = batch("none")
    with pytest.raises(ValueError, match="unpacked"):
        flash.generate(inputs["input_ids"], encoder_segment_ids=inputs["attention_mask"], max_new_tokens=2)


def test_from_embeddings():
    _, flash = build_pair("t5_v1_1")
    inputs = batch("right")
    embedded = {"inputs_embeds": flash.shared(inputs["input_ids"]), "attention_mask": inputs["attention_mask"]}
    expected = generate(flash, inputs)
    assert torch.equal(flash.generate(**embedded, max_new_tokens=17, min_new_tokens=9), expected)
