"""What a step of decoding does otherwise than a long call, because launching it costs more than running it."""

import inspect
from functools import partial

import pytest
import torch
from model_parity import batch, build_pair, relative_error
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache

from fat5.model import ops_gated_act, ops_rms_norm
from fat5.model.attention_mask import begin_rows_at_16
from fat5.model.position_encoding import RelativePositionBias

ROUNDING = {torch.float32: 2e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # one, at most, of the largest values


@pytest.fixture
def launch_bound(monkeypatch):
    """Norms and activations run as they do for few elements on a GPU."""
    for module in (ops_rms_norm, ops_gated_act):
        monkeypatch.setattr(module, "is_launch_bound", lambda x: not torch.is_grad_enabled())


@torch.no_grad()
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_norm_of_few_rows_is_rounded_once(launch_bound, dtype, branch, wide):
    torch.manual_seed(0)
    hidden = 30 * torch.randn(2, 1, 37).to(torch.float32 if wide else dtype)
    added, weight = torch.randn(2, 1, 37).to(dtype), torch.randn(37).to(dtype)
    out, total = ops_rms_norm.add_rms_norm(hidden, added if branch else None, weight, 1e-6)
    assert torch.equal(total, hidden + added if branch else hidden)
    exact = total.double() * torch.rsqrt(total.double().square().mean(-1, keepdim=True) + 1e-6) * weight.double()
    assert out.dtype == dtype
    assert ((out.double() - exact).abs() <= ROUNDING[dtype] * exact.abs() + 1e-9).all()


@torch.no_grad()
def test_sum_of_few_rows_stays_within_fp16(launch_bound):
    large = torch.full((1, 4), 6e4, dtype=torch.float16)
    _, total = ops_rms_norm.add_rms_norm(large, large, torch.ones(4).half(), 1e-6)
    assert total.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("act", ["gelu_new", "gelu", "relu", "silu"])
@pytest.mark.parametrize("form", ["plain", "pair", "joined"])
def test_activation_of_few_rows(launch_bound, act, form):
    torch.manual_seed(0)
    x, up = 3 * torch.randn(1, 40), torch.randn(1, 40)
    given = {"plain": {"gated": False}, "pair": {"up": up}, "joined": {}}[form]
    out = ops_gated_act.gated_act(torch.cat([x, up], -1) if form == "joined" else x, act, **given)
    t = x.double()
    exact = {
        "gelu_new": 0.5 * t * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (t + 0.044715 * t**3))),
        "gelu": 0.5 * t * (1 + torch.erf(t / 2**0.5)),
        "relu": t.clamp(min=0),
        "silu": t * torch.sigmoid(t),
    }[act] * (1 if form == "plain" else up.double())
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("family", ["t5", "t5_v1_1", "umt5"])
def test_steps_of_few_elements_give_stock_logits(launch_bound, family):
    stock, flash = build_pair(family)
    inputs = batch("left")
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    ids = inputs["decoder_input_ids"]
    expected = stock(**given, decoder_input_ids=ids).logits
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    steps = [flash(**given, decoder_input_ids=step, past_key_values=cache).logits for step in ids.split(1, dim=1)]
    assert relative_error(torch.cat(steps, dim=1), expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 300])
def test_bias_of_the_latest_token_is_the_last_row(length):
    bias = RelativePositionBias(num_buckets=32, max_distance=128, num_heads=3, bidirectional=False)
    positions = torch.arange(length)
    assert torch.equal(bias.last_row(length, positions.device), bias(positions[-1:], positions))


@pytest.mark.parametrize("length", [16, 17, 300])
def test_biases_lie_as_the_kernels_of_torch_want_them(length):
    bias = torch.randn(1, 1, length, 4).permute(0, 3, 1, 2)  # as looked up: head by head for every key
    lying = begin_rows_at_16(bias)
    assert torch.equal(lying, bias)
    assert lying.stride(3) == 1
    assert all(step % 16 == 0 for step in lying.stride()[:3])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("with_grad", [False, True])
def test_beams_move_what_was_decoded_and_not_what_was_read(kind, with_grad):
    _, flash = build_pair("t5")
    static = partial(StaticCache, config=flash.config.get_text_config(decoder=True), max_cache_len=3)
    own, read = static() if kind == "static" else DynamicCache(), DynamicCache()
    for cache in (own, read):
        for index in range(flash.config.num_decoder_layers):
            rows, at_first = torch.arange(1.0, 5).view(4, 1, 1, 1), {"cache_position": torch.arange(1)}
            cache.update(rows, rows + 10, index, at_first)  # the last is for transformers 4
    before, place = read.layers[0].keys, own.layers[1].values.data_ptr()
    with torch.set_grad_enabled(with_grad):
        moved = flash._reorder_cache(EncoderDecoderCache(own, read), torch.tensor([1, 1, 3, 2]))
    for layer in moved.self_attention_cache.layers:
        assert layer.keys[:, 0, 0].flatten().tolist() == [2, 2, 4, 3]
        assert layer.values[:, 0, 0].flatten().tolist() == [12, 12, 14, 13]
    assert moved.cross_attention_cache.layers[0].keys is before
    if kind == "static" and hasattr(own.layers[0], "cumulative_length"):  # as it does not in transformers 4
        assert (own.layers[1].values.data_ptr() == place) == (not with_grad)


