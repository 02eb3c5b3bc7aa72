"""Streamed corpora: every window once, exact resume, any number of workers and processes."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from denoising import restore
from torch.utils.data import DataLoader

from fat5.data import CorpusOptions, DataError, DataOptions, MixtureOptions, StageOptions, open_mixture
from fat5.data.batches import build_batch
from fat5.data.schedule import Budget
from fat5.data.stream import StreamBatches

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture
def sources(tmp_path, prose):
    """The prose as a text file, a jsonl file and a folder for `datasets`."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in prose[:60]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in prose[60:]))
    (tmp_path / "named").mkdir()
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "named" / "train.jsonl")
    return tmp_path


def corpora(sources, kind):
    if kind == "files":
        return (CorpusOptions((str(sources / "a.jsonl"),), format="jsonl", streaming=True),)
    if kind == "dataset":
        pytest.importorskip("datasets")
        return (CorpusOptions(dataset=str(sources / "named"), streaming=True),)
    return tuple(
        CorpusOptions((str(sources / f"{name}.jsonl"),), format="jsonl", streaming=True, weight=weight)
        for name, weight in (("a", 3.0), ("b", 1.0))
    )


def stream(sources, tokenizer, kind="files", form="segments", stages=()):
    options = DataOptions(train=corpora(sources, kind), stages=stages)
    mixture = open_mixture(options, MixtureOptions(), tokenizer, None)
    rows = 4 if form == "stream" else 1
    budget = Budget(4 // rows, 128 * rows, 96 * rows, form != "none", 200)
    return StreamBatches(options.train, options.weights(), tokenizer, mixture, budget, form, 90, 0)


def same(a, b):
    return a.keys() == b.keys() and all(torch.as_tensor(a[k]).equal(torch.as_tensor(b[k])) for k in a if k != "state")


@pytest.mark.parametrize("kind", ["files", "dataset"])
def test_each_pass_restores_every_window_once(sources, tokenizer, prose, kind):
    expected = Counter()
    for document in prose[:60]:
        ids = tokenizer(document, add_special_tokens=False)["input_ids"]
        expected.update(tuple(ids[at : at + 90]) for at in range(0, len(ids), 90))
    found: list[tuple[int, ...]] = []
    data = stream(sources, tokenizer, kind, "none")
    mixture, total = data.mixture, expected.total()
    for gathered, _ in data.gathered():
        batch = build_batch(mixture, data.budget, "none", gathered)
        for row in range(len(batch["denoiser"])):
            inputs = batch["input_ids"][row][batch["attention_mask"][row].bool()].numpy()
            labels = batch["labels"][row][batch["labels"][row] != -100].numpy()
            mode = mixture.denoisers[batch["denoiser"][row]].mode
            found.append(tuple(restore(inputs, labels, mixture.ids, mode)))
        if len(found) >= 2 * total:
            break
    first, second = found[:total], found[total : 2 * total]
    assert Counter(first) == Counter(second) == expected
    assert first != second


@pytest.mark.parametrize("kind", ["files", "dataset", "mixed"])
@pytest.mark.parametrize("form", ["segments", "stream"])
def test_a_stream_resumes_exactly_with_other_workers(sources, tokenizer, kind, form):
    expected = [batch for _, batch in zip(range(60), stream(sources, tokenizer, kind, form), strict=False)]
    assert expected[-1]["state"]["block"] > 0
    for stopped, workers in ((0, 0), (7, 3), (30, 1), (41, 2)):
        data = stream(sources, tokenizer, kind, form)
        data.load_state(json.loads(json.dumps(expected[stopped]["state"])))
        loader = iter(DataLoader(data, batch_size=None, num_workers=workers))
        for number in range(stopped + 1, min(stopped + 12, 60)):
            batch = next(loader)
            assert same(batch, expected[number])
            assert batch["state"] == expected[number]["state"]


def test_processes_share_a_stream_without_loss_or_repetition(sources, tokenizer):
    expected = [batch for _, batch in zip(range(24), stream(sources, tokenizer), strict=False)]
    state = None
    number = 0
    for processes in (3, 2):  # the number of processes changes on the way
        runs = []
        for process in range(processes):
            data = stream(sources, tokenizer)
            data.process, data.processes = process, processes
            if state is not None:
                data.load_state(state)
            runs.append(iter(data))
        for _ in range(12 // processes):
            for run in runs:
                batch = next(run)
                assert same(batch, expected[number])
                number += 1
        state = batch["state"]


def test_weights_and_stages_of_streams_go_by_tokens(sources, tokenizer):
    data = stream(sources, tokenizer, "mixed", stages=(StageOptions(100, (0.0, 1.0)),))
    share = np.zeros(2)
    late = set()
    for number, (gathered, _) in enumerate(data.gathered(), start=1):
        if number == 160:
            break
        which = gathered.index >> 40
        if number <= 80:
            share += np.bincount(which, gathered.plan.lengths, minlength=2)
        if number > 150:
            late |= set(which.tolist())
    assert share[1] / share.sum() == pytest.approx(0.25, abs=0.02)
    assert late == {1}


def test_streams_without_text_or_weights_are_refused(tmp_path, sources, tokenizer):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    options = DataOptions(train=(CorpusOptions((str(tmp_path / "empty.jsonl"),), format="jsonl", streaming=True),))
    mixture = open_mixture(options, MixtureOptions(), tokenizer, None)
    budget = Budget(1, 128, 96, True, 10)
    data = StreamBatches(options.train, options.weights(), tokenizer, mixture, budget, "segments", 90, 0)
    with pytest.raises(DataError, match="holds no text"):
        next(iter(data))
    two = corpora(sources, "files") * 2
    with pytest.raises(ValueError, match="several streamed corpora need weights"):
        StreamBatches(two, [(0, None)], tokenizer, mixture, budget, "segments", 90, 0)
