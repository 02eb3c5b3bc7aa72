"""Packing: within budget, complete, nearly full, and the same whoever asks."""

import hashlib
import json
import time
from collections import Counter
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from corpora import make_store, random_documents
from denoising import T5_IDS, restore
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from fat5.data import Denoiser, Mixture, MixtureOptions, WindowDataset, longest_window
from fat5.data.batches import BatchDataset
from fat5.data.corpus_order import CorpusOrder
from fat5.data.packing import best_fit
from fat5.data.random_streams import example_keys
from fat5.data.schedule import Budget, Schedule
from fat5.data.window_length import checked_window, padding_share, stored_documents, window_that_packs, windows_of

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(1, 40)), max_size=60),
    st.integers(64, 200),
    st.integers(40, 100),
)
def test_bins_hold_everything_once_and_never_too_much(sizes, most_input, most_labels):
    inputs, labels = np.array(sizes, dtype=np.int64).reshape(-1, 2).T
    bins = best_fit(inputs, labels, most_input, most_labels)
    assert len(bins) == len(sizes)
    if sizes:
        assert set(bins.tolist()) == set(range(bins.max() + 1))
        assert np.bincount(bins, inputs).max() <= most_input
        assert np.bincount(bins, labels).max() <= most_labels


@pytest.mark.parametrize("seed", range(5))
def test_no_bin_is_empty_in_large_blocks(seed):
    # Bins of many examples take most of them in order, which leaves lengths without examples behind.
    rng = np.random.default_rng(seed)
    inputs, labels = rng.integers(1, 400, 4000), rng.integers(1, 200, 4000)
    for most in ((400, 200), (6400, 3200), (6400, 2000), (40_000, 3200)):
        bins = best_fit(inputs, labels, *most)
        assert np.bincount(bins).min() > 0
        assert np.bincount(bins, inputs).max() <= most[0]
        assert np.bincount(bins, labels).max() <= most[1]


def test_packing_is_near_what_is_possible():
    # Pieces of rows that were cut at random fit back into hardly more rows than there were.
    rng = np.random.default_rng(0)
    cuts = [np.diff([0, *sorted(rng.choice(np.arange(1, 512), 4, replace=False)), 512]) for _ in range(300)]
    pieces = rng.permutation(np.concatenate(cuts))
    assert best_fit(pieces, np.ones_like(pieces), 512, 512).max() + 1 <= 306


def test_an_example_larger_than_a_bin_is_refused():
    with pytest.raises(ValueError, match="does not fit a bin"):
        best_fit(np.array([5]), np.array([11]), 10, 10)


@pytest.fixture
def store(tmp_path):
    lengths = np.random.default_rng(0).integers(100, 2001, 900)
    return make_store(tmp_path / "store", random_documents(0, lengths), shards=3)


def schedule_of(store_or_stores, mixture, budget, *, window, seed=0, stages=((0, None),), batches_per_step=1):
    stores = store_or_stores if isinstance(store_or_stores, list) else [store_or_stores]
    windows = WindowDataset(stores, window)
    return Schedule(windows, CorpusOrder(windows, stages, seed), mixture, budget, seed, batches_per_step)


