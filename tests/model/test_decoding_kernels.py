"""Steps of decoding by the kernels made for few rows, as in a graph: against fp32, beside the same without them."""

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, needs_kernels, run_interpreted, serve_layers
from model_parity import batch, build_flash, build_stock, relative_error
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache, StaticLayer

import fat5.model.attention
import fat5.model.layers_flash_t5
from fat5.model import fused_linear, ops_graph

SHAPE = {"num_layers": 1, "num_heads": 2, "vocab_size": 99}
LENGTHS = (7, 3, 3)
KERNELS = {  # where the model calls them
    "few_rows_linear": fused_linear,  # in a layer of a decoder for q with k and v, o, and across q, o; and wo
    "decode_attention": fat5.model.attention,
    "append_to_cache": fat5.model.attention,
    "gated_linear": fat5.model.layers_flash_t5,
}


def test_in_the_interpreter():
    run_interpreted(__file__)


@pytest.fixture
def kernels(monkeypatch):
    """Says whether the kernels run, outside graphs too, and returns a count of their calls."""
    calls = dict.fromkeys(KERNELS, 0)
    for name, module in KERNELS.items():
        function = getattr(module, name)

        def count(*arguments, name=name, function=function):
            calls[name] += 1
            return function(*arguments)

        monkeypatch.setattr(module, name, count)

    def serve(serves):
        if INTERPRETED:
            serve_layers(serves)
        monkeypatch.setattr(ops_graph._rehearsing, "now", serves, raising=False)
        calls.update(dict.fromkeys(KERNELS, 0))
        return calls

    yield serve
    serve_layers(not INTERPRETED)


def build(family, **overrides):
    stock = build_stock(family, **{**SHAPE, **overrides})
    return build_flash(family, stock, "fat5", **{**SHAPE, **overrides}).to(DEVICE).eval()


def static_cache(model):
    config = model.config.get_text_config(decoder=True)
    return EncoderDecoderCache(*(StaticCache(config=config, max_cache_len=length) for length in (8, LENGTHS[0])))


def inputs_of(padding):
    """With padding, one row has no key to see across."""
    inputs = {name: x.to(DEVICE) for name, x in batch(padding, *LENGTHS).items()}
    if padding != "none":
        inputs["attention_mask"][1] = 0
    return inputs


@torch.no_grad()
def logits_of_steps(model, given, static=False):
    """Logits `[B, L, V]` of a sequence decoded token by token."""
    mask = given["attention_mask"]
    encoder = model.encoder(given["input_ids"], attention_mask=mask)
    cache = static_cache(model) if static else EncoderDecoderCache(DynamicCache(), DynamicCache())
    steps = given["decoder_input_ids"].split(1, dim=1)
    return torch.cat(
        [
            model(
                encoder_outputs=encoder, attention_mask=mask, decoder_input_ids=step, past_key_values=cache
            ).logits.float()
            for step in steps
        ],
        dim=1,
    )


@needs_kernels
@pytest.mark.parametrize(
    ("family", "padding", "static"),
    [("t5", "right", True), ("t5_v1_1", "left", False), ("t5_v1_1", "none", True), ("umt5", "right", True)],
)
def test_steps_are_as_accurate_as_without(family, padding, static, kernels):
    model = build(family).bfloat16().float()  # weights that bf16 holds
    inputs = inputs_of(padding)
    kernels(False)
    exact = logits_of_steps(model, inputs, static)
    model.bfloat16()
    plain = logits_of_steps(model, inputs, static)
    calls = kernels(True)
    got = logits_of_steps(model, inputs, static)
    layers = (LENGTHS[1] - 1) * SHAPE["num_layers"]  # the first step may be packed
    gated = family != "t5"
    assert calls["decode_attention"] >= 2 * layers
    appends = static and hasattr(StaticLayer(max_cache_len=1), "cumulative_length")  # not in transformers 4
    assert calls["append_to_cache"] >= layers if appends else calls["append_to_cache"] == 0
    assert calls["few_rows_linear"] >= (5 if gated else 6) * layers
    assert calls["gated_linear"] >= layers if gated else calls["gated_linear"] == 0
    assert (got - exact).norm() <= 2 * (plain - exact).norm() + 1e-3 * exact.norm()


