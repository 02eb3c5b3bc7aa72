"""Stacks that run on the real tokens alone equal padded ones on eager: logits, gradients, hidden states, decoding.

The attention operator is torch's reference here, as on any CPU; `test_fused_attention.py` runs the same on the kernels.
"""

import copy

import pytest
import torch
from model_parity import batch, build_flash, build_stock, flash_name, gradient_scale, relative_error
from position_kinds import KINDS, kind_model

import fat5.model.attention_mask
import fat5.model.lm_head_flash_t5
import fat5.model.packed_stack
from fat5.model import FlashT5EncoderModel
from fat5.model.attention import ATTENTION_FUNCTIONS, sdpa_attention
from fat5.model.packed_inputs import until_last_label


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setattr(fat5.model.attention_mask, "kernels_serve", lambda _: True)


def pair(family="t5", **overrides):
    stock = build_stock(family, **overrides)
    return [build_flash(family, stock, name, **overrides) for name in ("eager", "fat5")]


def masked(kind):
    """A batch, and the number of its tokens that are real: (encoder, decoder)."""
    padding = kind if kind in ("left", "right") else "right" if kind == "labels" else "none"
    inputs = batch(padding, 21, 13)
    if kind == "holes":
        for i, name in enumerate(("attention_mask", "decoder_attention_mask")):
            seen = torch.rand(inputs[name].shape, generator=torch.Generator().manual_seed(i)) < 0.7
            seen[0, :3] = seen[1, -3:] = False  # and padding on both sides
            inputs[name] = seen.long()
        inputs["labels"][inputs["decoder_attention_mask"] == 0] = -100
    if kind == "encoder":
        inputs["attention_mask"][1, 4:] = 0
        del inputs["decoder_attention_mask"]
    if kind == "labels":  # as from a collator: what is behind the last label is all that tells padding
        del inputs["decoder_input_ids"], inputs["decoder_attention_mask"]
        inputs["labels"][0, 2] = -100  # but this is in the middle, and its successors look back at it
    if kind == "none":
        del inputs["attention_mask"], inputs["decoder_attention_mask"]
    if kind == "segments":
        del inputs["attention_mask"], inputs["decoder_attention_mask"]
        for side, name in (("encoder", "input_ids"), ("decoder", "labels")):
            ids = torch.ones_like(inputs[name])
            ids[:, 5:], ids[:, 9:], ids[1:, 12:] = 2, 3, 0
            inputs[f"{side}_segment_ids"] = ids
        inputs["labels"][inputs["decoder_segment_ids"] == 0] = -100
        del inputs["decoder_input_ids"]
    if kind == "stream":
        lengths = {"encoder": [4, 9, 1, 8], "decoder": [3, 6, 2, 5]}
        inputs = {
            "input_ids": torch.randint(2, 99, (1, 22)),
            "labels": torch.randint(2, 99, (1, 16)),
        }
        for side, its in lengths.items():
            inputs[f"{side}_cu_seqlens"] = torch.tensor([0, *its]).cumsum(0)
            inputs[f"{side}_max_length"] = max(its)
    padded = 3 * 21, 3 * 13
    real = {
        "right": (63 - 21, 39 - 15), "left": (63 - 21, 39 - 15), "labels": (63 - 21, 39 - 15), "encoder": (63 - 17, 39),
        "segments": (21 + 24, 13 + 24), "stream": (22, 16), "none": padded,
    }  # fmt: skip
    if kind == "holes":
        return inputs, tuple(inputs[name].sum().item() for name in ("attention_mask", "decoder_attention_mask"))
    return inputs, real[kind]


def tokens_of(model):
    """Count the tokens that go through the feed-forward layers of a call: (encoder's, decoder's)."""
    seen = {}
    for name in ("encoder", "decoder"):
        for block in getattr(model, name).block:
            block.ff_layer.wo.register_forward_hook(
                lambda _, arguments, __, name=name: seen.update({name: arguments[0].shape[:-1].numel()})
            )
    return seen


