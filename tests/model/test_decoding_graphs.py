"""Steps of decoding as CUDA graphs: when they serve, and that they compute what the model does.

Without a GPU a class stands in for the captured step, and what is tested is when it is made and used.
"""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from decoding_steps import (
    COMPILE,
    DEVICE,
    TOLERANCE,
    LeftToCompileError,
    begin,
    build,
    check,
    continued,
    count_captures,
    draw,
    needs_counting_caches,
    of_encoder,
    step,
)
from model_parity import relative_error
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, GenerationMixin, LogitsProcessor, MaxLengthCriteria
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache

from fat5.model import decoding_graphs, generation_flash_t5
from fat5.model.generation_flash_t5 import FEW_TOKENS

pytestmark = needs_counting_caches


@pytest.fixture(autouse=True)
def made(monkeypatch):
    """As long as the number of steps that were captured."""
    return count_captures(monkeypatch)


@torch.no_grad()
@pytest.mark.parametrize("family", ["t5", "t5_v1_1", "umt5"])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_steps_give_the_logits_of_one_call(family, padding, made):
    model = build(family)
    check(model, draw(padding))
    assert len(made) == 1
    check(model, draw(padding))
    inputs = draw(padding)
    inputs["attention_mask"][0, :5] = 0
    check(model, inputs)


@torch.no_grad()
def test_the_first_step_of_new_shapes_is_rehearsed_and_the_next_captured(made):
    model = build()
    inputs = draw()
    given = begin(model, inputs)
    for count, token in enumerate(inputs["decoder_input_ids"][:, 1:4].split(1, dim=1)):
        continued(model, given, token)
        assert len(made) == min(count, 1)
    again = begin(model, inputs)
    continued(model, again, inputs["decoder_input_ids"][:, 1:2])  # at another place, and no new shapes
    assert len(made) == 2
    fewer = {name: x[:2] for name, x in inputs.items()}
    given = begin(model, fewer)
    continued(model, given, fewer["decoder_input_ids"][:, 1:2])
    assert len(made) == 2
    continued(model, given, fewer["decoder_input_ids"][:, 2:3])
    assert len(made) == 3


@torch.no_grad()
def test_only_the_latest_graphs_are_kept(made):
    model, inputs = build(), draw()
    ids = inputs["decoder_input_ids"]
    first = begin(model, inputs)
    continued(model, first, ids[:, 1:3])
    others = [begin(model, inputs) for _ in range(decoding_graphs.MOST_GRAPHS)]
    for given in others[:-1]:
        continued(model, given, ids[:, 1:2])
    assert len(made) == decoding_graphs.MOST_GRAPHS
    continued(model, others[-1], ids[:, 1:2])
    continued(model, others[1], ids[:, 2:3])
    assert len(made) == decoding_graphs.MOST_GRAPHS + 1
    continued(model, first, ids[:, 3:4])  # whose graph had to go
    assert len(made) == decoding_graphs.MOST_GRAPHS + 2
    graphs = model._decoding_graphs._graphs
    assert [len(of_shapes) for of_shapes in graphs.values()] == [decoding_graphs.MOST_GRAPHS]
    for length in range(4, 5 + decoding_graphs.MOST_SHAPES):
        other = draw(encoder_length=length, padding="none")
        continued(model, begin(model, other), other["decoder_input_ids"][:, 1:3])
    assert len(graphs) == decoding_graphs.MOST_SHAPES


def replaced_weight(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight * 2)


def replaced_module(model):
    model.lm_head = nn.Linear(32, 99, bias=False).to(DEVICE)


def resized(model):
    model.resize_token_embeddings(110)


def scaled_outputs(model):
    model.config.scale_decoder_outputs = True


