"""Steps of decoding as CUDA graphs: the memory they work in, and who else works in it."""

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

from fat5.model import decoding_graphs, decoding_inputs

pytestmark = needs_counting_caches


@pytest.fixture(autouse=True)
def made(monkeypatch):
    """As long as the number of steps that were captured."""
    return count_captures(monkeypatch)


@torch.no_grad()
def test_an_output_is_not_overwritten_by_the_next(made):
    model, inputs = build(), draw()
    given = begin(model, inputs)
    kept = []
    for token in inputs["decoder_input_ids"][:, 1:5].split(1, dim=1):
        logits = step(model, **given, decoder_input_ids=token).logits
        kept.append((logits, logits.clone()))
    assert all(torch.equal(*pair) for pair in kept)
    assert not torch.equal(kept[-1][0], kept[-2][0])


def test_a_graph_serves_in_and_out_of_inference_mode(made):
    model, inputs = build(), draw()
    for mode in (torch.inference_mode, torch.no_grad) * 3:
        with mode():
            check(model, inputs)
    assert len(made) == 1


@torch.no_grad()
def test_a_full_cache_is_left_to_say_so(made):
    model, inputs = build(), draw()
    given, ids = begin(model, inputs), inputs["decoder_input_ids"]
    continued(model, given, ids[:, 1:9])
    with pytest.raises(LeftToCompileError):
        continued(model, given, ids[:, 9:10])


@torch.no_grad()
def test_longer_caches_and_training_in_between_cost_no_graph(made):
    model = build()
    given = of_encoder(draw())
    options = {"do_sample": False, "cache_implementation": "static", "compile_config": COMPILE}
    for tokens in (6, 6, 6, 9, 9, 9):
        model.generate(**given, **options, max_new_tokens=tokens, min_new_tokens=tokens)
    assert len(made) == 4  # of each length a first step and later ones
    assert len(model._decoding_graphs._graphs) == 4
    check(model.train().eval(), draw())
    before = len(made)
    model.train()
    with pytest.raises(LeftToCompileError):
        continued(model, begin(model, draw()), draw()["decoder_input_ids"][:, 1:2])
    model.eval()
    model.generate(**given, **options, max_new_tokens=9, min_new_tokens=9)
    assert len(made) == before


@torch.no_grad()
def test_a_moved_cache_can_be_compiled_with():
    model, inputs = build(), draw()
    check(model, inputs)
    given = begin(model, inputs)
    continued(model, given, inputs["decoder_input_ids"][:, 1:2])
    assert decoding_graphs.is_shared(model._decoding_graphs._memory[0])
    step = torch.compile(model.forward, backend="aot_eager")
    got = step(**given, decoder_input_ids=inputs["decoder_input_ids"][:, 2:3]).logits
    of_all = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    expected = model(**of_all, decoder_input_ids=inputs["decoder_input_ids"][:, :3]).logits[:, 2:]
    assert relative_error(got, expected) < TOLERANCE


@torch.no_grad()
def test_a_rehearsal_that_failed_is_repeated(made, monkeypatch):
    model, inputs = build(), draw()
    given, token = begin(model, inputs), inputs["decoder_input_ids"][:, 1:2]
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            continued(model, given, token)
    continued(model, given, token)
    assert not made


@torch.no_grad()
def test_without_memory_for_a_graph_the_rest_is_left_to_compile(made, monkeypatch):
    model, inputs = build(), draw()
    ids = inputs["decoder_input_ids"]
    tried = []

    def fail(*_, **__):
        tried.append(True)
        raise torch.OutOfMemoryError

    def no_memory_for_caches(*shape, empty=torch.empty, **options):
        return fail() if options.get("dtype") == torch.uint8 else empty(*shape, **options)

    given = begin(model, inputs)
    continued(model, given, ids[:, 1:2])
    with monkeypatch.context() as patch:
        patch.setattr(decoding_graphs, "_CapturedStep", fail)
        for token in ids[:, 2:4].split(1, dim=1):
            with pytest.raises(LeftToCompileError):
                continued(model, given, token)
    assert len(tried) == 2  # once more with the memory that the allocator held free
    check(model, inputs)
    model._decoding_graphs._memory = None
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", no_memory_for_caches)
        check(model, inputs)
    assert len(tried) == 3
    assert len(made) == 2  # the latter where the cache is its own