def gradients(model, inputs):
    model.zero_grad()
    output = model(**inputs, output_hidden_states=True)
    output.loss.backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_as_exact(grads, expected, eager, inputs):
    """Gradients are as near those of eager in fp64 as twice those of eager in fp32, with a floor for rounding."""
    _, exact = gradients(copy.deepcopy(eager).double(), inputs)
    for name, gradient in exact.items():
        plain = relative_error(expected[name].double(), gradient)
        assert relative_error(grads[name].double(), gradient) <= 2 * plain + 2e-6, name


def real_tokens(inputs):
    """Bool masks of the encoder's and the decoder's real tokens."""
    if "encoder_segment_ids" in inputs:
        return inputs["encoder_segment_ids"] > 0, inputs["decoder_segment_ids"] > 0
    source, target = inputs["input_ids"], inputs["labels"]
    encoder = inputs.get("attention_mask", torch.ones_like(source)).bool()
    return encoder, inputs["decoder_attention_mask"].bool() if "decoder_attention_mask" in inputs else (
        until_last_label(target) if "decoder_input_ids" not in inputs else torch.ones_like(target).bool()
    )


@pytest.mark.parametrize("family", ["t5", "umt5"])
@pytest.mark.parametrize("kind", ["none", "right", "left", "labels", "encoder", "segments", "stream", "holes"])
def test_a_stack_without_padding_computes_the_same(family, kind):
    eager, fused = pair(family)
    inputs, real = masked(kind)
    seen = tokens_of(fused)
    (output, grads), (expected, expected_grads) = gradients(fused, inputs), gradients(eager, inputs)
    assert (seen["encoder"], seen["decoder"]) == real
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    encoder, decoder = real_tokens(inputs)
    assert relative_error(output.logits[decoder], expected.logits[decoder]) < 1e-5
    for states, its, mask in (
        (output.encoder_hidden_states, expected.encoder_hidden_states, encoder),
        (output.decoder_hidden_states, expected.decoder_hidden_states, decoder),
    ):
        assert len(states) == len(its) == 3
        for one, two in zip(states, its, strict=True):
            assert one.shape == two.shape
            assert relative_error(one[mask], two[mask]) < 1e-5
            assert one[~mask].abs().sum() == 0
    assert_as_exact(grads, expected_grads, eager, inputs)


def beside_decoder_inputs(monkeypatch):
    """Stock, a model in training whose loss is fused, and what `DataCollatorForSeq2Seq(model=model)` gives."""
    monkeypatch.setattr(fat5.model.lm_head_flash_t5, "kernels_serve", lambda _: True)
    stock = build_stock("t5")
    inputs, real = masked("labels")
    inputs["decoder_input_ids"] = stock.prepare_decoder_input_ids_from_labels(inputs["labels"])
    return stock, build_flash("t5", stock, "fat5").train(), inputs, real


@pytest.mark.parametrize("form", ["decoder_input_ids", "decoder_inputs_embeds"])
def test_labels_tell_padding_beside_decoder_inputs_in_training(form, monkeypatch):
    stock, fused, inputs, real = beside_decoder_inputs(monkeypatch)
    if form == "decoder_inputs_embeds":
        inputs[form] = stock.shared(inputs.pop("decoder_input_ids")).detach()
    seen = tokens_of(fused)
    loss, expected = (model(**inputs).loss for model in (fused, stock))
    assert (seen["encoder"], seen["decoder"]) == real
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for model, its in ((fused, loss), (stock, expected)):
        its.backward()
        model.gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    for name, gradient in stock.gradients.items():
        assert relative_error(fused.gradients[flash_name(name)], gradient) < 1e-5, name
    logits = fused.eval()(**inputs).logits  # whoever gives inputs may want all of these
    assert seen["decoder"] == inputs["labels"].numel()
    assert relative_error(logits, stock(**inputs).logits) < 1e-5


@pytest.mark.parametrize("shown", ["logits", "output_hidden_states", "output_attentions"])
def test_labels_tell_nothing_of_given_inputs_that_are_shown(shown, monkeypatch):
    """In training, too: an adapted head returns logits, and states are asked for."""
    stock, fused, inputs, _ = beside_decoder_inputs(monkeypatch)
    more = {"output_hidden_states": True}
    if shown == "logits":
        fused.lm_head, more = torch.nn.Sequential(fused.lm_head), {}
    elif shown == "output_attentions":
        more[shown] = True
    got, expected = fused(**inputs, **more), stock(**inputs, **more)
    if shown == "logits":
        assert relative_error(got.logits, expected.logits) < 1e-5
    else:
        assert relative_error(got.decoder_hidden_states[-1], expected.decoder_hidden_states[-1]) < 1e-5