def changed_values(model):
    model.lm_head.weight.mul_(-1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "anew"),
    [(replaced_weight, 1), (replaced_module, 1), (resized, 1), (scaled_outputs, 1), (changed_values, 0)],
)
def test_what_is_changed_counts(change, anew, made):
    """With the same cache, as somebody may hand it to `generate` again."""
    model, inputs = build(), draw()
    ids = inputs["decoder_input_ids"]
    given = begin(model, inputs)
    continued(model, given, ids[:, 1:3])
    change(model)
    expected = model(**of_encoder(inputs), decoder_input_ids=ids[:, :6]).logits
    model.get_compiled_call(None)  # as `generate` does once
    given["past_key_values"].reset()
    given["past_key_values"]._is_user_defined = True  # so does it
    again = begin(model, inputs, given["past_key_values"])
    got = continued(model, again, ids[:, 1:6])
    assert relative_error(got, expected[:, 1:]) < TOLERANCE
    assert len(made) == 1 + anew


def train(model):
    model.train()


def train_one_layer(model):
    model.decoder.block[1].ff_layer.dropout.train()


def hook(model):
    model.decoder.block[0].ff_layer.wo.register_forward_hook(lambda module, given, output: output * 2)


def wrap(model):
    layer = model.decoder.block[0].ff_layer.wo
    layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)


def adapt(model):
    get_peft_model(model, LoraConfig(target_modules=["wo"], r=2)).eval()


def parametrise(model):
    nn.utils.parametrizations.weight_norm(model.decoder.block[0].ff_layer.wo)


def compile_layer(model):
    model.decoder.block[0].ff_layer.compile(backend="eager")


def show_hidden_states(model):
    model.config.output_hidden_states = True


def attend_otherwise(model):
    model.set_attn_implementation("sdpa")


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [train, train_one_layer, hook, wrap, adapt, parametrise, compile_layer, show_hidden_states, attend_otherwise],
)
def test_what_a_graph_cannot_hold_is_left_to_compile(change, made):
    model, inputs = build(num_decoder_layers=2), draw()
    check(model, inputs)
    change(model)
    given = begin(model, inputs)
    with pytest.raises(LeftToCompileError):
        continued(model, given, inputs["decoder_input_ids"][:, 1:2])
    assert len(made) == 1


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ALiBi", "RoPE", "FIRE"])
def test_other_positions_are_left_to_compile(kind):
    model, inputs = build_flash_with(kind), draw()
    with pytest.raises(LeftToCompileError):
        continued(model, begin(model, inputs), inputs["decoder_input_ids"][:, 1:2])


def build_flash_with(kind):
    config = build().config
    config.position_encoding_type = kind
    return type(build())(config).to(DEVICE).eval()


@torch.no_grad()
def test_only_a_plain_step_is_captured(made):
    model, inputs = build(), draw()
    given, token = begin(model, inputs), inputs["decoder_input_ids"][:, 1:2]
    dynamic = EncoderDecoderCache(DynamicCache(), DynamicCache())
    config = model.config.get_text_config(decoder=True)
    empty = EncoderDecoderCache(*(StaticCache(config=config, max_cache_len=n) for n in (9, 37)))
    subclass = begin(model, inputs)["past_key_values"]
    subclass.self_attention_cache.__class__ = type("Other", (StaticCache,), {})
    offloaded = begin(model, inputs)["past_key_values"]
    offloaded.self_attention_cache.offloading = True
    plain = {**given, "decoder_input_ids": token}
    for other in (
        {"decoder_input_ids": inputs["decoder_input_ids"][:, 1:3]},
        {"output_attentions": True},
        {"output_hidden_states": True},
        {"decoder_attention_mask": inputs["decoder_attention_mask"][:, :2]},
        {"past_key_values": dynamic},
        {"past_key_values": empty},
        {"past_key_values": subclass},
        {"past_key_values": offloaded},
        {"encoder_outputs": tuple(given["encoder_outputs"].values())},
        {"use_cache": False},
        {"return_dict": False},
    ):
        with pytest.raises(LeftToCompileError):
            step(model, **{**plain, **other})
    with torch.enable_grad(), pytest.raises(LeftToCompileError):
        step(model, **plain)
    with torch.autocast(DEVICE.type, torch.bfloat16), pytest.raises(LeftToCompileError):
        step(model, **{**plain, **begin(model, inputs)})
    given = begin(model, inputs)
    with TorchDispatchMode(), pytest.raises(LeftToCompileError):
        step(model, **{**plain, **given})
    step(model, **{**plain, **begin(model, inputs)})


