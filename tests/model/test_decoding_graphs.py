"""Steps of decoding as CUDA graphs: when they serve, and that they compute what the model does.

Without a GPU a class stands in for the captured step, and what is tested is when it is made and used.
"""

import copy
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from model_parity import batch, build_flash, build_stock, relative_error
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache, StaticLayer

from fat5.model import decoding_graphs

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
TOLERANCE = 2e-3 if ON_GPU else 1e-5  # fp32; on a GPU torch's products may be in TF32
pytestmark = pytest.mark.skipif(
    not hasattr(StaticLayer(max_cache_len=1), "cumulative_length"),
    reason="the static caches of transformers 4 do not count their tokens",
)


class Pool:
    """Stands in for the memory of graphs, which ends with the last of them."""

    graphs = 0
    is_gone = False

    def leave(self):
        self.graphs -= 1
        self.is_gone = self.graphs == 0


class Replays:
    """Stands in for a captured step: runs the model as the graph would, on the inputs and weights of the capture."""

    def __init__(self, model, inputs, pool, stream):
        assert not pool.is_gone
        pool.graphs += 1
        weakref.finalize(self, pool.leave)
        self.inputs = decoding_graphs.writable_copies(decoding_graphs.read_in_a_step(inputs))
        self.model = model
        self.places = list(decoding_graphs.places_of(inputs["past_key_values"]))

    def replay(self, inputs):
        """The model's output, where the graph would find the cache that it was captured with."""
        assert list(decoding_graphs.places_of(inputs["past_key_values"])) == self.places
        for name, x in decoding_graphs.read_in_a_step(inputs).items():
            self.inputs[name].copy_(x)
        return self.model(**{**inputs, **self.inputs})


@pytest.fixture(autouse=True)
def made(monkeypatch):
    """As long as the number of steps that were captured."""
    captured = []
    step = decoding_graphs._CapturedStep if ON_GPU else Replays

    def capture(*arguments):
        captured.append(len(captured))
        return step(*arguments)

    monkeypatch.setattr(decoding_graphs, "_CapturedStep", capture)
    if not ON_GPU:
        monkeypatch.setattr(decoding_graphs, "has_graphs", lambda device: True)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: torch.Stream("cpu"))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", Pool)
        monkeypatch.setattr(torch.cuda, "Stream", object)
    return captured


def build(family="t5_v1_1", attention="fat5", **overrides):
    return build_flash(family, build_stock(family, **overrides), attention, **overrides).to(DEVICE).eval()


def draw(padding="right", **lengths):
    return {name: x.to(DEVICE) for name, x in batch(padding, **lengths).items()}


def begin(model, inputs, cache=None):
    """What `generate` has after the first token."""
    encoder = model.encoder(inputs["input_ids"], attention_mask=inputs["attention_mask"], return_dict=True)
    if cache is None:
        config = model.config.get_text_config(decoder=True)
        cache = EncoderDecoderCache(*(StaticCache(config=config, max_cache_len=n) for n in (9, encoder[0].shape[1])))
    given = {"encoder_outputs": encoder, "attention_mask": inputs["attention_mask"], "past_key_values": cache}
    given |= {"use_cache": True, "return_dict": True}
    model(**given, decoder_input_ids=inputs["decoder_input_ids"][:, :1])
    return given


class LeftToCompileError(Exception):
    """What stands for torch.compile was called."""


def otherwise(**inputs):
    raise LeftToCompileError


def step(model, **inputs):
    if "_decoding_graphs" not in vars(model):
        model.get_compiled_call(None)
    return model._decoding_graphs.step(model, otherwise, **inputs)


def continued(model, given, ids):
    """Logits `[B, L, V]` of tokens `[B, L]`, step by step."""
    return torch.cat([step(model, **given, decoder_input_ids=x).logits for x in ids.split(1, dim=1)], dim=1)


def check(model, inputs, tokens=6):
    """Steps give the logits of one call for all tokens."""
    ids = inputs["decoder_input_ids"][:, :tokens]
    given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    expected = model(**given, decoder_input_ids=ids).logits[:, 1:]
    got = continued(model, begin(model, inputs), ids[:, 1:])
    assert relative_error(got, expected) < TOLERANCE
    return got


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
    expected = model(**{n: inputs[n] for n in ("input_ids", "attention_mask")}, decoder_input_ids=ids[:, :6]).logits
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
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(**given, **options)
    config = CompileConfig()
    config._compile_all_devices = True
    for _ in range(2):
        got = model.generate(**given, **options, cache_implementation="static", compile_config=config)
        assert torch.equal(got, expected)
        assert made
    captured = len(made)
    plain = CompileConfig(backend="eager", mode=None)
    plain._compile_all_devices = True
    got = model.generate(**given, **options, cache_implementation="static", compile_config=plain)
    assert torch.equal(got, expected)
    assert len(made) == captured


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
    assert len(made) == 2  # the cache's own place, and that where later ones lie


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
    given = {name: x for name, x in draw().items() if name in ("input_ids", "attention_mask")}
    config = CompileConfig()
    config._compile_all_devices = True
    options = {"do_sample": False, "cache_implementation": "static", "compile_config": config}
    for tokens in (6, 6, 6, 9, 9, 9):
        model.generate(**given, **options, max_new_tokens=tokens, min_new_tokens=tokens)
    assert len(made) == 4
    assert len(model._decoding_graphs._graphs) == 2
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
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", no_memory_for_caches)
        check(model, inputs)
    assert len(tried) == 3


@torch.no_grad()
def test_a_large_cache_and_one_of_the_users_stay_where_they_are(monkeypatch):
    model, inputs = build(), draw()
    check(model, inputs)
    for lasting, most in ((False, 0), (True, decoding_graphs.MOST_BYTES), (False, decoding_graphs.MOST_BYTES)):
        monkeypatch.setattr(decoding_graphs, "MOST_BYTES", most)
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
    config = CompileConfig()
    config._compile_all_devices = True
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = [model.generate(**inputs, **options) for inputs in given]

    def generate(inputs):
        return [
            model.generate(**inputs, **options, cache_implementation="static", compile_config=config) for _ in range(3)
        ]

    with ThreadPoolExecutor(4) as pool:
        for got, tokens in zip(pool.map(generate, given), expected, strict=True):
            assert all(torch.equal(one, tokens) for one in got)
    assert len(model._decoding_graphs._graphs) == 1


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
        del values
    assert decoding_graphs.is_shared(model._decoding_graphs._memory[0])
    held.clear()
    assert not decoding_graphs.is_shared(model._decoding_graphs._memory[0])


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
