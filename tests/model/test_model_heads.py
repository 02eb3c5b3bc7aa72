"""Heads: stock T5's results with stock T5's weights, and the tasks that they are there for, learned."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_parity import SHAPE, flash_name, relative_error
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    T5Config,
    T5ForQuestionAnswering,
    T5ForSequenceClassification,
    T5ForTokenClassification,
    Trainer,
    TrainingArguments,
)

from fat5.model import (
    FlashT5Config,
    FlashT5EncoderModel,
    FlashT5ForConditionalGeneration,
    FlashT5ForQuestionAnswering,
    FlashT5ForSequenceClassification,
    FlashT5ForTokenClassification,
)

HEADS = {
    "sequence": (T5ForSequenceClassification, FlashT5ForSequenceClassification, AutoModelForSequenceClassification),
    "tokens": (T5ForTokenClassification, FlashT5ForTokenClassification, AutoModelForTokenClassification),
    "answer": (T5ForQuestionAnswering, FlashT5ForQuestionAnswering, AutoModelForQuestionAnswering),
}
heads = pytest.mark.parametrize("head", HEADS)
FIELDS = {**SHAPE, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": True, "eos_token_id": 1}


def new_model(head, **fields):
    fields = {**FIELDS, "num_labels": 2 if head == "answer" else 5, **fields}
    model = HEADS[head][1](FlashT5Config(**fields)).eval()
    randomise_all(model)
    return model


def randomise_all(model):
    """As `randomise`, with the biases that heads have."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.normal_(1.0 if "layer_norm" in name else 0.0, 0.2)
            else:
                spread = 1.0 if "relative_attention_bias" in name or "shared" in name else 1.2 * weight.shape[1] ** -0.5
                weight.normal_(0.0, spread)


def pair(head, implementation="eager", **fields):
    """Stock and FlashT5 with the same weights; the decoder takes part as in stock."""
    stock_cls, cls, _ = HEADS[head]
    fields = {**FIELDS, "num_labels": 2 if head == "answer" else 5, **fields}
    stock = stock_cls(T5Config(**fields, attn_implementation="eager")).eval()
    randomise_all(stock)
    model = cls(FlashT5Config(**fields, head_reads_decoder=True, attn_implementation=implementation)).eval()
    weights = {name: weight for name, weight in stock.state_dict().items() if "embed_tokens" not in name}
    model.load_state_dict({head_name(name): weight for name, weight in weights.items()}, strict=True)
    return stock, model


def head_name(name):
    """FlashT5's name of a parameter of a stock model with a head: the same without a prefix."""
    return flash_name(name.removeprefix("transformer."))


def head_batch(head, padding="right", labels=5):
    """Ids that end with the end-of-sequence token, padded, and what is to be predicted."""
    ids = torch.randint(2, 99, (3, 17))
    ids[:, -1] = 1
    mask = torch.ones_like(ids)
    for row in range(3 if padding != "none" else 0):
        pad = 4 * row
        rolled = ids[row, pad:]
        rest = torch.zeros(pad, dtype=torch.long)
        ids[row] = torch.cat([rolled, rest] if padding == "right" else [rest, rolled])
        mask[row] = (ids[row] != 0).long()
    inputs = {"input_ids": ids, "attention_mask": mask}
    if head == "sequence":
        inputs["labels"] = torch.randint(labels, (3,))
    elif head == "tokens":
        inputs["labels"] = torch.where(mask.bool(), torch.randint(labels, ids.shape), -100)
    else:
        inputs["start_positions"] = torch.tensor([2, 9, 40])  # the last is not in the sequence
        inputs["end_positions"] = torch.tensor([5, 11, 41])
    return inputs


def logits_of(output):
    return output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits], -1)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@heads
def test_logits_loss_and_every_gradient_are_those_of_stock(head, padding, implementation):
    stock, model = pair(head, implementation)
    inputs = head_batch(head, padding)
    expected, output = stock(**inputs), model(**inputs)
    real = slice(None) if head == "sequence" else inputs["attention_mask"].bool()
    assert relative_error(logits_of(output)[real], logits_of(expected)[real]) < 1e-4
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-4)
    expected.loss.backward()
    output.loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    for name, weight in stock.named_parameters():
        gradient = gradients.pop(head_name(name))
        if name == "qa_outputs.bias":  # a softmax over places does not change when all of them rise
            assert max(gradient.abs().max(), weight.grad.abs().max()) < 1e-6
            continue
        assert relative_error(gradient, weight.grad) < 1e-4, name
    assert not gradients


@heads
def test_output_has_the_parts_of_stock(head):
    stock, model = pair(head)
    inputs = {**head_batch(head), "output_hidden_states": True, "output_attentions": True}
    cached = {} if head == "tokens" else {"use_cache": False}
    expected, output = stock(**inputs, **cached), model(**inputs, **cached)
    assert type(output) is type(expected)
    assert list(output) == list(expected)
    assert len(model(**inputs, return_dict=False)) == len(output)
    for name in output:
        if isinstance(output[name], tuple):
            assert [x.shape for x in output[name]] == [x.shape for x in expected[name]]