@pytest.mark.parametrize("inputs", [3, 7])
def test_labels_that_do_not_fit_the_decoder_s_inputs_are_refused(inputs, monkeypatch):
    """As behind a soft prompt that the labels know nothing of: places counted in them would be others' places."""
    monkeypatch.setattr(fat5.model.lm_head_flash_t5, "kernels_serve", lambda _: True)
    _, fused = pair()
    labels = torch.randint(2, 99, (2, 5))
    labels[0, -1] = -100
    with pytest.raises(ValueError, match=rf"labels must be ints \[2, {inputs}\]"):
        fused.train()(input_ids=labels.clamp(min=2), decoder_input_ids=torch.randint(2, 99, (2, inputs)), labels=labels)


def test_labels_tell_nothing_of_tokens_in_a_cache():
    """As in training behind a prefix: the mask of the labels would not cover it."""
    eager, fused = pair()
    inputs, _ = masked("labels")
    losses = []
    for model in (eager, fused):
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        prefix = model(**given, decoder_input_ids=inputs["labels"][:, :1].clamp(min=0), use_cache=True).past_key_values
        losses.append(model.train()(**inputs, past_key_values=prefix).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("position", sorted(KINDS))
@pytest.mark.parametrize("kind", ["right", "left", "segments", "holes"])
def test_no_kind_of_positions_computes_padding(position, kind):
    """Distances and positions are those of the padded rows, as eager counts them; FIRE's has weights to learn."""
    eager, fused = (kind_model(position, name) for name in ("eager", "fat5"))
    inputs, real = masked(kind)
    seen = tokens_of(fused)
    (output, grads), (expected, expected_grads) = gradients(fused, inputs), gradients(eager, inputs)
    assert (seen["encoder"], seen["decoder"]) == real
    _, decoder = real_tokens(inputs)
    assert relative_error(output.logits[decoder], expected.logits[decoder]) < 1e-5
    for name, weight in eager.named_parameters():
        if weight.requires_grad and not name.endswith("mlp.2.bias"):  # whose gradient is zero: it shifts all scores
            error = (grads[name] - expected_grads[name]).abs().max()
            assert error < 5e-5 * gradient_scale(name, dict(eager.named_parameters())), name


@pytest.mark.parametrize("position", KINDS)
@pytest.mark.parametrize("kind", ["right", "left", "holes", "none"])
def test_an_encoder_without_kernels_computes_padding_in_attention_alone(position, kind, kernels, monkeypatch):
    monkeypatch.setattr(fat5.model.attention_mask, "kernels_serve", lambda _: False)
    eager, fused = (kind_model(position, implementation) for implementation in ("eager", "fat5"))
    inputs, (real, _) = masked(kind)
    seen, calls = tokens_of(fused), []
    monkeypatch.setitem(ATTENTION_FUNCTIONS, "fat5", lambda *args: calls.append(args[0].shape) or sdpa_attention(*args))
    (output, grads), (expected, expected_grads) = gradients(fused, inputs), gradients(eager, inputs)
    assert (seen["encoder"], seen["decoder"]) == (real, 3 * 13)
    assert calls == [(3, 4, 21, 6)] * 2 + [(3, 4, 13, 6)] * 4  # encoder, decoder and across
    encoded, _ = real_tokens(inputs)
    for ours, its in zip(output.encoder_hidden_states, expected.encoder_hidden_states, strict=True):
        assert relative_error(ours[encoded], its[encoded]) < 1e-5
    assert relative_error(output.loss, expected.loss) < 1e-5
    for name, weight in eager.named_parameters():
        if weight.requires_grad and not name.endswith("mlp.2.bias"):
            error = (grads[name] - expected_grads[name]).abs().max()
            assert error < 5e-5 * gradient_scale(name, dict(eager.named_parameters())), name


@pytest.mark.parametrize(("position", "in_rows"), [("none", False), ("rope", False), ("t5", True), ("alibi", True)])
def test_attention_itself_goes_back_to_rows_only_for_distances(position, in_rows, monkeypatch):
    """With holes in a mask, and where positions are a bias; rotary ones are counted in the rows beforehand."""
    model, calls = kind_model(position, "fat5"), []
    monkeypatch.setitem(ATTENTION_FUNCTIONS, "fat5", lambda *args: calls.append(args[0].shape) or sdpa_attention(*args))
    model(**masked("left")[0])
    assert not calls
    model(**masked("holes")[0])
    assert calls == ([(3, 4, 21, 6)] * 2 + [(3, 4, 13, 6)] * 2 if in_rows else [])  # never across


def test_randomised_positions_are_drawn_for_the_padded_rows():
    fields = {"use_randomized_position_encoding": True, "max_sequence_length": 64}
    for position in ("t5", "rope"):
        models = [kind_model(position, name, **fields).train() for name in ("eager", "fat5")]
        for kind in ("left", "holes"):
            (inputs, real), losses = masked(kind), []
            seen = tokens_of(models[1])
            for model in models:
                torch.manual_seed(3)
                losses.append(model(**inputs).loss.item())
            assert losses[1] == pytest.approx(losses[0], rel=1e-5)
            assert (seen["encoder"], seen["decoder"]) == real


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "fat5"])
def test_a_stream_computes_what_its_examples_do_one_by_one(implementation):
    model = build_flash("t5_v1_1", build_stock("t5_v1_1"), implementation)
    inputs, _ = masked("stream")
    _, grads = gradients(model, inputs)
    grads = {name: gradient.clone() for name, gradient in grads.items()}
    stream_loss = model(**inputs).loss
    model.zero_grad()
    total = 0.0
    sides = [inputs[x][0].split(inputs[f"{s}_cu_seqlens"].diff().tolist()) for x, s in
             (("input_ids", "encoder"), ("labels", "decoder"))]  # fmt: skip
    for source, target in zip(*sides, strict=True):
        loss = model(input_ids=source[None], labels=target[None]).loss * len(target) / 16
        loss.backward()
        total += loss.item()
    assert stream_loss.item() == pytest.approx(total, rel=1e-5)
    for name, parameter in model.named_parameters():
        assert relative_error(grads[name], parameter.grad) < 1e-5, name
    without = {name: value for name, value in inputs.items() if "max_length" not in name}
    assert model(**without).loss.item() == stream_loss.item()


