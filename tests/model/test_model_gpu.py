"""The same on a GPU: parity, gradients, rows without keys, autocast, and the compiled static cache."""

import pytest
import torch
from model_parity import batch, build_pair, flash_name, relative_error
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

pytestmark = pytest.mark.gpu
implementations = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


def on_gpu(*models):
    return [model.cuda() for model in models]


def cuda_batch(padding):
    return {name: value.cuda() for name, value in batch(padding).items()}


@implementations
@pytest.mark.parametrize("family", ["t5", "t5_v1_1", "umt5"])
def test_logits_and_gradients_in_fp32(family, implementation):
    stock, flash = on_gpu(*build_pair(family, implementation))
    inputs = cuda_batch("right")
    expected, actual = stock(**inputs), flash(**inputs)
    real = inputs["decoder_attention_mask"].bool()
    assert relative_error(actual.logits[real], expected.logits[real]) < 1e-4
    expected.loss.backward()
    actual.loss.backward()
    gradients = {name: parameter.grad for name, parameter in flash.named_parameters()}
    for name, parameter in stock.named_parameters():
        assert relative_error(gradients[flash_name(name)], parameter.grad) < 1e-3, name


@implementations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_with_rows_that_see_nothing(dtype, autocast, implementation):
    (flash,) = on_gpu(build_pair("t5_v1_1", implementation)[1])
    inputs = cuda_batch("left")
    with torch.no_grad():
        expected = flash(**inputs).logits
    inputs["attention_mask"][2] = 0
    if not autocast:
        flash.to(dtype)
    with torch.autocast("cuda", dtype, enabled=autocast):
        output = flash(**inputs)
    output.loss.backward()
    assert output.logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in flash.parameters())
    real = inputs["decoder_attention_mask"].bool()
    real[2] = False
    assert relative_error(output.logits[real].float(), expected[real]) < 0.2


@pytest.mark.parametrize("decoder_mask", [True, False])
@pytest.mark.parametrize("family", ["t5_v1_1", "byt5"])
def test_compiled_static_cache_gives_the_same_tokens(family, decoder_mask):
    (flash,) = on_gpu(build_pair(family)[1])
    inputs = cuda_batch("right")
    names = ["input_ids", "attention_mask"]
    prompt = {name: inputs[name] for name in names + ["decoder_attention_mask", "decoder_input_ids"] * decoder_mask}
    if decoder_mask:
        prompt["decoder_attention_mask"] = torch.ones_like(prompt["decoder_attention_mask"])
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    expected = flash.generate(**prompt, **options)
    assert torch.equal(flash.generate(**prompt, **options, cache_implementation="static"), expected)


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("family", ["t5", "umt5"])
def test_steps_of_decoding_are_the_whole_sequence_at_once(family, padding):
    (flash,) = on_gpu(build_pair(family, "fat5")[1])
    inputs = cuda_batch(padding)
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    ids = inputs["decoder_input_ids"]
    expected = flash(**given, decoder_input_ids=ids).logits
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        flash.to(dtype)
        cache, steps = EncoderDecoderCache(DynamicCache(), DynamicCache()), []
        for step in ids.split(1, dim=1):
            steps.append(flash(**given, decoder_input_ids=step, past_key_values=cache).logits)
        assert relative_error(torch.cat(steps, dim=1).float(), expected) < bound


@implementations
def test_compiles_with_inductor(implementation):
    (flash,) = on_gpu(build_pair("t5_v1_1", implementation)[1])
    inputs = cuda_batch("right")
    expected = flash(**inputs).loss
    flash.compile(fullgraph=True)
    loss = flash(**inputs).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert all(parameter.grad.isfinite().all() for parameter in flash.parameters())