@needs_kernels
@torch.no_grad()
def test_a_row_of_least_numbers_hides_nothing(kernels):
    """In the user's own matrix: as in stock T5 it adds as much to every score."""
    model, inputs = build("t5_v1_1"), inputs_of("none")
    given = {"encoder_outputs": model.encoder(inputs["input_ids"]), "decoder_input_ids": inputs["decoder_input_ids"]}
    given["decoder_input_ids"] = given["decoder_input_ids"][:, :1]
    given["attention_mask"] = torch.zeros(*inputs["input_ids"].shape, device=DEVICE)[:, None, None]
    given["attention_mask"][1] = torch.finfo(torch.float32).min
    kernels(False)
    expected = model(**given).logits
    kernels(True)
    assert relative_error(model(**given).logits, expected) < 1e-4


@needs_kernels
def test_adapters_and_hooks_are_called(kernels):
    kernels(True)
    model, inputs = build("t5_v1_1").bfloat16(), inputs_of("none")
    before = logits_of_steps(model, inputs)
    adapted = get_peft_model(model, LoraConfig(target_modules=["o", "wo", "Wk"], r=2)).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.05)
    after = logits_of_steps(adapted.base_model.model, inputs)
    assert relative_error(after, before) > 0.05
    merged = adapted.merge_and_unload()
    assert relative_error(logits_of_steps(merged, inputs), after) < 0.05
    seen = []
    for name, module in merged.named_modules():
        if name.startswith("decoder.") and name.endswith((".o", ".wo", ".Wq")):
            module.register_forward_hook(lambda module, given, output, name=name: seen.append(name))
    logits_of_steps(merged, inputs)
    assert len(seen) == len(set(seen)) * LENGTHS[1]
    assert len(set(seen)) == 5 * SHAPE["num_layers"]


@needs_kernels
@torch.no_grad()
def test_what_the_kernels_do_not_take_is_left_to_torch(kernels):
    """Layers in another dtype, with the bias that they hand on, and dropout."""
    calls = kernels(True)
    model, inputs = build("t5_v1_1", num_decoder_layers=2, dropout_rate=0.5).bfloat16(), inputs_of("none")
    inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :1]
    expected = logits_of_steps(model, inputs, static=True)
    served = calls["decode_attention"]
    layer = model.decoder.block[0].self_attention_layer.self_attention.float()
    layer.register_forward_pre_hook(lambda module, given: (given[0].float(), *given[1:]))
    layer.register_forward_hook(lambda module, given, output: (output[0].bfloat16(), *output[1:]))
    assert relative_error(logits_of_steps(model, inputs, static=True), expected) < 0.05
    assert fused_linear._few_rows(torch.ones(1, 32, device=DEVICE).half(), (model.lm_head,)) is None
    calls.update(decode_attention=0)
    model.decoder.train()
    logits_of_steps(model, inputs, static=True)
    assert calls["decode_attention"] == 0 < served


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["t5", "t5_v1_1", "umt5"])
@torch.no_grad()
def test_compiled_steps_in_bf16(family):
    """`generate` with a static cache, its step compiled into a graph, by the logits it chooses from."""
    model = build(family, num_layers=4)
    ids = torch.randint(2, 99, (16, 40), device=DEVICE)
    mask = (torch.arange(40, device=DEVICE) < torch.randint(1, 41, (16, 1), device=DEVICE)).long()
    options = GenerationConfig(
        max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip

    def generate(cache):
        options.cache_implementation = cache
        return model.generate(ids, attention_mask=mask, generation_config=options)

    def logits(sequences, dtype):
        model.to(dtype)
        return model(input_ids=ids, attention_mask=mask, decoder_input_ids=sequences[:, :-1]).logits.float()

    model.bfloat16()
    for _ in range(2):
        result = generate("static")
        got = torch.stack(result.logits, dim=1).float()
        exact, plain = (logits(result.sequences, dtype) for dtype in (torch.float32, torch.bfloat16))
        assert (got - exact).norm() <= 2 * (plain - exact).norm() + 1e-3 * exact.norm()
