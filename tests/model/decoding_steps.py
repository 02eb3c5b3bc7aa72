"""Steps of decoding by graphs, for the tests of them, and what stands in for CUDA's part where there is no GPU."""

import weakref

import pytest
import torch
from model_parity import batch, build_flash, build_stock, relative_error
from transformers import CompileConfig
from transformers.cache_utils import EncoderDecoderCache, StaticCache, StaticLayer

from fat5.model import decoding_graphs, decoding_inputs, decoding_state

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
TOLERANCE = 2e-3 if ON_GPU else 1e-5  # fp32; on a GPU torch's products may be in TF32
COMPILE = CompileConfig()  # as `generate` takes by itself on a GPU
COMPILE._compile_all_devices = True
needs_counting_caches = pytest.mark.skipif(
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
        self.inputs = decoding_inputs.writable_copies(decoding_inputs.read_in_a_step(inputs))
        self.model, self.encoded = model, inputs["encoder_outputs"]
        self.places = list(decoding_inputs.places_of(inputs["past_key_values"]))

    def replay(self, inputs):
        """The model's output, where the graph would find the cache that it was captured with."""
        assert list(decoding_inputs.places_of(inputs["past_key_values"])) == self.places
        for name, x in decoding_inputs.read_in_a_step(inputs).items():
            self.inputs[name].copy_(x)
        return self.model(**decoding_inputs.with_copies(inputs | {"encoder_outputs": self.encoded}, self.inputs))


def count_captures(monkeypatch):
    """A list as long as the number of steps that were captured."""
    captured = []
    step = decoding_graphs._CapturedStep if ON_GPU else Replays

    def capture(*arguments):
        captured.append(len(captured))
        return step(*arguments)

    monkeypatch.setattr(decoding_graphs, "_CapturedStep", capture)
    if not ON_GPU:
        monkeypatch.setattr(decoding_state, "has_graphs", lambda device: True)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: torch.Stream("cpu"))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", Pool)
        monkeypatch.setattr(torch.cuda, "Stream", object)
    return captured


def build(family="t5_v1_1", attention="fat5", **overrides):
    return build_flash(family, build_stock(family, **overrides), attention, **overrides).to(DEVICE).eval()


def draw(padding="right", **lengths):
    return {name: x.to(DEVICE) for name, x in batch(padding, **lengths).items()}


def of_encoder(inputs):
    """What the encoder reads of a batch, and so what `generate` is called with."""
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


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