LABELS = {
    "regression": ({"num_labels": 1}, torch.tensor([0.5, -1.0, 2.0])),
    "several numbers": ({"num_labels": 3, "problem_type": "regression"}, torch.randn(3, 3)),
    "several labels": ({"num_labels": 3}, torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 1]])),
    "one label": ({"num_labels": 3, "problem_type": "single_label_classification"}, torch.tensor([2, 0, 1])),
}


@pytest.mark.parametrize("kind", LABELS)
def test_loss_of_each_kind_of_label(kind):
    fields, labels = LABELS[kind]
    stock, model = pair("sequence", **fields)
    inputs = {**head_batch("sequence"), "labels": labels}
    assert model(**inputs).loss.item() == pytest.approx(stock(**inputs).loss.item(), rel=1e-5)
    assert model.config.problem_type == fields.get("problem_type")  # stock T5 writes there what it has guessed


@pytest.mark.parametrize("head", ["sequence", "answer"])
def test_without_a_decoder_the_head_reads_the_encoder(head):
    model = new_model(head)
    assert not hasattr(model, "decoder")
    inputs = head_batch(head, "right")
    states = model.encoder(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    if head == "sequence":
        last = inputs["attention_mask"].sum(1) - 1
        states = torch.stack([row[i] for row, i in zip(states, last, strict=True)])
        dense, out = model.classification_head.dense, model.classification_head.out_proj
        expected = F.linear(torch.tanh(F.linear(states, dense.weight, dense.bias)), out.weight, out.bias)
    else:
        expected = F.linear(states, model.qa_outputs.weight, model.qa_outputs.bias)
    assert torch.equal(logits_of(model(**inputs)), expected)
    with pytest.raises(ValueError, match=r"no decoder .*decoder_input_ids"):
        model(**inputs, decoder_input_ids=inputs["input_ids"])


def test_the_last_end_of_sequence_counts_and_each_row_may_have_its_own_number_of_them():
    model = new_model("sequence")
    inputs = head_batch("sequence", "right")
    expected = model(**inputs).logits
    alone = [model(input_ids=inputs["input_ids"][row : row + 1, : 17 - 4 * row]).logits for row in range(3)]
    torch.testing.assert_close(torch.cat(alone), expected)
    inputs["input_ids"][0, 3] = 1
    changed = model(**inputs).logits
    torch.testing.assert_close(changed[1:], expected[1:])
    states = model.encoder(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    torch.testing.assert_close(changed[:1], model.classification_head(states[:1, 16]))
    inputs["input_ids"][1] = 7
    with pytest.raises(ValueError, match="must hold an end-of-sequence token"):
        model(**inputs)


@heads
def test_padding_does_not_matter(head):
    model = new_model(head)
    inputs = head_batch(head, "right")
    changed = {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 1)}
    real = slice(None) if head == "sequence" else inputs["attention_mask"].bool()
    torch.testing.assert_close(logits_of(model(**changed))[real], logits_of(model(**inputs))[real])


@pytest.mark.parametrize("has_decoder", [False, True])
@heads
def test_embeddings_in_place_of_ids(head, has_decoder):
    model = new_model(head, head_reads_decoder=has_decoder)
    inputs = head_batch(head)
    embedded = {**inputs, "inputs_embeds": model.shared(inputs["input_ids"])}
    if head == "tokens" or (head == "answer" and not has_decoder):
        del embedded["input_ids"]
    assert torch.equal(logits_of(model(**embedded)), logits_of(model(**inputs)))


@pytest.mark.parametrize("has_decoder", [False, True])
@heads
def test_saved_and_loaded(head, has_decoder, tmp_path):
    model = new_model(head, head_reads_decoder=has_decoder)
    model.save_pretrained(tmp_path)
    loaded, report = HEADS[head][1].from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    inputs = head_batch(head)
    assert torch.equal(logits_of(loaded(**inputs)), logits_of(model(**inputs)))


def test_loads_by_the_auto_classes_in_a_process_without_fat5(tmp_path):
    files = []
    for head, (_, _, auto) in HEADS.items():
        model = new_model(head, head_reads_decoder=head == "answer")
        model.save_pretrained(tmp_path / head)
        inputs, output = head_batch(head), "start_logits" if head == "answer" else "logits"
        case = {"auto_class": auto.__name__, "folder": str(tmp_path / head), "inputs": inputs, "output": output}
        files.append(tmp_path / f"{head}.pt")
        torch.save({**case, "expected": model(**inputs)[output].detach()}, files[-1])
    script = Path(__file__).with_name("fresh_heads.py")
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    command = [sys.executable, "-I", script, *files]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.strip().endswith("same logits")


@heads
def test_loads_from_a_model_that_generates(head, tmp_path):
    base = FlashT5ForConditionalGeneration(FlashT5Config(**{**FIELDS, "tie_word_embeddings": False})).eval()
    base.save_pretrained(tmp_path)
    labels = {} if head == "answer" else {"num_labels": 7}
    loaded, report = HEADS[head][1].from_pretrained(tmp_path, **labels, output_loading_info=True)
    assert all(
        name.split(".")[0] in ("classification_head", "classifier", "qa_outputs") for name in report["missing_keys"]
    )
    assert not report["unexpected_keys"]
    assert torch.equal(loaded.encoder.block[1].ff_layer.wo.weight, base.encoder.block[1].ff_layer.wo.weight)
    head_weights = [weight for name, weight in loaded.named_parameters() if name in report["missing_keys"]]
    assert all(weight.isfinite().all() for weight in head_weights)
    assert all((weight == 0).all() for weight in head_weights if weight.ndim == 1)
    assert all(0.05 < weight.std() < 2 for weight in head_weights if weight.ndim == 2)
    loaded.save_pretrained(tmp_path / "head")
    _, report = FlashT5EncoderModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not report["missing_keys"]


def test_question_answering_has_two_outputs():
    with pytest.raises(ValueError, match="`num_labels` is 3"):
        FlashT5ForQuestionAnswering(FlashT5Config(**FIELDS, num_labels=3))


def test_all_labels_ignored_give_no_nan():
    inputs = head_batch("tokens")
    inputs["labels"][:] = -100
    assert new_model("tokens")(**inputs).loss == 0


def learnable(head, rows=256):
    """Sequences of which a token near the start decides the label, the tokens' own kind, or a marked answer."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(10, 90, (rows, 9), generator=generator)
    ids[:, -1] = 1
    rows_of = torch.arange(rows)
    if head == "sequence":
        label = torch.randint(3, (rows,), generator=generator)
        ids[rows_of, torch.randint(0, 8, (rows,), generator=generator)] = 91 + label
        return [{"input_ids": i, "labels": x} for i, x in zip(ids, label, strict=True)]
    if head == "tokens":
        return [{"input_ids": i, "labels": i % 3} for i in ids]
    start = torch.randint(0, 6, (rows,), generator=generator)
    ids[rows_of, start], ids[rows_of, start + 2] = 91, 92
    return [{"input_ids": i, "start_positions": s, "end_positions": s + 2} for i, s in zip(ids, start, strict=True)]


def fine_tune(model, data, folder, steps=50, learning_rate=1e-2):
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        seed=1,
    )
    Trainer(model=model, args=arguments, train_dataset=data).train()
    return model.eval()


def accuracy(model, data):
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    with torch.no_grad():
        output = model(**batch)
    if "labels" in batch:
        return (output.logits.argmax(-1) == batch["labels"]).float().mean().item()
    right = (output.start_logits.argmax(-1) == batch["start_positions"]) & (
        output.end_logits.argmax(-1) == batch["end_positions"]
    )
    return right.float().mean().item()


@pytest.mark.parametrize(
    ("head", "has_decoder"),
    [("sequence", False), ("sequence", True), ("tokens", False), ("answer", False), ("answer", True)],
)
def test_trainer_fine_tunes_the_head_to_near_perfection(head, has_decoder, tmp_path):
    labels = {} if head == "answer" else {"num_labels": 3}
    torch.manual_seed(2)
    model = HEADS[head][1](FlashT5Config(**{**FIELDS, **labels, "head_reads_decoder": has_decoder}))
    data = learnable(head)
    before = accuracy(model.eval(), data)
    fine_tune(model.train(), data, tmp_path)
    assert before < 0.6
    assert accuracy(model, data) > 0.98


NEW_PARTS = {"sequence": "classification_head", "tokens": "classifier", "answer": "qa_outputs"}


@pytest.mark.parametrize(
    "head", ["sequence", pytest.param("tokens", marks=pytest.mark.slow), pytest.param("answer", marks=pytest.mark.slow)]
)
def test_lora_fine_tunes_too(head, tmp_path):
    labels = {} if head == "answer" else {"num_labels": 3}
    torch.manual_seed(2)
    model = HEADS[head][1](FlashT5Config(**{**FIELDS, **labels}))
    frozen = model.encoder.block[0].self_attention_layer.self_attention.Wq.weight.clone()
    targets = ["Wq", "Wk", "Wv", "o", "wi_0", "wi_1", "wo"]
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, r=8, modules_to_save=[NEW_PARTS[head]]))
    data = learnable(head)
    fine_tune(adapted, data, tmp_path, steps=80, learning_rate=2e-2)
    reached = accuracy(adapted, data)
    assert reached > 0.95
    merged = adapted.merge_and_unload()
    assert accuracy(merged, data) == pytest.approx(reached, abs=0.01)
    assert not torch.equal(merged.encoder.block[0].self_attention_layer.self_attention.Wq.weight, frozen)
    merged.save_pretrained(tmp_path / "merged")
    again = HEADS[head][1].from_pretrained(tmp_path / "merged").eval()
    assert accuracy(again, data) == accuracy(merged, data)