@torch.no_grad()
def test_a_copy_of_the_model_has_graphs_of_its_own(made):
    model = build()
    check(model, draw())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        captured = len(made)
        other.lm_head.weight.mul_(2)
        check(other, draw())
        assert len(made) == captured + 1


@torch.no_grad()
def test_generate_takes_graphs_unless_compile_is_asked_for_something_else(made):
    model, inputs = build(), draw()
    given = of_encoder(inputs)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(**given, **options, cache_implementation="dynamic")
    for _ in range(2):
        got = model.generate(**given, **options, cache_implementation="static", compile_config=COMPILE)
        assert torch.equal(got, expected)
        assert made
    captured = len(made)
    plain = CompileConfig(backend="eager", mode=None)
    plain._compile_all_devices = True
    got = model.generate(**given, **options, cache_implementation="static", compile_config=plain)
    assert torch.equal(got, expected)
    assert len(made) == captured


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("sample", [False, True])
def test_generate_takes_graphs_by_itself(beams, sample, made):
    model = build()
    given = of_encoder(draw())
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": sample, "num_beams": beams}

    def generate(**others):
        torch.manual_seed(0)
        return model.generate(**given, **options, **others)

    expected = generate(cache_implementation="dynamic")
    assert not made
    for captured in (1, 2, 2):  # a later step, then a first one
        assert torch.equal(generate(), expected)
        assert len(made) == captured
    model.decoder.block[0].ff_layer.wo.register_forward_hook(lambda module, given, output: output * 1)
    assert torch.equal(generate(), expected)
    assert len(made) == 2


def of_adapters(model):
    return get_peft_model(model, LoraConfig(target_modules=["wo"], r=2)).eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"cache_implementation": "dynamic"}, None),
        ({"use_cache": False}, None),
        ({"return_dict_in_generate": True}, None),
        ({"disable_compile": True}, None),
        ({"compile_config": CompileConfig(dynamic=True)}, None),
        ({"prompt_lookup_num_tokens": 2}, None),
        ({"decoder_attention_mask": torch.ones(3, 1, dtype=torch.long, device=DEVICE)}, None),
        ({"max_new_tokens": FEW_TOKENS - 1}, None),
        ({"synced_gpus": True}, None),  # where one goes on for as long as another does
        ({"custom_generate": lambda model, ids, **given: GenerationMixin._sample(model, ids, **given)}, None),
        ({}, "size"),
        ({"num_beams": 2}, "reorder"),
        ({}, train),
        ({}, hook),
        ({}, of_adapters),
        ({}, lambda model: model.set_attn_implementation("sdpa")),
        ({}, lambda model: setattr(model.config, "output_hidden_states", True)),
    ],
)
def test_generate_leaves_the_cache_as_it_is_in_transformers(options, change, made, monkeypatch):
    """Where graphs would not serve, or somebody may look at the cache."""
    model = build(dropout_rate=0.0)
    if change == "size":
        numbers = 2 * 3 * 7 * model.config.num_decoder_layers * model.config.num_heads * model.config.d_kv
        monkeypatch.setattr(generation_flash_t5, "MOST_BYTES", 4 * numbers - 1)
    elif change == "reorder":
        monkeypatch.setattr(type(model), "_reorder_cache", lambda self, cache, order: cache.reorder_cache(order))
    elif change is not None:
        model = change(model) or model
    rows = of_encoder(draw())
    if "prompt_lookup_num_tokens" in options:
        rows = {name: x[:1] for name, x in rows.items()}
    monkeypatch.setattr(generation_flash_t5, "StaticCache", None)
    monkeypatch.setattr(GenerationMixin, "_has_unfinished_sequences", lambda self, done, *_, **__: not done)
    model.generate(**rows, **{"max_new_tokens": 6, "do_sample": False, **options})
    assert not made


