"""What training and fine-tuning tools do with the model."""

import pytest
import torch
from model_parity import FAMILIES, SHAPE, batch, build_pair, relative_error
from peft import LoraConfig, get_peft_model
from position_kinds import KINDS, kind_model
from torch import nn
from transformers import Trainer, TrainingArguments

import fat5.model.attention_mask
from fat5.model import FlashT5Config, FlashT5EncoderModel, FlashT5ForConditionalGeneration, FlashT5Model
from fat5.model.attention import eager_attention


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["t5", "umt5"])
def test_gradient_checkpointing_changes_nothing(family, reentrant, implementation):
    _, flash = build_pair(family, implementation)
    flash.train()
    inputs = batch("right")
    expected = gradients(flash, inputs)
    flash.gradient_checkpointing_enable({"use_reentrant": reentrant})
    flash.enable_input_require_grads()  # what Trainer does for the reentrant kind
    calls = []
    hook = flash.decoder.block[0].ff_layer.register_forward_pre_hook(lambda *_: calls.append(1))
    actual = gradients(flash, inputs)
    hook.remove()
    assert len(calls) == 2, "the block was not recomputed"
    for name, gradient in expected.items():
        assert relative_error(actual[name], gradient) < 1e-5, name


@pytest.mark.parametrize("position", sorted(KINDS))
def test_reentrant_checkpointing_leaves_no_mark_on_what_models_share(position, monkeypatch):
    """It marks what a layer hands on as learning: ALiBi's slopes, say, which lie ready for every model."""
    monkeypatch.setattr(fat5.model.attention_mask, "kernels_serve", lambda _: True)
    inputs = batch("right")
    model = kind_model(position, "fat5").train()
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    for name, gradient in gradients(model, inputs).items():
        if not name.endswith("mlp.2.bias"):  # whose gradient is zero: it shifts all scores
            assert relative_error(gradient, expected[name]) < 1e-5, name
    kind_model(position, "fat5").eval()(**inputs)


def test_loss_over_accumulated_batches_is_that_of_one_batch():
    _, flash = build_pair("t5_v1_1")
    inputs = batch("right")
    items = (inputs["labels"] != -100).sum()
    expected = gradients(flash, inputs)
    flash.zero_grad()
    for row in range(3):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        flash(**one, num_items_in_batch=items).loss.backward()
    for name, parameter in flash.named_parameters():
        assert relative_error(parameter.grad, expected[name]) < 1e-5, name


def test_loss_without_any_label_is_zero():
    _, flash = build_pair("t5")
    inputs = batch("none")
    inputs["labels"][:] = -100
    assert flash(**inputs).loss.item() == 0


def test_trainer_accumulates_exactly(tmp_path):
    """Three steps of one batch of four uneven rows, against the same rows in four micro-batches."""
    rows = []
    for length in (5, 17, 9, 23):
        labels = torch.full((23,), -100)
        labels[:length] = torch.randint(2, 99, (length,))
        rows.append({"input_ids": torch.randint(2, 99, (11,)), "labels": labels})
    weights = []
    for micro_batch in (4, 1):
        torch.manual_seed(0)
        model = FlashT5ForConditionalGeneration(FlashT5Config(**SHAPE))
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(micro_batch)),
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=4 // micro_batch,
            max_steps=3,
            optim="sgd",
            learning_rate=0.1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=rows).train()
        weights.append(model.state_dict())
    for name, weight in weights[0].items():
        assert relative_error(weights[1][name], weight) < 1e-5, name


def test_dropout_acts_in_training_only():
    model = FlashT5ForConditionalGeneration(FlashT5Config(**{**SHAPE, "dropout_rate": 0.3}))
    inputs = batch("right")
    model.train()
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
    model.eval()
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("target", ["Wq", "Wk", "Wv", "o", "wi_0", "wi_1", "wo"])
def test_lora_changes_the_logits_and_gets_gradients(target):
    _, flash = build_pair("t5_v1_1")
    inputs = batch("right")
    before = flash(**inputs).logits.detach()
    adapted = get_peft_model(flash, LoraConfig(target_modules=[target], r=2, task_type="SEQ_2_SEQ_LM"))
    adapted.eval()
    assert relative_error(adapted(**inputs).logits, before) < 1e-5
    weights = [weight for name, weight in adapted.named_parameters() if "lora_B" in name]
    assert len(weights) == {"Wq": 6, "Wk": 6, "Wv": 6, "o": 6}.get(target, 4)
    with torch.no_grad():
        for weight in weights:
            weight.normal_()
    output = adapted(**inputs)
    assert relative_error(output.logits, before) > 1e-3
    output.loss.backward()
    assert all(weight.grad.abs().max() > 0 for weight in weights)
    merged = adapted.merge_and_unload()
    assert relative_error(merged(**inputs).logits, output.logits) < 1e-4


