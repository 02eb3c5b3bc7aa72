"""Input that breaks other collators: handled, or refused by name, never silently wrong."""

import json

import numpy as np
import pytest
from corpora import make_store, t5_ids
from denoising import T5_IDS, corrupt, prefixes, restore, spans, special_ids, split
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from fat5.data import (
    CorpusOptions,
    DataError,
    DataOptions,
    Denoiser,
    DenoisingCollator,
    Mixture,
    MixtureOptions,
    WindowDataset,
    open_mixture,
    open_windows,
    training_batches,
)
from fat5.data.batches import Gathered, build_batch
from fat5.data.random_streams import example_keys
from fat5.data.schedule import Budget, pack_block
from fat5.data.special_ids import special_ids as ids_of
from fat5.data.window_length import longest_window


@settings(max_examples=100, deadline=None)
@given(
    ids=special_ids(),
    denoisers=st.lists(spans | prefixes, min_size=1, max_size=4),
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=20),
    limits=st.tuples(st.integers(24, 128), st.integers(24, 128)),
    form=st.sampled_from(["none", "segments", "stream"]),
    roll=st.booleans(),
    seed=st.integers(0, 2**60),
)
def test_every_document_comes_back_packed_or_not(ids, denoisers, lengths, limits, form, roll, seed):
    mixture = Mixture(denoisers, ids, roll)
    rng = np.random.default_rng(seed)
    documents = [rng.integers(2, 200, n) for n in lengths]
    window = longest_window(mixture, *limits)
    windows = [d[at : at + window] for d in documents for at in range(0, max(len(d), 1), window)]
    count = len(windows)
    rows = 3 if form == "stream" else 1
    budget = Budget(1, rows * limits[0], rows * limits[1], form != "none", count)
    index, epoch = np.arange(count), np.full(count, 2)
    order, plan, ends = pack_block(mixture, budget, seed, 5, index, epoch, np.array([len(w) for w in windows]))
    gathered = Gathered([windows[i] for i in order], order, plan, np.diff(ends, prepend=0))
    batch = build_batch(mixture, budget, form, gathered)
    inputs, labels = batch["input_ids"].numpy(), batch["labels"].numpy()
    if form == "stream":
        flat = inputs[0], labels[0]
    elif form == "segments":
        flat = inputs[batch["encoder_segment_ids"].numpy() > 0], labels[batch["decoder_segment_ids"].numpy() > 0]
    else:
        flat = inputs[batch["attention_mask"].numpy() > 0], labels[labels != -100]
    examples = zip(split(flat[0], plan.input_lengths), split(flat[1], plan.label_lengths), strict=True)
    restored = [[]] * count
    for place, (its_input, its_label), d in zip(order.tolist(), examples, plan.denoiser, strict=True):
        restored[place] = restore(its_input, its_label, ids, denoisers[d].mode)
    assert restored == [w.tolist() for w in windows]


@pytest.mark.parametrize("length", [0, 1, 2])
@pytest.mark.parametrize("denoiser", [*MixtureOptions().resolved(), Denoiser("prefix", sentinel=False)])
def test_windows_of_no_one_and_two_tokens(length, denoiser):
    mixture = Mixture([denoiser], T5_IDS)
    windows = [np.arange(7, 7 + length)] * 50
    _, examples = corrupt(mixture, example_keys(0, 0, np.arange(50)), windows)
    for inputs, labels in examples:
        assert restore(inputs, labels, T5_IDS, denoiser.mode) == windows[0].tolist()
    batch = DenoisingCollator(mixture)([{"input_ids": w, "index": i, "epoch": 0} for i, w in enumerate(windows)])
    assert batch["labels"].shape[1] >= 1


@pytest.mark.parametrize("bad", [-1, 32100, 65535])
def test_ids_outside_the_vocabulary_are_refused(bad):
    collator = DenoisingCollator(Mixture(MixtureOptions().resolved(), T5_IDS))
    examples = [{"input_ids": np.array([5, 6, 7]), "index": 40, "epoch": 0}]
    collator(examples)
    examples.append({"input_ids": np.array([5, bad, 7]), "index": 41, "epoch": 0})
    with pytest.raises(DataError, match=f"example 41 holds id {bad}, outside the tokenizer's 32100 ids"):
        collator(examples)


@pytest.mark.parametrize("bad", [0, 1, 32000, 32099])
def test_special_ids_in_the_text_are_refused(bad):
    collator = DenoisingCollator(Mixture(MixtureOptions().resolved(), T5_IDS))
    with pytest.raises(DataError, match=f"example 9 holds the special id {bad} in its text.*fat5 tokenize"):
        collator([{"input_ids": np.array([5, bad, 7]), "index": 9, "epoch": 0}])


def test_packed_batches_refuse_ids_that_are_no_text(tmp_path):
    documents = [np.array([5, 6, 7]), np.array([5, 32050, 7])]
    store = make_store(tmp_path / "store", documents)
    options = DataOptions(train=(CorpusOptions(("unused",)),), packing="segments", window=8)
    mixture = Mixture(MixtureOptions().resolved(), T5_IDS)
    windows = WindowDataset([store], 8)
    data = training_batches(options, windows, mixture, batch_size=4, batches_per_step=1, steps=1, seed=0)
    with pytest.raises(DataError, match="example 1 holds the special id 32050"):
        data[0]


