"""Positions other than T5's: against their formulas, and wherever a sequence stands in a batch, a pack or a cache."""

import cmath
import math

import pytest
import torch
from model_parity import SHAPE, batch, relative_error
from position_kinds import KINDS, kind_model

import fat5.model.attention
import fat5.model.attention_mask
import fat5.model.packed_stack
from fat5.model import FlashT5Config, FlashT5ForConditionalGeneration
from fat5.model.attention_mask import AttentionMask
from fat5.model.position_alibi import slope_values

kinds = pytest.mark.parametrize("kind", KINDS)


def test_slopes_are_those_of_the_paper():
    assert slope_values(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert slope_values(2) == [1 / 16, 1 / 256]
    assert slope_values(12) == pytest.approx([*(2.0**-i for i in range(1, 9)), *(2 ** -(i + 0.5) for i in range(4))])


def bias_by_formula(kind, model, stack, head, i, j):
    """What is added to the score of query i and key j."""
    config = model.config
    if kind == "alibi":
        return -(2.0 ** (-8 * (head + 1) / config.num_heads)) * abs(i - j)
    if kind == "alibi_asymmetric":
        half = config.num_heads // 2
        if (j > i) if head < half else (j < i):
            return -math.inf
        return -(2.0 ** (-8 * (head % half + 1) / half)) * abs(i - j)
    if kind == "fire":
        module = getattr(model, stack).block[0].self_attention_layer.self_attention.pe_encoding
        c, length = abs(module.c.item()), abs(module.L_multiplier.item() * module.init_L.item())
        x = math.copysign(math.log(c * abs(i - j) + 1), i - j) / (math.log(c * max(i, length) + 1) + 1e-6)
        first, last = module.mlp[0], module.mlp[2]
        hidden = (first.weight[:, 0].double() * x + first.bias.double()).clamp(min=0)
        return (last.weight[head].double() @ hidden + last.bias[head].double()).item()
    return 0.0


def turned_by_formula(kind, config, state, position, is_query):
    """A head's query or key as RoPE and xPos turn it: pairs of dimensions as complex numbers."""
    if "rope" not in kind and kind != "xpos":
        return state
    size = int(config.d_kv * config.rotary_emb_fraction)
    turned = state.double().clone()
    for i in range(size // 2):
        pair = (2 * i, 2 * i + 1) if config.rotary_interleaved else (i, i + size // 2)
        number = complex(turned[pair[0]].item(), turned[pair[1]].item())
        number *= cmath.exp(1j * position * config.rotary_base ** (-2 * i / size))
        if config.rotary_scale_base is not None:
            zeta = (2 * i / size + 0.4) / 1.4
            number *= zeta ** ((1 if is_query else -1) * position / config.rotary_scale_base)
        turned[pair[0]], turned[pair[1]] = number.real, number.imag
    return turned


@pytest.mark.parametrize(("stack", "implementation"), [("encoder", "sdpa"), ("decoder", "eager")])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "t5"])
def test_attention_is_what_the_formula_says(kind, stack, implementation):
    model = kind_model(kind, implementation)
    config, length = model.config, 23  # longer than FIRE's L
    attention = getattr(model, stack).block[0].self_attention_layer.self_attention
    states = torch.randn(1, length, config.d_model)
    mask = AttentionMask(length, length, torch.device("cpu"), causal=stack == "decoder")
    if config.position_encoding_type == "RoPE":
        mask.rotary = getattr(model, stack)._rotary_tables(mask.places()[0])
    output, *_ = attention(states, mask.prepare(implementation, states.dtype, config.d_kv))

    def heads(layer):
        return layer(states)[0].unflatten(-1, (config.num_heads, config.d_kv)).transpose(0, 1)  # [H, L, Dk]

    query, key, value = heads(attention.Wq), heads(attention.Wk), heads(attention.Wv).double()
    expected = torch.zeros(length, config.num_heads, config.d_kv, dtype=torch.double)
    for head in range(config.num_heads):
        scores = torch.full((length, length), -math.inf, dtype=torch.double)
        turned = [turned_by_formula(kind, config, key[head, j], j, False).double() for j in range(length)]
        for i in range(length):
            turned_query = turned_by_formula(kind, config, query[head, i], i, True).double()
            for j in range(i + 1 if stack == "decoder" else length):
                scores[i, j] = turned_query @ turned[j] + bias_by_formula(kind, model, stack, head, i, j)
        expected[:, head] = scores.softmax(-1) @ value[head]
    expected = torch.nn.functional.linear(expected.flatten(1), attention.o.weight.double())
    assert relative_error(output[0], expected) < 1e-5


def rows_alone(model, inputs):
    """Logits of every row, and those of its segments one after the other, computed without padding or packing."""
    ids, labels = inputs["input_ids"], inputs["decoder_input_ids"]
    ids_segments = inputs.get("encoder_segment_ids", inputs.get("attention_mask", torch.ones_like(ids)))
    segments = inputs.get("decoder_segment_ids", inputs.get("decoder_attention_mask", torch.ones_like(labels)))
    logits = torch.zeros(*labels.shape, model.config.vocab_size)
    for row in range(len(ids)):
        for number in segments[row].unique().tolist():
            if number != 0:
                own, its = segments[row] == number, ids_segments[row] == number
                logits[row, own] = model(
                    input_ids=ids[row][its][None], decoder_input_ids=labels[row][own][None]
                ).logits[0]
    return logits, segments != 0


def placed(kind):
    inputs = batch(kind if kind in ("left", "right") else "none", 21, 13)
    if kind == "segments":
        del inputs["attention_mask"], inputs["decoder_attention_mask"]
        for side, name in (("encoder", "input_ids"), ("decoder", "labels")):
            ids = torch.ones_like(inputs[name])
            ids[:, 4:], ids[:, 9:], ids[1:, 12:] = 2, 3, 0
            inputs[f"{side}_segment_ids"] = ids
        inputs["labels"][inputs["decoder_segment_ids"] == 0] = -100
    return inputs


@pytest.mark.parametrize("implementation", ["sdpa", "fat5"])
@pytest.mark.parametrize("place", ["left", "segments"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "t5"])
def test_a_sequence_is_the_same_wherever_it_stands(kind, place, implementation, monkeypatch):
    if implementation == "fat5":  # the operator is torch's reference here
        monkeypatch.setattr(fat5.model.attention_mask, "kernels_serve", lambda _: True)
    inputs = placed(place)
    with torch.no_grad():
        expected, real = rows_alone(kind_model(kind, "eager"), inputs)
        logits = kind_model(kind, implementation)(**inputs).logits
    assert relative_error(logits[real], expected[real]) < 2e-5


ON_KERNELS = {  # of two attentions in each stack and two across; T5's and the slopes serve in any layout
    "right": dict.fromkeys(KINDS, 6),
    "left": dict.fromkeys(KINDS, 6) | {"fire": 2, "alibi_asymmetric": 2},
    "segments": dict.fromkeys(KINDS, 6) | {"fire": 2, "alibi_asymmetric": 2},
}


@pytest.mark.parametrize("place", ON_KERNELS)
@kinds
def test_kernels_serve_where_the_bias_allows_with_the_gradients_of_eager(kind, place, monkeypatch):
    monkeypatch.setattr(fat5.model.attention_mask, "kernels_serve", lambda _: True)
    calls = []
    fused = fat5.model.attention.fused_attention
    monkeypatch.setattr(fat5.model.attention, "fused_attention", lambda *args: calls.append(1) or fused(*args))
    inputs = placed(place)
    gradients = {}
    for name in ("eager", "fat5"):
        model = kind_model(kind, name)
        model(**inputs).loss.backward()
        gradients[name] = {key: weight.grad for key, weight in model.named_parameters() if weight.requires_grad}
    assert len(calls) == ON_KERNELS[place][kind]
    for name, gradient in gradients["eager"].items():
        if name.endswith("mlp.2.bias"):  # a softmax does not change when all scores rise
            assert max(gradient.abs().max(), gradients["fat5"][name].abs().max()) < 1e-5
            continue
        assert gradient.abs().max() > 0, name
        assert relative_error(gradients["fat5"][name], gradient) < 1e-4, name


@pytest.mark.parametrize(
    ("implementation", "prompt"), [("sdpa", "left-padded"), ("fat5", "left-padded"), ("fat5", "one")]
)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "t5"])
def test_cached_decoding_is_the_whole_sequence_at_once(kind, implementation, prompt, monkeypatch):
    if implementation == "fat5":
        monkeypatch.setattr(fat5.model.attention_mask, "kernels_serve", lambda _: True)
    model = kind_model(kind, implementation)
    inputs = batch("left" if prompt == "left-padded" else "none", 15, 24)
    mask = inputs["decoder_attention_mask"]
    encoder = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    with torch.no_grad():
        whole = kind_model(kind, "eager")(
            **encoder, decoder_input_ids=inputs["decoder_input_ids"], decoder_attention_mask=mask
        )
        cache, parts = None, []
        for begin, end in ((0, 12), (12, 13), (13, 14), (14, 24)):
            output = model(
                **encoder,
                decoder_input_ids=inputs["decoder_input_ids"][:, begin:end],
                decoder_attention_mask=mask[:, :end],
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            parts.append(output.logits)
    real = mask.bool()
    assert relative_error(torch.cat(parts, 1)[real], whole.logits[real]) < 2e-5


@kinds
def test_static_cache_generates_the_same(kind):
    model = kind_model(kind, "sdpa", tie_word_embeddings=False)
    inputs = batch("right", 15, 5)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    ids = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    expected = model.generate(**ids, **options, use_cache=False)
    assert expected.unique().numel() > 4
    assert torch.equal(model.generate(**ids, **options), expected)
    assert torch.equal(model.generate(**ids, **options, cache_implementation="static", disable_compile=True), expected)


NAMES = {  # as in the published FAT5
    "t5": ["relative_attention_bias.weight"],
    "fire": ["L_multiplier", "c", "init_L", "mlp.0.bias", "mlp.0.weight", "mlp.2.bias", "mlp.2.weight"],
}


@kinds
def test_saved_and_loaded(kind, tmp_path):
    model = kind_model(kind)
    model.save_pretrained(tmp_path)
    loaded, report = FlashT5ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    names = sorted(name.split("pe_encoding.")[1] for name in loaded.state_dict() if "pe_encoding" in name)
    assert names == sorted(2 * NAMES.get(kind, []))
    inputs = batch("right")
    loaded.set_attn_implementation("eager")
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_fire_begins_as_published_and_reads_the_whole_number_that_is_published(tmp_path):
    plain = FlashT5ForConditionalGeneration(FlashT5Config(**SHAPE))
    plain.save_pretrained(tmp_path / "plain")
    fields = {"position_encoding_type": "FIRE", "relative_attention_max_distance": 200}
    model = FlashT5ForConditionalGeneration.from_pretrained(tmp_path / "plain", **fields)
    fire = model.encoder.block[0].self_attention_layer.self_attention.pe_encoding
    assert (fire.c.item(), fire.init_L.item(), fire.L_multiplier.item()) == (pytest.approx(0.1), 200, 1)
    weights = model.state_dict()
    for name in list(weights):
        if name.endswith("init_L"):
            weights[name] = torch.tensor(77)
    model.save_pretrained(tmp_path / "fire", state_dict=weights)
    loaded = FlashT5ForConditionalGeneration.from_pretrained(tmp_path / "fire")
    fire = loaded.encoder.block[0].self_attention_layer.self_attention.pe_encoding
    assert fire.init_L == 77
    assert loaded(**batch("none")).loss.isfinite()


@kinds
def test_bf16_stays_near_fp32(kind):
    model = kind_model(kind, "sdpa")
    inputs = batch("right")
    real = inputs["decoder_attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs).logits[real]
        actual = model.bfloat16()(**inputs).logits[real]
    assert actual.dtype == torch.bfloat16
    assert (actual - expected).norm() < 0.15 * expected.norm()


@pytest.mark.parametrize("implementation", ["eager", "fat5"])
@pytest.mark.parametrize("kind", ["t5", "alibi", "rope", "fire"])
def test_random_positions_are_drawn_in_training_only(kind, implementation, monkeypatch):
    monkeypatch.setattr(fat5.model.attention_mask, "kernels_serve", lambda _: True)
    fields = {"use_randomized_position_encoding": True, "max_sequence_length": 200}
    model, plain = kind_model(kind, implementation, **fields), kind_model(kind, implementation)
    inputs = batch("right", 21, 13)
    torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits)
    drawn = []
    draw = type(model.encoder)._draw_positions

    def spy(stack, *args):
        drawn.append(draw(stack, *args))
        return drawn[-1]

    monkeypatch.setattr(type(model.encoder), "_draw_positions", spy)
    loss = model.train()(**inputs).loss
    loss.backward()
    for positions, length in zip(drawn, (21, 13), strict=True):
        assert positions[0] == 0
        assert len(positions) == length
        assert (positions.diff() > 0).all()
        assert length < positions[-1] < 200
    # the same distances, of tokens that stand there with hidden ones in between
    spread = {"input_ids": torch.zeros(3, 200, dtype=torch.long), "labels": torch.full((3, 200), -100)}
    spread |= {"attention_mask": spread["input_ids"].clone(), "decoder_input_ids": spread["input_ids"].clone()}
    spread["decoder_attention_mask"] = spread["input_ids"].clone()
    for name in spread:
        spread[name][:, drawn[1 if "decoder" in name or name == "labels" else 0]] = inputs[name]
    with torch.no_grad():
        plain.set_attn_implementation("eager")
        assert loss.item() == pytest.approx(plain(**spread).loss.item(), rel=1e-5)
        assert model(**inputs).loss.item() != pytest.approx(loss.item(), rel=1e-6)  # drawn anew


def test_random_positions_that_do_not_suffice_or_cannot_go_on_are_refused():
    model = kind_model("rope", use_randomized_position_encoding=True, max_sequence_length=20).train()
    with pytest.raises(ValueError, match=r"21 tokens .* `max_sequence_length` 20"):
        model(**batch("none", 21, 13))
    inputs = {"input_ids": torch.ones(1, 5, dtype=torch.long), "decoder_input_ids": torch.ones(1, 2, dtype=torch.long)}
    cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="evaluation mode"):
        model(**inputs, past_key_values=cache)