@torch.no_grad()
def test_without_memory_for_a_first_step_it_is_done_as_it_is(made, monkeypatch):
    model = build()
    given = of_encoder(draw())
    options = {"max_new_tokens": 6, "min_new_tokens": 6}
    expected = model.generate(**given, **options, cache_implementation="dynamic")

    def fail(model, inputs, *_):
        model(**decoding_inputs.with_copies(inputs, decoding_inputs.read_in_a_step(inputs)))  # as it is captured
        layers = decoding_inputs.layers_of(inputs["past_key_values"])
        for layer in layers:  # which computes nothing
            layer.keys.zero_()
            layer.cumulative_length.sub_(layer.cumulative_length)
        raise torch.OutOfMemoryError

    model.generate(**given, **options)
    with monkeypatch.context() as patch:
        patch.setattr(decoding_graphs, "_CapturedStep", fail)
        assert torch.equal(model.generate(**given, **options), expected)
    assert torch.equal(model.generate(**given, **options), expected)


@torch.no_grad()
def test_a_large_cache_and_one_of_the_users_stay_where_they_are(monkeypatch):
    model, inputs = build(), draw()
    check(model, inputs)
    for lasting, most in ((False, 0), (True, decoding_inputs.MOST_BYTES), (False, decoding_inputs.MOST_BYTES)):
        monkeypatch.setattr(decoding_inputs, "MOST_BYTES", most)
        given = begin(model, inputs)
        given["past_key_values"]._is_user_defined = lasting
        keys = given["past_key_values"].self_attention_cache.layers[0].keys
        continued(model, given, inputs["decoder_input_ids"][:, 1:3])
        stays = given["past_key_values"].self_attention_cache.layers[0].keys is keys
        assert stays == (lasting or most == 0)


@torch.no_grad()
def test_steps_wait_for_one_another():
    model, inputs = build(), draw()
    given = begin(model, inputs)
    model.get_compiled_call(None)

    def run():
        with torch.no_grad():
            return step(model, **given, decoder_input_ids=inputs["decoder_input_ids"][:, 1:2])

    with ThreadPoolExecutor(1) as pool:
        with decoding_graphs._lock:
            waiting = pool.submit(run)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=1)
        assert waiting.result(timeout=60).logits.isfinite().all()


def test_threads_share_a_model(made):
    model = build()
    given = [
        {name: x[:, :20] for name, x in draw().items() if "decoder" not in name and name != "labels"} for _ in range(4)
    ]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = [model.generate(**inputs, **options, cache_implementation="dynamic") for inputs in given]

    def generate(inputs):
        return [
            model.generate(**inputs, **options, cache_implementation=cache, compile_config=COMPILE)
            for cache in ("static", None, "static")
        ]

    with ThreadPoolExecutor(4) as pool:
        for got, tokens in zip(pool.map(generate, given), expected, strict=True):
            assert all(torch.equal(one, tokens) for one in got)
    assert len(model._decoding_graphs._graphs) == 2


@torch.no_grad()
def test_a_cache_that_somebody_holds_is_not_written_to():
    model, inputs = build(), draw()
    check(model, inputs)
    held = []
    for hold in (lambda cache: cache, lambda cache: cache.self_attention_cache.layers[1].values[:, :, 2:4]):
        given = begin(model, inputs)
        continued(model, given, inputs["decoder_input_ids"][:, 1:4])
        held.append(hold(given["past_key_values"]))
        values = given["past_key_values"].self_attention_cache.layers[1].values
        before = values.clone()
        del given
        check(model, draw())
        assert torch.equal(values, before)


@torch.no_grad()
def test_a_held_cache_keeps_its_memory_and_others_get_new(made):
    model = build()
    given = of_encoder(draw())
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "cache_implementation": "static", "compile_config": COMPILE}
    held = model.generate(**given, **options, return_dict_in_generate=True)
    keys = held.past_key_values.self_attention_cache.layers[0].keys
    before = keys.clone()
    for captured in (3, 3):  # one for the held cache, then those of first and later steps
        assert torch.equal(model.generate(**given, **options), held.sequences)
        assert len(made) == captured
    assert torch.equal(keys, before)


@pytest.mark.gpu
@torch.no_grad()
def test_later_calls_of_generate_find_their_graph(made):
    model = build(d_model=128, d_kv=64, vocab_size=512).bfloat16()
    ids = torch.randint(2, 512, (4, 50), device=DEVICE)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
    first = model.generate(ids, **options)
    model.generate(ids, **options)
    captured = len(made)
    assert torch.equal(model.generate(ids, **options), first)
    assert len(made) == captured
    other = model.generate(ids.flip(0), **options)
    assert torch.equal(other, first.flip(0))