def test_pad_may_be_eos():
    mixture = Mixture(MixtureOptions().resolved(), t5_ids(pad=1))
    windows = [{"input_ids": np.arange(3, 3 + n), "index": n, "epoch": 0} for n in (4, 60)]
    batch = DenoisingCollator(mixture)(windows)
    short, long = batch["attention_mask"].sum(1).tolist()
    assert short < long
    # The mask says what is padding, not the id; and every target keeps its own EOS.
    assert batch["input_ids"][0, short - 1] == 1
    assert (batch["input_ids"][0, short:] == 1).all()
    assert ((batch["labels"] == 1).sum(1) == 1).all()


def test_a_tokenizer_without_a_pad_token_pads_with_eos(tokenizer):
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", unk_token="<unk>")
    assert tokenizer.pad_token_id is None
    assert ids_of(tokenizer, ()).pad == tokenizer.eos_token_id


def test_byt5_keeps_bytes_that_are_also_sentinels(tmp_path):
    # é is 0xc3 0xa9, ids 198 and 172: both are sentinels of ByT5 as well.
    tokenizer = ByT5Tokenizer()
    (tmp_path / "c.txt").write_text("é" * 500)
    options = DataOptions(train=(CorpusOptions((str(tmp_path / "c.txt"),)),), cache=str(tmp_path / "cache"))
    mixture = open_mixture(options, MixtureOptions("t5_span_corruption"), tokenizer, 384)
    windows = open_windows(options.train, options, mixture, tokenizer)
    batch = DenoisingCollator(mixture)([windows[0]])
    raw = windows[0]["input_ids"].tolist()
    assert set(raw) == {198, 172}
    plan = mixture.plan(example_keys(0, 0, [0]), np.array([len(raw)]))
    # Text and sentinels cannot be told apart by id, so count: nothing is lost, and the sentinels are in order.
    found = batch["input_ids"][0].tolist()[:-1] + batch["labels"][0].tolist()[:-1]
    marks = len(found) - len(raw)
    assert marks == int(plan.input_lengths[0] + plan.label_lengths[0]) - 2 - len(raw)
    assert sum(t not in (198, 172) for t in found) + 2 >= marks - 4
    assert 258 in batch["input_ids"][0].tolist()


def test_text_that_spells_special_tokens_survives_the_whole_way(tmp_path, tokenizer):
    text = "A line with <extra_id_0> and [S] and </s> in it, " * 30
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": text}) + "\n")
    options = DataOptions(
        train=(CorpusOptions((str(tmp_path / "c.jsonl"),), format="jsonl"),),
        cache=str(tmp_path / "cache"),
        packing="segments",
        max_input_length=128,
        max_target_length=128,
    )
    mixture = open_mixture(options, MixtureOptions(), tokenizer, None)
    windows = open_windows(options.train, options, mixture, tokenizer)
    ids = [i for n in range(len(windows)) for i in windows[n]["input_ids"].tolist()]
    assert not mixture.ids.reserved & set(ids)
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")
    data = training_batches(options, windows, mixture, batch_size=2, batches_per_step=1, steps=5, seed=0)
    assert all((data[n]["input_ids"] >= 0).all() for n in range(5))


def test_a_document_of_ten_million_tokens(tmp_path):
    rng = np.random.default_rng(0)
    document = rng.integers(3, 32000, 10_000_000).astype(np.uint16)
    store = make_store(tmp_path / "store", [document, document[:3]])
    options = DataOptions(train=(CorpusOptions(("unused",)),), packing="stream")
    mixture = Mixture(MixtureOptions().resolved(), T5_IDS)
    windows = WindowDataset([store], 566)
    assert len(windows) == -(-10_000_000 // 566) + 1
    last = windows[len(windows) - 2]["input_ids"]
    assert len(last) == 10_000_000 % 566
    assert np.array_equal(last, document[-len(last) :])
    data = training_batches(options, windows, mixture, batch_size=8, batches_per_step=1, steps=3, seed=0)
    for n in range(3):
        (block, part), *_ = data.schedule.batch(n)
        plan = block.plan.take(np.arange(part.start, part.stop))
        sides = data[n]["input_ids"][0].numpy(), data[n]["labels"][0].numpy()
        examples = zip(split(sides[0], plan.input_lengths), split(sides[1], plan.label_lengths), strict=True)
        for i, d, (inputs, labels) in zip(block.index[part].tolist(), plan.denoiser, examples, strict=True):
            assert restore(inputs, labels, T5_IDS, mixture.denoisers[d].mode) == windows[i]["input_ids"].tolist()


def test_options_that_contradict_each_other_are_refused():
    one = CorpusOptions(("a.txt",))
    weighted = CorpusOptions(("b.txt",), weight=1.0)
    with pytest.raises(ValueError, match="all training corpora a weight, or none"):
        DataOptions(train=(one, weighted))
    with pytest.raises(ValueError, match="either all training corpora are streaming, or none"):
        DataOptions(train=(one, CorpusOptions(("b.txt",), streaming=True)))
    with pytest.raises(ValueError, match="above 0"):
        DataOptions(train=(CorpusOptions(("b.txt",), weight=0.0),))
    with pytest.raises(ValueError, match="train is empty"):
        DataOptions(train=())
    for bad in ({"r": 0.0}, {"r": 1.0}, {"mu": 0.5}, {"proportion": 0.0}, {"kind": "prefix", "prefix": 1.0}):
        with pytest.raises(ValueError, match="must be"):
            Denoiser(**bad)