@torch.no_grad()
def test_the_cache_is_as_long_as_the_call(made):
    """Whatever a call before asked for, and whatever criterion says how long it is."""
    model = build()
    given = of_encoder(draw())
    for tokens in (40, 6):
        model.generate(**given, max_new_tokens=tokens, min_new_tokens=tokens)
    lengths = [layers[-1] for layers in model._decoding_graphs._graphs if layers[0] == "first"]
    options = {"stopping_criteria": [MaxLengthCriteria(31)], "min_new_tokens": 30}  # beyond the 20 of the configuration
    expected = model.generate(**given, **options, cache_implementation="dynamic")
    assert expected.shape[1] == 31
    assert torch.equal(model.generate(**given, **options), expected)
    assert lengths == [37, 37]
    own = [layers[4] for layers in model._decoding_graphs._graphs if layers[0] == "first"]
    assert own == [40, 6, 30]


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, "static"])
def test_layers_of_several_dtypes(cache, made):
    model = build().bfloat16()
    model.decoder.block[0].self_attention_layer.float()
    given = of_encoder(draw())
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "compile_config": COMPILE}
    expected = model.generate(**given, **options, cache_implementation="dynamic")
    for _ in range(3):
        got = model.generate(**given, **options, cache_implementation=cache)
        assert torch.equal(got[:, :3], expected[:, :3])  # later ones may differ by what bf16 rounds
    assert len(made) == 1  # of later steps alone


def test_what_is_kept_has_no_history(made):
    model = build()
    inputs = of_encoder(draw())
    encoded = model.encoder(**inputs, return_dict=True)
    assert encoded.last_hidden_state.requires_grad
    for _ in range(2):
        model.generate(encoder_outputs=encoded, attention_mask=inputs["attention_mask"], max_new_tokens=6)
    kept = [
        x
        for graphs in model._decoding_graphs._graphs.values()
        for graph in graphs.values()
        for x in graph.inputs.values()
    ]
    assert len(kept) == 5
    assert not any(x.requires_grad for x in kept)


@torch.no_grad()
def test_another_stream_does_not_take_turns(made):
    model = build()
    given = of_encoder(draw())
    seen = []

    class Look(LogitsProcessor):
        def __call__(self, ids, scores):
            graphs = model._decoding_graphs
            state = graphs._state or next(iter(graphs._expected.values()))
            seen.append((graphs.are_free_for(state), graphs.are_free_for((*state[:-1], object()))))
            return scores

    model.generate(**given, max_new_tokens=6, min_new_tokens=6, logits_processor=[Look()])
    assert set(seen) == {(True, False)}
    graphs = model._decoding_graphs
    assert graphs.are_free_for((*graphs._state[:-1], object()))


@torch.no_grad()
def test_a_model_that_is_moved_keeps_no_graphs(made):
    model = build()
    check(model, draw())
    assert "_decoding_graphs" in vars(model)
    model.to(DEVICE)
    assert "_decoding_graphs" not in vars(model)


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_first_steps_read_the_inputs_of_their_call(padding, made):
    model = build()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True}
    for call in range(4):
        given = of_encoder(draw(padding))
        if call == 3:
            given["attention_mask"][0, 2:6] = 0
        expected = model.generate(**given, **options)
        got = model.generate(**given, **options, cache_implementation="static", compile_config=COMPILE)
        assert torch.equal(got.sequences, expected.sequences)
        assert relative_error(torch.cat(got.logits), torch.cat(expected.logits)) < TOLERANCE
        del got
    assert len(made) == 2


