"""Pipelines of transformers on a repository with its tokenizer: what each gives is what its model computes.

Which there are differs among releases; those that are gone are skipped.
"""

import pytest
import torch
from toy_repo import FIELDS, write_tokenizer
from transformers import AutoModelForTextEncoding, pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from fat5.model import (
    FlashT5Config,
    FlashT5ForConditionalGeneration,
    FlashT5ForQuestionAnswering,
    FlashT5ForSequenceClassification,
    FlashT5ForTokenClassification,
)

TEXTS = ["a fine film", "which dull music a film"]


def build(task, folder, cls, model=None, **fields):
    """A pipeline from a saved repository, the model that was saved, and the tokenizer."""
    if task not in PIPELINE_REGISTRY.get_supported_tasks():
        pytest.skip(f"this release of transformers has no {task} pipeline")
    saved = cls(FlashT5Config(**FIELDS, **fields)).eval()
    saved.save_pretrained(folder)
    tokenizer = write_tokenizer(folder)
    loaded = None if model is None else model.from_pretrained(folder, trust_remote_code=True)
    return pipeline(task, model=loaded or str(folder), tokenizer=tokenizer, trust_remote_code=True), saved, tokenizer


@torch.no_grad()
@pytest.mark.parametrize("reads_decoder", [False, True])
def test_text_classification(reads_decoder, tmp_path):
    names = {0: "bad", 1: "good", 2: "unclear"}
    pipe, model, tokenizer = build(
        "text-classification",
        tmp_path,
        FlashT5ForSequenceClassification,
        id2label=names,
        label2id={name: i for i, name in names.items()},
        head_reads_decoder=reads_decoder,
    )
    for text, given in zip(TEXTS, pipe(TEXTS, top_k=None, batch_size=2), strict=True):
        probabilities = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
        assert {x["label"]: x["score"] for x in given} == {
            names[i]: pytest.approx(p.item(), rel=1e-5) for i, p in enumerate(probabilities)
        }


@torch.no_grad()
def test_zero_shot_classification(tmp_path):
    pipe, model, tokenizer = build(
        "zero-shot-classification",
        tmp_path,
        FlashT5ForSequenceClassification,
        id2label={0: "contradiction", 1: "entailment"},
        label2id={"contradiction": 0, "entailment": 1},
    )
    given = pipe(TEXTS[0], candidate_labels=["film", "music"], hypothesis_template="a {}")
    entailed = [
        model(**tokenizer(TEXTS[0], f"a {name}", return_tensors="pt")).logits[0, 1] for name in ("film", "music")
    ]
    expected = dict(zip(("film", "music"), torch.stack(entailed).softmax(-1).tolist(), strict=True))
    assert dict(zip(given["labels"], given["scores"], strict=True)) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_token_classification(tmp_path):
    pipe, model, tokenizer = build("token-classification", tmp_path, FlashT5ForTokenClassification, num_labels=3)
    for text, given in zip(TEXTS, pipe(TEXTS, ignore_labels=[]), strict=True):
        best = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1).max(-1)
        assert [x["word"] for x in given] == text.split()
        assert [x["entity"] for x in given] == [f"LABEL_{i}" for i in best.indices[:-1].tolist()]
        assert [float(x["score"]) for x in given] == pytest.approx(best.values[:-1].tolist(), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("reads_decoder", [False, True])
def test_question_answering(reads_decoder, tmp_path):
    pipe, model, tokenizer = build(
        "question-answering", tmp_path, FlashT5ForQuestionAnswering, head_reads_decoder=reads_decoder
    )
    given = pipe(question="which film", context=TEXTS[0], max_answer_len=1, top_k=3)
    encoded = tokenizer("which film", TEXTS[0], return_tensors="pt")
    output = model(**encoded)
    probability = output.start_logits[0].softmax(-1) * output.end_logits[0].softmax(-1)
    in_context = torch.tensor([i == 1 for i in encoded.sequence_ids(0)])
    assert len(given) == 3
    best = max(TEXTS[0].split(), key=lambda word: probability[in_context][TEXTS[0].split().index(word)])
    assert max(given, key=lambda answer: answer["score"])["answer"] == best


@torch.no_grad()
def test_feature_extraction_from_the_encoder(tmp_path):
    pipe, model, tokenizer = build(
        "feature-extraction", tmp_path, FlashT5ForConditionalGeneration, AutoModelForTextEncoding
    )
    for text, states in zip(TEXTS, pipe(TEXTS), strict=True):
        encoded = tokenizer(text, return_tensors="pt")
        expected = model.encoder(encoded["input_ids"], encoded["attention_mask"]).last_hidden_state
        torch.testing.assert_close(torch.tensor(states), expected)


@torch.no_grad()
def test_feature_extraction_where_only_an_encoder_is_saved(tmp_path):
    FlashT5ForConditionalGeneration(FlashT5Config(**FIELDS)).save_pretrained(tmp_path)
    encoder = AutoModelForTextEncoding.from_pretrained(tmp_path, trust_remote_code=True).eval()
    encoder.save_pretrained(tmp_path / "encoder")
    tokenizer = write_tokenizer(tmp_path / "encoder")
    pipe = pipeline("feature-extraction", model=str(tmp_path / "encoder"), tokenizer=tokenizer, trust_remote_code=True)
    expected = encoder(**tokenizer(TEXTS[0], return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(torch.tensor(pipe(TEXTS[0])), expected)


def test_feature_extraction_from_both_stacks_says_what_loads_the_encoder(tmp_path):
    pipe, _, _ = build("feature-extraction", tmp_path, FlashT5ForConditionalGeneration)
    with pytest.raises(ValueError, match="AutoModelForTextEncoding loads from the same repo"):
        pipe(TEXTS)


@torch.no_grad()
def test_text2text_generation(tmp_path):
    pipe, model, tokenizer = build("text2text-generation", tmp_path, FlashT5ForConditionalGeneration)
    expected = model.generate(**tokenizer(TEXTS[0], return_tensors="pt"), max_new_tokens=5, num_beams=1)
    given = pipe(TEXTS[0], max_new_tokens=5, num_beams=1)[0]["generated_text"]
    assert given == tokenizer.decode(expected[0], skip_special_tokens=True)