def test_lora_on_the_embedding_reaches_both_stacks_in_forward_and_in_generate():
    _, flash = build_pair("t5_v1_1")
    adapted = get_peft_model(flash, LoraConfig(target_modules=["shared"], r=2, task_type="SEQ_2_SEQ_LM")).eval()
    inputs = batch("right")
    before = adapted(**inputs)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_embedding" in name:
                weight.normal_()
    after = adapted(**inputs)
    assert relative_error(after.encoder_last_hidden_state, before.encoder_last_hidden_state) > 1e-3
    direct = flash.get_encoder()(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    assert torch.equal(direct, after.encoder_last_hidden_state)
    again = adapted(encoder_outputs=(before.encoder_last_hidden_state,), **inputs)
    assert relative_error(again.logits, before.logits) > 1e-3


@pytest.mark.parametrize("size", [120, 60])
@pytest.mark.parametrize("family", ["t5", "t5_v1_1"])
def test_resized_embeddings_reach_both_stacks_and_the_head(family, size):
    _, flash = build_pair(family)
    inputs = {name: value.clamp(max=59) for name, value in batch("right").items()}
    with torch.no_grad():
        before = flash(**inputs)
        flash.resize_token_embeddings(size, mean_resizing=False)
        after = flash(**inputs)
    kept = min(size, 99)
    assert flash.config.vocab_size == flash.lm_head.out_features == after.logits.shape[-1] == size
    assert (flash.lm_head.weight is flash.shared.weight) == (family == "t5")
    assert relative_error(after.logits[..., :kept], before.logits[..., :kept]) < 1e-6
    if size == 120:
        new = {"input_ids": torch.full((1, 4), 119), "labels": torch.full((1, 4), 118)}
        flash(**new).loss.backward()
        assert flash.shared.weight.grad[119].abs().max() > 0
        assert flash.lm_head.weight.grad[118].abs().max() > 0


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [
        ("padded", "sdpa"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("padded", "eager"), ("packed", "sdpa")]),
        ("checkpointed", "sdpa"),
    ],
)
def test_compiles_to_one_graph(kind, implementation):
    _, flash = build_pair("t5_v1_1", implementation)
    flash.train()
    inputs = batch("right")
    if kind == "packed":
        inputs["encoder_segment_ids"] = inputs["attention_mask"]
        inputs["decoder_segment_ids"] = inputs["decoder_attention_mask"]
    expected = gradients(flash, inputs)
    if kind == "checkpointed":
        flash.gradient_checkpointing_enable({"use_reentrant": False})
    torch.compiler.reset()
    flash.compile(fullgraph=True, backend="aot_eager")
    actual = gradients(flash, inputs)
    for name, gradient in expected.items():
        assert relative_error(actual[name], gradient) < 1e-5, name


def test_initial_weights_have_t5s_spread():
    config = FlashT5Config(
        vocab_size=500, d_model=96, d_kv=16, d_ff=160, num_layers=1, num_heads=5, initializer_factor=0.5,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, relative_attention_num_buckets=64,
    )  # fmt: skip
    model = FlashT5ForConditionalGeneration(config)
    spread = {
        "shared.weight": 1.0,
        "lm_head.weight": 1.0,
        "Wq.weight": (96 * 16) ** -0.5,
        "Wk.weight": 96**-0.5,
        "Wv.weight": 96**-0.5,
        "o.weight": (5 * 16) ** -0.5,
        "relative_attention_bias.weight": 96**-0.5,
        "wi_0.weight": 96**-0.5,
        "wi_1.weight": 96**-0.5,
        "wo.weight": 160**-0.5,
    }
    for name, weight in model.named_parameters():
        if "layer_norm" in name:
            assert torch.equal(weight, torch.full_like(weight, 0.5))
            continue
        ending = next(ending for ending in spread if name == ending or name.endswith("." + ending))
        tolerance = 5 / weight.numel() ** 0.5  # about seven standard errors of a standard deviation
        assert weight.std().item() == pytest.approx(0.5 * spread[ending], rel=tolerance), name


@pytest.mark.parametrize("cls", [FlashT5Model, FlashT5EncoderModel, FlashT5ForConditionalGeneration])
def test_every_parameter_has_the_documented_name(cls):
    model = cls(FlashT5Config(**SHAPE, feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    names = {name for name, _ in model.named_parameters()}
    attention = [f"{weight}.weight" for weight in ("Wq", "Wk", "Wv", "o")]
    expected = {"shared.weight"} | ({"lm_head.weight"} if hasattr(model, "lm_head") else set())
    for stack in ("encoder", "decoder") if cls is not FlashT5EncoderModel else ("encoder",):
        expected.add(f"{stack}.final_layer_norm.weight")
        for block in (f"{stack}.block.0", f"{stack}.block.1"):
            self_attention, ff = f"{block}.self_attention_layer", f"{block}.ff_layer"
            expected |= {f"{self_attention}.self_attention.{name}" for name in attention}
            expected |= {f"{ff}.{name}.weight" for name in ("act.wi_0", "act.wi_1", "wo", "layer_norm")}
            expected.add(f"{self_attention}.layer_norm.weight")
            if stack == "decoder":
                expected |= {f"{block}.cross_attention_layer.cross_attention.{name}" for name in attention}
                expected.add(f"{block}.cross_attention_layer.layer_norm.weight")
        table = "self_attention_layer.self_attention.pe_encoding.relative_attention_bias.weight"
        expected.add(f"{stack}.block.0.{table}")
    assert names == expected


def test_families_cover_every_kind_of_feed_forward():
    kinds = {fields["feed_forward_proj"] for _, _, fields, _ in FAMILIES.values()}
    assert kinds == {"relu", "gelu", "gated-gelu", "gated-silu"}
    assert isinstance(build_pair("t5")[1].encoder.block[0].ff_layer.act.wi, nn.Linear)


def test_fp16_rows_without_keys_give_no_nan_on_eager():
    """Scores of -200 and a mask of fp16's lowest number add up beyond its range."""
    query, key, value = (torch.full((1, 1, 2, 4), x, dtype=torch.float16, requires_grad=True) for x in (10, -5, 1))
    bias = torch.zeros(1, 1, 2, 2, dtype=torch.float16)
    bias[:, :, 1] = torch.finfo(torch.float16).min
    output, _ = eager_attention(query, key, value, bias, 1.0, 0.0)
    gradients = torch.autograd.grad(output[:, :, :1].sum(), (query, key, value))
    assert all(gradient.isfinite().all() for gradient in gradients)