@torch.no_grad()
@pytest.mark.parametrize(("why", "places"), [("prompt", 1), ("cache of the user's", 3), ("large cache", 3)])
def test_first_steps_without_a_graph(why, places, made, monkeypatch):
    model = build()
    given = of_encoder(draw())
    options = {"max_new_tokens": 5, "min_new_tokens": 5}
    if why == "prompt":
        given["decoder_input_ids"] = draw()["decoder_input_ids"][:, :3]
    expected = model.generate(**given, **options, cache_implementation="dynamic")
    if why == "large cache":
        numbers = 2 * 3 * (5 + 37) * model.config.num_decoder_layers * model.config.num_heads * model.config.d_kv
        monkeypatch.setattr(decoding_graphs, "MOST_BYTES", 4 * numbers - 1)
    options |= {"compile_config": COMPILE}
    for _ in range(3):
        if why.startswith("cache"):
            config = model.config.get_text_config(decoder=True)
            options["past_key_values"] = EncoderDecoderCache(
                *(StaticCache(config=config, max_cache_len=n) for n in (6, 37))
            )
        else:
            options["cache_implementation"] = "static"
        assert torch.equal(model.generate(**given, **options), expected)
    assert all(x[0] != "first" for x in model._decoding_graphs._graphs)
    assert len(made) == places  # of the later steps


@torch.no_grad()
@pytest.mark.parametrize(("rows", "sample"), [(1, False), (3, False), (3, True)])
def test_beams_take_graphs_unless_compiling_is_forbidden(rows, sample, made):
    model = build()
    given = {name: x[:rows] for name, x in of_encoder(draw()).items()}
    options = {"max_new_tokens": 7, "min_new_tokens": 7, "num_beams": 4, "num_return_sequences": 3, "do_sample": sample}
    options |= {"return_dict_in_generate": True, "output_scores": True}

    def generate(**others):
        torch.manual_seed(0)
        return model.generate(**given, **options, **others)

    expected = generate()
    assert torch.equal(generate(cache_implementation="static", disable_compile=True).sequences, expected.sequences)
    assert not made
    for captured in (1, 2, 2):
        got = generate(cache_implementation="static")
        assert torch.equal(got.sequences, expected.sequences)
        assert relative_error(got.sequences_scores, expected.sequences_scores) < TOLERANCE
        assert len(made) == captured
        del got
    assert model._decoding_graphs._memory is not None


@torch.no_grad()
def test_beams_with_attentions_are_stepped_as_they_are(made):
    model = build(attention="eager")
    given = of_encoder(draw())
    options = {"max_new_tokens": 4, "num_beams": 2, "return_dict_in_generate": True, "output_attentions": True}
    expected = model.generate(**given, **options)
    got = model.generate(**given, **options, cache_implementation="static")
    assert torch.equal(got.sequences, expected.sequences)
    assert len(got.decoder_attentions) == len(expected.decoder_attentions) > 0
    assert not made


@torch.no_grad()
@pytest.mark.parametrize("change", ["compile_config", "reorder"])
def test_beams_that_graphs_do_not_fit_are_stepped_as_they_are(change, made, monkeypatch):
    model = build()
    given = of_encoder(draw())
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 2}
    expected = model.generate(**given, **options, cache_implementation="dynamic")
    if change == "compile_config":
        options["compile_config"] = CompileConfig(dynamic=True)
    if change == "reorder":

        def reorder(self, cache, order):
            cache.self_attention_cache.reorder_cache(order)
            return cache

        monkeypatch.setattr(type(model), "_reorder_cache", reorder)
    got = model.generate(**given, **options, cache_implementation="static")
    assert torch.equal(got, expected)
    assert not made


def test_beams_with_a_growing_cache_wait_for_nobody():
    model = build()
    given = of_encoder(draw())
    options = {"max_new_tokens": 5, "num_beams": 2, "cache_implementation": "dynamic"}
    with ThreadPoolExecutor(1) as pool, decoding_graphs._lock:  # which others may hold for seconds
        tokens = pool.submit(model.generate, **given, **options).result(timeout=60)
    assert torch.equal(tokens, model.generate(**given, **options))