def test_a_stream_may_hold_examples_without_tokens_on_one_side():
    eager, fused = pair()
    inputs, _ = masked("stream")
    inputs["encoder_cu_seqlens"] = torch.tensor([0, 0, 13, 14, 22])
    inputs["encoder_max_length"] = 13
    (output, grads), (expected, expected_grads) = gradients(fused, inputs), gradients(eager, inputs)
    assert relative_error(output.logits, expected.logits) < 1e-5
    assert_as_exact(grads, expected_grads, eager, inputs)


@pytest.mark.parametrize("implementation", ["sdpa", "fat5"])
def test_an_encoder_alone_takes_streams(implementation):
    _, model = pair()
    encoder = FlashT5EncoderModel(model.config).eval()
    encoder.load_state_dict({k: v for k, v in model.state_dict().items() if k.startswith(("encoder", "shared"))})
    encoder.set_attn_implementation(implementation)
    inputs, _ = masked("stream")
    output = encoder(inputs["input_ids"], encoder_cu_seqlens=inputs["encoder_cu_seqlens"], encoder_max_length=9)
    alone = encoder(inputs["input_ids"][:, 4:13]).last_hidden_state
    assert relative_error(output.last_hidden_state[:, 4:13], alone) < 1e-5


@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 1}])
def test_generation_from_padded_prompts(side, options):
    """A prompt in the decoder fills the cache from a packed stack; beams reorder its rows."""
    eager, fused = pair("t5_v1_1")
    inputs = batch(side, 21, 5) if side != "right" else batch("right", 21, 13)
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    if side == "left":
        given |= {name: inputs[name] for name in ("decoder_input_ids", "decoder_attention_mask")}
        given["decoder_attention_mask"][1] = 1
        given["decoder_attention_mask"][2, :] = torch.tensor([0, 1, 1, 1, 1])
        given["decoder_input_ids"][:, 0] = 0
    seen = tokens_of(fused)
    options = {**options, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(fused.generate(**given, **options), eager.generate(**given, **options))
    assert seen["encoder"] == inputs["attention_mask"].sum()


@pytest.mark.parametrize("position", ["t5", "fire", "rope"])
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_a_cache_filled_by_a_packed_prompt_can_be_continued(side, position):
    eager, fused = (kind_model(position, name) for name in ("eager", "fat5"))
    inputs, real = masked(side)
    seen = tokens_of(fused)
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    ids, mask = inputs["decoder_input_ids"], inputs["decoder_attention_mask"]
    results = []
    for model in (eager, fused):
        with torch.no_grad():
            first = model(**given, decoder_input_ids=ids, decoder_attention_mask=mask, use_cache=True)
            if model is fused:
                assert (seen["encoder"], seen["decoder"]) == real
            more = {"decoder_attention_mask": torch.cat([mask, torch.ones(3, 2).long()], 1)}
            then = model(**given, decoder_input_ids=ids[:, :2], past_key_values=first.past_key_values, **more)
        results.append(then.logits)
    assert relative_error(*reversed(results)) < 1e-5


def test_compiled_and_captured_graphs_stay_padded(monkeypatch):
    """Only a stream stays packed there, as it needs no look at a mask."""
    _, fused = pair()
    seen = tokens_of(fused)
    monkeypatch.setattr(fat5.model.packed_stack, "host_may_look", lambda _: False)
    for kind, expected in (("right", (63, 39)), ("segments", (63, 39)), ("stream", (22, 16))):
        fused(**masked(kind)[0])
        assert (seen["encoder"], seen["decoder"]) == expected


@pytest.mark.parametrize("kind", ["right", "segments", "stream"])
def test_gradient_checkpointing(kind):
    eager, fused = pair()
    fused.train().gradient_checkpointing_enable()
    inputs, _ = masked(kind)
    (_, grads), (_, expected) = gradients(fused, inputs), gradients(eager, inputs)
    assert_as_exact(grads, expected, eager, inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_cu_seqlens": None, "decoder_max_length": None}, "Give segments of encoder and decoder"),
        ({"encoder_segment_ids": torch.ones(1, 22)}, "`encoder_segment_ids` or `encoder_cu_seqlens`, not both"),
        ({"encoder_cu_seqlens": None}, "`encoder_max_length` goes with `encoder_cu_seqlens`"),
        ({"attention_mask": torch.ones(1, 22)}, "leave the encoder's attention mask out"),
        ({"decoder_cu_seqlens": torch.tensor([0, 3, 16]), "decoder_max_length": 13}, "has 4 segments and the decoder"),
        ({"encoder_cu_seqlens": torch.tensor([0, 4, 13, 14, 21])}, "must rise from 0 to the 22 tokens"),
        ({"encoder_cu_seqlens": torch.tensor([0, 13, 4, 14, 22])}, "must rise from 0 to the 22 tokens"),
        ({"encoder_cu_seqlens": torch.tensor([1, 4, 13, 14, 22])}, "must rise from 0 to the 22 tokens"),
        ({"encoder_max_length": 8}, "by at most `encoder_max_length` 8 at a time"),
        ({"input_ids": torch.ones(2, 11).long()}, r"beside a single row of tokens \[1, T\]"),
        ({"decoder_cu_seqlens": torch.tensor([0.0, 3, 9, 11, 16])}, "must be ints"),
    ],
)
def test_streams_that_do_not_fit_are_refused(changes, message):
    eager, _ = pair(num_layers=1)
    inputs = {**masked("stream")[0], **changes}
    with pytest.raises(ValueError, match=message):
        eager(**{name: value for name, value in inputs.items() if value is not None})


def test_generate_refuses_streams():
    eager, _ = pair(num_layers=1)
    inputs, _ = masked("stream")
    del inputs["labels"]
    with pytest.raises(ValueError, match="give it unpacked inputs"):
        eager.generate(**inputs)
