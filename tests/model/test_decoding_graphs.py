"""Steps of decoding as CUDA graphs: when they serve, and that they compute what the model does.

Without a GPU a class stands in for the captured step, and what is tested is when it is made and used.
"""

import copy
import pickle

import pytest
import torch
from decoding_steps import (
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
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache

from fat5.model import decoding_graphs

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