@torch.no_grad()
@pytest.mark.parametrize("order", [[2], [1, 0], [0, 0, 1, 1, 2, 2]])
def test_reordering_may_change_the_number_of_rows(order):
    _, flash = build_pair("t5")
    own = StaticCache(config=flash.config.get_text_config(decoder=True), max_cache_len=3)
    rows, at_first = torch.arange(1.0, 4).view(3, 1, 1, 1), {"cache_position": torch.arange(1)}
    for index in range(flash.config.num_decoder_layers):
        own.update(rows, rows, index, at_first)
    moved = flash._reorder_cache(EncoderDecoderCache(own, DynamicCache()), torch.tensor(order))
    assert [x[:, 0, 0, 0].tolist() for x in (layer.keys for layer in moved.self_attention_cache.layers)] == [
        [index + 1 for index in order]
    ] * flash.config.num_decoder_layers


def test_a_model_can_train_on_single_tokens_after_generating_in_inference_mode():
    _, flash = build_pair("t5")
    inputs = batch("right")
    with torch.inference_mode():
        flash.generate(inputs["input_ids"], max_new_tokens=3, min_new_tokens=3)
    flash.train()
    flash(input_ids=inputs["input_ids"], labels=inputs["labels"][:, :1].clamp(min=0)).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in flash.parameters())


@pytest.mark.skipif(
    "next_sequence_length" not in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters,
    reason="transformers 4 names other things in a step",
)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    ("special", "elsewhere"),
    [({}, False), ({}, True), ({"decoder_attention_mask": torch.ones(3, 4)}, False), ({"output_attentions": 1}, False)],
)
def test_inputs_of_a_step_are_those_of_other_models(special, elsewhere, masked, monkeypatch):
    """A plain step goes without asking what is asked for them; whatever is special, or must be moved, is asked."""
    _, flash = build_pair("t5_v1_1")
    inputs = batch("right", 9, 4, 3)
    config = flash.config.get_text_config(decoder=True)
    given = {
        "next_sequence_length": 1,
        "past_key_values": EncoderDecoderCache(
            *(StaticCache(config=config, max_cache_len=length) for length in (6, 9))
        ),
        "encoder_outputs": flash.encoder(inputs["input_ids"]),
        "use_cache": True,
        **({"attention_mask": inputs["attention_mask"]} if masked else {}),
        **special,
    }
    flash(
        decoder_input_ids=inputs["decoder_input_ids"][:, :3],
        encoder_outputs=given["encoder_outputs"],
        past_key_values=given["past_key_values"],
    )  # a static cache is made by its first use
    ids = inputs["decoder_input_ids"]
    prepare, calls = GenerationMixin.prepare_inputs_for_generation, []
    expected = prepare(flash, ids, **given)
    if elsewhere:
        monkeypatch.setattr(type(flash), "device", torch.device("cuda:7"))
        monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", lambda *_, **__: calls.append(1) or {})
        flash.prepare_inputs_for_generation(ids, **given)
        assert calls
        return
    monkeypatch.setattr(
        GenerationMixin, "prepare_inputs_for_generation", lambda *x, **y: calls.append(1) or prepare(*x, **y)
    )
    got = flash.prepare_inputs_for_generation(ids, **given)
    assert bool(calls) == bool(special)
    assert got.keys() == expected.keys()
    assert got["decoder_input_ids"].is_contiguous()
    for name, value in expected.items():
        same = torch.equal(got[name], value) if isinstance(value, torch.Tensor) else got[name] is value
        assert same, name


class Step(torch.nn.Module):
    """The logits of a decoder's first token."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, states, mask):
        return self.model(decoder_input_ids=ids, encoder_outputs=(states,), attention_mask=mask, use_cache=False).logits


@torch.no_grad()
def test_a_step_is_exported_for_any_number_of_rows_and_keys():
    step = Step(build_pair("t5_v1_1", "fat5")[1])

    def inputs(rows, keys):
        return torch.randint(2, 99, (rows, 1)), torch.randn(rows, keys, 32), torch.ones(rows, keys).long()

    rows, keys = torch.export.Dim("rows"), torch.export.Dim("keys")
    shapes = ({0: rows}, {0: rows, 1: keys}, {0: rows, 1: keys})
    exported = torch.export.export(step, inputs(3, 17), dynamic_shapes=shapes).module()
    given = inputs(4, 20)
    torch.testing.assert_close(exported(*given), step(*given), rtol=1e-4, atol=1e-5)
