"""When `generate` chooses a static cache by itself and takes graphs, and that its tokens stay the same.

Without a GPU a class stands in for the captured step.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from decoding_steps import (
    COMPILE,
    DEVICE,
    TOLERANCE,
    build,
    check,
    count_captures,
    draw,
    needs_counting_caches,
    of_encoder,
)
from model_parity import relative_error
from peft import LoraConfig, get_peft_model
from transformers import CompileConfig, GenerationMixin, LogitsProcessor, MaxLengthCriteria
from transformers.cache_utils import EncoderDecoderCache, StaticCache

from fat5.model import decoding_graphs, decoding_inputs, generation_flash_t5
from fat5.model.generation_flash_t5 import FEW_TOKENS

pytestmark = needs_counting_caches


@pytest.fixture(autouse=True)
def made(monkeypatch):
    """As long as the number of steps that were captured."""
    return count_captures(monkeypatch)


def train(model):
    model.train()


def hook(model):
    model.decoder.block[0].ff_layer.wo.register_forward_hook(lambda module, given, output: output * 2)


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
        monkeypatch.setattr(decoding_inputs, "MOST_BYTES", 4 * numbers - 1)
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
        monkeypatch.setattr(decoding_inputs, "MOST_BYTES", 4 * numbers - 1)
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