def small(store, form, **options):
    """Batches of 4 rows of 128 and 96, planned 300 examples at a time."""
    mixture = Mixture(MixtureOptions().resolved(), T5_IDS)
    rows = 4 if form == "stream" else 1
    budget = Budget(4 // rows, 128 * rows, 96 * rows, form != "none", 300)
    return BatchDataset(schedule_of(store, mixture, budget, window=90, **options), form, 10**6)


def examples_of(batch, form):
    """Take a batch apart: (input, target) of each example, in order."""
    if form == "stream":
        sides = [
            np.split(batch[name][0].numpy(), batch[f"{side}_cu_seqlens"].numpy()[1:-1])
            for name, side in (("input_ids", "encoder"), ("labels", "decoder"))
        ]
        return list(zip(*sides, strict=True))
    found = []
    for n in range(len(batch["input_ids"])):
        if form == "none":
            keep = batch["attention_mask"][n].bool()
            found.append((batch["input_ids"][n][keep].numpy(), batch["labels"][n][batch["labels"][n] != -100].numpy()))
            continue
        ids = batch["encoder_segment_ids"][n], batch["decoder_segment_ids"][n]
        assert (batch["labels"][n][ids[1] == 0] == -100).all()
        assert (batch["input_ids"][n][ids[0] == 0] == T5_IDS.pad).all()
        for segment in range(1, int(ids[0].max()) + 1):
            found.append(
                (batch["input_ids"][n][ids[0] == segment].numpy(), batch["labels"][n][ids[1] == segment].numpy())
            )
        assert ids[0].max() == ids[1].max()
    return found


@pytest.mark.parametrize("form", ["none", "segments", "stream"])
def test_one_epoch_restores_every_window_once(tmp_path, form):
    documents = random_documents(0, np.random.default_rng(0).integers(1, 1000, 150))
    data = small(make_store(tmp_path / "store", documents, shards=2), form)
    windows = data.schedule.windows
    denoisers = data.schedule.mixture.denoisers
    left = Counter(tuple(windows[i]["input_ids"].tolist()) for i in range(len(windows)))
    total = missing = left.total()
    number = 0
    while missing:
        batch = data[number]
        epochs = np.concatenate([block.epoch[part] for block, part in data.schedule.batch(number)]).tolist()
        examples = examples_of(batch, form)
        for (inputs, labels), d, epoch in zip(examples, batch["denoiser"].tolist(), epochs, strict=True):
            source = tuple(restore(inputs, labels, T5_IDS, denoisers[d].mode))
            if epoch == 0:
                assert left[source] > 0, "a window came twice, or is no window of the corpus"
                left[source] -= 1
                missing -= 1
        number += 1
    assert number < total


@pytest.mark.parametrize("form", ["segments", "stream"])
def test_packed_batches_stay_within_their_budget(store, form):
    data = small(store, form)
    for number in range(60):
        batch = data[number]
        if form == "segments":
            assert batch["input_ids"].shape == batch["encoder_segment_ids"].shape == (4, 128)
            assert batch["labels"].shape == batch["decoder_segment_ids"].shape == (4, 96)
        else:
            assert batch["input_ids"].shape[1] == batch["encoder_cu_seqlens"][-1] <= 512
            assert batch["labels"].shape[1] == batch["decoder_cu_seqlens"][-1] <= 384
            lengths = batch["encoder_cu_seqlens"].diff(), batch["decoder_cu_seqlens"].diff()
            assert batch["encoder_max_length"] == lengths[0].max()
            assert batch["decoder_max_length"] == lengths[1].max()
            assert batch["encoder_cu_seqlens"].dtype == torch.int32
        assert len(batch["denoiser"]) == len(examples_of(batch, form))


def digest(batch):
    whole = hashlib.sha256()
    for name, value in sorted(batch.items()):
        array = np.asarray(value)
        whole.update(f"{name}{array.shape}".encode())
        whole.update(array.tobytes())
    return whole.hexdigest()


@pytest.mark.parametrize("form", ["none", "segments", "stream"])
def test_batches_do_not_depend_on_workers_or_on_where_a_run_was_stopped(store, form):
    expected = [digest(small(store, form)[n]) for n in range(30)]
    assert len(set(expected)) == 30

    def read(data, workers, numbers):
        loader = DataLoader(data, batch_size=None, sampler=numbers, num_workers=workers)
        return [digest(batch) for batch in loader]

    assert read(small(store, form), 4, range(30)) == expected
    assert read(small(store, form), 1, range(17, 30)) == expected[17:]
    # Resumed from a state, without planning what came before; and asked for in any order.
    state = json.loads(json.dumps(small(store, form).schedule.state(17)))
    resumed = small(store, form)
    resumed.schedule.load_state(state)
    assert read(resumed, 4, range(17, 30)) == expected[17:]
    assert read(small(store, form), 0, [29, 3, 18]) == [expected[29], expected[3], expected[18]]
    assert [digest(small(store, form, seed=1)[n]) for n in range(3)] != expected[:3]


def test_a_killed_run_continues_with_the_same_batches(store, tmp_path):
    log = tmp_path / "log"

    def run(workers):
        done = log.read_text().count("\n") if log.exists() else 0
        data = DataLoader(small(store, "segments"), batch_size=None, sampler=range(done, 60), num_workers=workers)
        with log.open("a") as file:
            for batch in data:
                file.write(digest(batch) + "\n")
                file.flush()
                time.sleep(0.02)

    first = get_context("fork").Process(target=run, args=(1,))
    first.start()
    while not log.exists() or log.read_text().count("\n") < 10:
        time.sleep(0.02)
    first.kill()
    first.join()
    written = log.read_text().count("\n")
    assert 10 <= written < 60
    run(4)
    expected = small(store, "segments")
    assert log.read_text().split() == [digest(expected[n]) for n in range(60)]


def test_a_schedule_refuses_batches_before_its_state(store):
    data = small(store, "segments")
    state = data.schedule.state(80)
    data.schedule.load_state(state)
    assert state["block"] > 0
    with pytest.raises(IndexError, match="before the state"):
        data[0]


def test_another_number_of_processes_continues_without_loss_or_repetition(store):
    def run(processes, first, count):
        """The windows that `processes` processes see in their `count` next batches, from batch `first` on."""
        seen = Counter()
        for process in range(processes):
            data = small(store, "segments")
            data.schedule.load_state(small(store, "segments").schedule.state(first))
            for k in range(count):
                parts = data.schedule.batch(first + k * processes + process)
                for block, part in parts:
                    seen.update(zip(block.epoch[part].tolist(), block.index[part].tolist(), strict=True))
        return seen

    whole = run(1, 0, 60)
    split = run(4, 0, 6) + run(2, 24, 12) + run(3, 48, 4)
    assert split == whole
    assert set(whole.values()) == {1}


def test_an_epoch_is_complete_and_each_is_shuffled_anew(store):
    data = small(store, "none")
    order = data.schedule._order
    size = len(data.schedule.windows)
    position, passes = order.start(), []
    for n in range(3):
        drawn = [order.draw(position, size - 10, 0)]
        drawn.append(order.draw(drawn[0][2], size, 0))  # ends with the pass, whatever is asked for
        position = drawn[1][2]
        passes.append(np.concatenate([index for index, _, _ in drawn]))
        assert sorted(passes[-1].tolist()) == list(range(size))
        assert all((epoch == n).all() for _, epoch, _ in drawn)
    assert (passes[0] != passes[1]).mean() > 0.9


@pytest.mark.parametrize("pieces", [1, 7, 300])
def test_weights_are_shares_of_tokens_and_every_corpus_keeps_its_passes(tmp_path, pieces):
    # Windows of very different length: 0.1 of the tokens is far from 0.1 of the windows.
    stores = [
        make_store(tmp_path / "new", random_documents(0, [400] * 300)),
        make_store(tmp_path / "old", random_documents(1, [20] * 2000)),
    ]
    windows = WindowDataset(stores, 400)
    order = CorpusOrder(windows, [(0, (0.9, 0.1))], seed=3)
    position, drawn = order.start(), []
    for _ in range(pieces):
        index, epoch, position = order.draw(position, 6300 // pieces, 0)
        drawn += zip(index.tolist(), epoch.tolist(), strict=True)
    tokens = np.array([windows.locate(np.array([i]))[2][0] for i, _ in drawn])
    old = np.array([i >= 300 for i, _ in drawn])
    assert tokens[old].sum() / tokens.sum() == pytest.approx(0.1, abs=0.002)
    assert len(set(drawn)) == len(drawn)
    for is_old, size in ((False, 300), (True, 2000)):
        mine = [d for d, o in zip(drawn, old, strict=True) if o == is_old]
        for start in range(0, len(mine) - size, size):
            assert len({i for i, _ in mine[start : start + size]}) == size


def test_stages_begin_at_their_step(tmp_path):
    stores = [make_store(tmp_path / str(n), random_documents(n, [60] * 500)) for n in range(3)]
    stages = [(0, (1.0, 0.0, 0.0)), (20, (0.0, 1.0, 1.0)), (40, (0.0, 0.0, 1.0))]
    data = small(stores, "segments", stages=stages, batches_per_step=2)
    rows = data.schedule.budget.bins * 2

    def corpora(step):
        parts = [p for batch in (2 * step, 2 * step + 1) for p in data.schedule.batch(batch)]
        return set(np.concatenate([b.index[p] for b, p in parts]) // 500), [b.first_bin // rows for b, _ in parts]

    for step in range(60):
        found, begun = corpora(step)
        allowed = {0: {0}, 1: {1, 2}, 2: {2}}
        stage_of = [0 if b < 20 else 1 if b < 40 else 2 for b in begun]
        assert found <= set().union(*(allowed[s] for s in stage_of))
    # A stage begins with the first block planned from its step on; here a block is at most 15 steps.
    assert corpora(19)[0] == {0}
    assert corpora(35)[0] == {1, 2}
    assert corpora(55)[0] == {2}


@pytest.mark.parametrize(("most_input", "most_labels"), [(512, 512), (1024, 256), (1024, 512)])
@pytest.mark.parametrize("name", ["ul2_fat5", "ul2_paper", "t5_span_corruption", "prefix_lm"])
@pytest.mark.parametrize("form", ["segments", "stream"])
def test_padding_is_below_three_percent_on_the_binding_side(store, most_input, most_labels, name, form):
    mixture = Mixture(MixtureOptions(name).resolved(), T5_IDS)
    if form == "segments":
        window, rows = window_that_packs(stored_documents([store]), mixture, most_input, most_labels), 1
    else:
        window, rows = longest_window(mixture, most_input, most_labels), 16
    budget = Budget(1, rows * most_input, rows * most_labels, True, 8192)
    schedule = schedule_of(store, mixture, budget, window=window)
    blocks = [schedule._block(n) for n in range(2)]
    bins = sum(len(b.ends) for b in blocks)
    filled = [
        sum(b.plan.input_lengths.sum() for b in blocks) / (bins * budget.inputs),
        sum(b.plan.label_lengths.sum() for b in blocks) / (bins * budget.labels),
    ]
    assert 1 - max(filled) < 0.03


def test_window_that_packs_is_as_long_as_padding_allows(store):
    mixture = Mixture(MixtureOptions("t5_span_corruption").resolved(), T5_IDS)
    assert window_that_packs(stored_documents([store]), mixture, 512, 512) == longest_window(mixture, 512, 512)
    ul2 = Mixture(MixtureOptions().resolved(), T5_IDS)
    window = window_that_packs(stored_documents([store]), ul2, 512, 512)
    assert window < longest_window(ul2, 512, 512)
    lengths = np.random.default_rng(0).integers(100, 2001, 900)
    assert windows_of(lengths, window).sum() == lengths.sum()
    assert padding_share(ul2, windows_of(lengths, window), 512, 512) < 0.035


def test_a_window_that_does_not_fit_is_refused():
    mixture = Mixture([Denoiser("prefix")], T5_IDS)
    assert checked_window(mixture, 50, 64, 64) == 50
    with pytest.raises(ValueError, match=r"data\.window is 500, and at most \d+ raw tokens fit"):
        checked_window(mixture, 500, 64, 64)


def test_plans_tell_lengths_that_the_tokens_then_have():
    mixture = Mixture(MixtureOptions().resolved(), T5_IDS)
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 600, 3000)
    plan = mixture.plan(example_keys(0, 0, np.arange(3000)), lengths)
    inputs, labels = mixture.corrupt([rng.integers(3, 32000, n) for n in lengths], plan)
    # EOS is where each example must end, and nowhere else.
    assert np.array_equal(np.flatnonzero(inputs == 1) + 1, np.cumsum(plan.input_lengths))
    assert np.array_equal(np.flatnonzero(labels == 1) + 1, np.cumsum(plan.label_lengths))
