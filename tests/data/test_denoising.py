"""Denoised examples against T5's preprocessors: exact counts, exact distribution, and the way back to the source."""

import itertools
from collections import Counter

import numpy as np
import pytest
import t5_preprocessors as t5
from denoising import T5_IDS, corrupt, prefixes, restore, spans, special_ids, text
from hypothesis import given, settings
from hypothesis import strategies as st

from fat5.data.denoisers import MIXTURES, Denoiser
from fat5.data.options import MixtureOptions
from fat5.data.random_streams import choose, derive, example_keys, permutation
from fat5.data.span_corruption import Mixture, noise_counts
from fat5.data.window_length import longest_window


@settings(max_examples=150, deadline=None)
@given(
    ids=special_ids(),
    denoisers=st.lists(spans | prefixes, min_size=1, max_size=4),
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=12),
    roll=st.booleans(),
    seed=st.integers(0, 2**63),
)
def test_every_example_is_restored_exactly(ids, denoisers, lengths, roll, seed):
    mixture = Mixture(denoisers, ids, roll)
    rng = np.random.default_rng(seed)
    windows = [rng.integers(2, 200, n) for n in lengths]
    plan, examples = corrupt(mixture, example_keys(seed, 3, np.arange(len(windows))), windows)
    for window, (inputs, labels), d in zip(windows, examples, plan.denoiser, strict=True):
        assert restore(inputs, labels, ids, denoisers[d].mode) == window.tolist()


@settings(max_examples=60, deadline=None)
@given(spans, st.integers(0, 2**32))
def test_the_noise_count_is_exactly_t5s_and_spans_stay_within_the_sentinels(denoiser, seed):
    mixture = Mixture([denoiser], T5_IDS)
    rng = np.random.default_rng(seed)
    windows = [text(rng, n) for n in rng.integers(2, 1500, 8)]
    _, examples = corrupt(mixture, example_keys(seed, 0, np.arange(8)), windows)
    sentinels = set(T5_IDS.sentinels.tolist())
    for window, (inputs, labels) in zip(windows, examples, strict=True):
        noise, wanted = t5.span_counts(len(window), denoiser.r, denoiser.mu)
        assert sum(t not in sentinels for t in labels[:-1]) == noise
        used = [t for t in inputs.tolist() if t in sentinels]
        kept = len(window) - noise
        assert len(used) - min(wanted, 99, kept) in (0, 1)
        assert len(set(used)) == len(used) <= 100
        assert set(inputs.tolist()) - sentinels <= {*window.tolist(), 1, 32100, 32102}


@pytest.mark.parametrize(("mu", "r"), [(3.0, 0.15), (8.0, 0.15), (3.0, 0.5), (64.0, 0.15), (64.0, 0.5), (8.0, 0.5)])
def test_counts_equal_t5s_at_every_length(mu, r):
    lengths = np.arange(2, 3000)
    ones = np.ones(len(lengths), dtype=np.float32)
    noise, spans = noise_counts(lengths, ones * np.float32(r), ones * np.float32(mu), 10**9)
    expected = [t5.span_counts(n, r, mu) for n in lengths.tolist()]
    assert list(zip(noise.tolist(), spans.tolist(), strict=True)) == expected


def test_the_published_overrun_is_capped_and_keeps_its_noise():
    # 766 raw tokens make a 512-token input at mu 3, r 0.5, and T5's rule wants 128 spans of T5's 100 sentinels.
    assert t5.span_counts(766, 0.5, 3.0) == (383, 128)
    mixture = Mixture([Denoiser("span", mu=3.0, r=0.5)], T5_IDS)
    windows = [text(np.random.default_rng(n), 766) for n in range(400)]
    _, examples = corrupt(mixture, example_keys(0, 0, np.arange(400)), windows)
    for window, (inputs, labels) in zip(windows, examples, strict=True):
        assert np.isin(inputs, T5_IDS.sentinels).sum() in (99, 100)
        assert np.isin(labels, T5_IDS.sentinels).sum() <= 100
        assert (~np.isin(labels[:-1], T5_IDS.sentinels)).sum() == 383
        assert restore(inputs, labels, T5_IDS) == window.tolist()


def mask_of(inputs, length):
    """Tell which of the tokens 2..length+1, each once in the text, the input lacks."""
    kept = set(inputs.tolist())
    return tuple(n + 2 not in kept for n in range(length))


def exact_masks(length, noise, spans, roll):
    """List the probability of every mask, by listing all segmentations and offsets."""

    def segmentations(items):
        for cuts in itertools.combinations(range(1, items), spans - 1):
            yield np.diff([0, *cuts, items])

    probability = Counter()
    pairs = list(itertools.product(segmentations(length - noise), segmentations(noise)))
    for kept, masked in pairs:
        mask = np.concatenate([[False] * k + [True] * m for k, m in zip(kept, masked, strict=True)])
        offsets = range(length) if roll else [0]
        for offset in offsets:
            probability[tuple(np.roll(mask, offset).tolist())] += 1 / len(pairs) / len(offsets)
    return probability


@pytest.mark.parametrize("roll", [True, False])
@pytest.mark.parametrize(
    ("length", "r", "mu"), [(9, 0.4, 2.0), (10, 0.3, 1.0), (7, 0.15, 3.0), (8, 0.75, 3.0), (2, 0.5, 1.0)]
)
def test_masks_have_exactly_t5s_distribution(length, r, mu, roll):
    noise, count = t5.span_counts(length, r, mu)
    expected = exact_masks(length, noise, min(count, noise, length - noise), roll)
    draws = 40_000
    mixture = Mixture([Denoiser("span", mu=mu, r=r)], T5_IDS, roll)
    windows = [np.arange(2, length + 2)] * draws
    _, examples = corrupt(mixture, example_keys(11, 0, np.arange(draws)), windows)
    seen = Counter(mask_of(inputs, length) for inputs, _ in examples)
    assert set(seen) == set(expected)
    chi2 = sum((seen[m] - draws * p) ** 2 / (draws * p) for m, p in expected.items())
    degrees = len(expected) - 1
    assert chi2 < degrees + 5 * np.sqrt(2 * degrees) + 5


@pytest.mark.parametrize(("mu", "r"), [(3.0, 0.15), (8.0, 0.15), (3.0, 0.5), (64.0, 0.5)])
def test_span_lengths_and_positions_are_distributed_as_the_ports(mu, r):
    length, draws = 256, 3000
    rng = np.random.default_rng(5)
    theirs = np.array([t5.random_spans_mask(rng, length, r, mu, True, 99) for _ in range(draws)])
    mixture = Mixture([Denoiser("span", mu=mu, r=r)], T5_IDS)
    windows = [np.arange(2, length + 2)] * draws
    _, examples = corrupt(mixture, example_keys(7, 0, np.arange(draws)), windows)
    ours = np.array([mask_of(inputs, length) for inputs, _ in examples])
    assert (ours.sum(1) == theirs.sum(1)).all()

    def run_lengths(masks):
        edges = np.diff(np.pad(masks.astype(np.int8), ((0, 0), (1, 1))), axis=1)
        return np.argwhere(edges == -1)[:, 1] - np.argwhere(edges == 1)[:, 1]

    a, b = run_lengths(ours), run_lengths(theirs)
    edges = np.unique(np.quantile(b, np.linspace(0, 1, 20)))
    x, y = (np.histogram(v, [*edges, np.inf])[0] for v in (a, b))
    # Spans of one mask depend on each other only weakly; two samples of equal size.
    chi2 = ((x - y) ** 2 / np.maximum(x + y, 1)).sum()
    assert chi2 < len(x) + 5 * np.sqrt(2 * len(x))
    share = ours.mean(0)
    assert np.abs(share - ours.mean()).max() < 5 * np.sqrt(r * (1 - r) / draws)


@pytest.mark.parametrize("roll", [True, False])
def test_inputs_and_targets_are_t5s_for_the_same_mask(roll):
    rng = np.random.default_rng(0)
    mixture = Mixture([Denoiser("span", mu=3.0, r=0.3)], T5_IDS, roll)
    windows = [np.arange(2, n + 2) for n in rng.integers(1, 300, 300)]
    _, examples = corrupt(mixture, example_keys(2, 0, np.arange(300)), windows)
    compared = 0
    for window, (inputs, labels) in zip(windows, examples, strict=True):
        mask = np.array(mask_of(inputs, len(window)))
        assert inputs[:-1].tolist() == t5.span_to_sentinel(window, mask, T5_IDS.sentinels).tolist()
        if not mask[0]:
            compared += 1
            assert labels[:-1].tolist() == t5.span_to_sentinel(window, ~mask, T5_IDS.sentinels).tolist()
    assert compared > 150


def test_an_example_does_not_depend_on_its_batch():
    mixture = Mixture(MIXTURES["ul2_fat5"], T5_IDS)
    rng = np.random.default_rng(1)
    windows = [text(rng, n) for n in rng.integers(1, 500, 64)]
    index = rng.permutation(10**6)[:64]
    plan, together = corrupt(mixture, example_keys(9, 2, index), windows)
    order = rng.permutation(64)
    again = corrupt(mixture, example_keys(9, 2, index[order]), [windows[i] for i in order])[1]
    for n in range(64):
        alone = corrupt(mixture, example_keys(9, 2, index[n : n + 1]), [windows[n]])[1][0]
        shuffled = again[int(np.argwhere(order == n)[0, 0])]
        for side in range(2):
            assert np.array_equal(alone[side], together[n][side])
            assert np.array_equal(shuffled[side], together[n][side])
    other = corrupt(mixture, example_keys(9, 3, index), windows)
    assert any(len(a[0]) != len(b[0]) or (a[0] != b[0]).any() for a, b in zip(together, other[1], strict=True))
    assert (other[0].denoiser != plan.denoiser).any()


@pytest.mark.parametrize("name", MIXTURES)
def test_denoisers_are_drawn_in_proportion(name):
    mixture = Mixture(MIXTURES[name], T5_IDS)
    draws = 200_000
    counts = np.bincount(mixture.choose(example_keys(1, 0, np.arange(draws))), minlength=len(mixture.shares))
    errors = np.sqrt(mixture.shares * (1 - mixture.shares) / draws)
    assert (np.abs(counts / draws - mixture.shares) <= 4.5 * errors).all()


def test_the_published_mixture():
    found = [(d.mu, d.r, d.mode, d.proportion) for d in MIXTURES["ul2_fat5"] if d.kind == "span"]
    assert found == [
        (3.0, 0.15, "[R]", 0.165),
        (8.0, 0.15, "[R]", 0.165),
        (3.0, 0.5, "[X]", 0.0825),
        (8.0, 0.15, "[X]", 0.0825),
        (64.0, 0.15, "[X]", 0.0825),
        (64.0, 0.5, "[X]", 0.0825),
    ]
    (prefix,) = [d for d in MIXTURES["ul2_fat5"] if d.kind == "prefix"]
    assert (prefix.mode, prefix.proportion, prefix.prefix) == ("[S]", 0.34, 0.25)
    assert sum(d.proportion for d in MIXTURES["ul2_fat5"]) == pytest.approx(1.0)
    paper = MIXTURES["ul2_paper"]
    assert [d.mu for d in paper if d.r == 0.5] == [3.0, 8.0, 64.0]
    assert paper[2].prefix == 0.75


def prefix_lengths(denoiser, length, draws):
    mixture = Mixture([denoiser], T5_IDS)
    windows = [np.arange(2, length + 2)] * draws
    _, examples = corrupt(mixture, example_keys(4, 0, np.arange(draws)), windows)
    extra = 1 + denoiser.sentinel
    assert all((np.isin(i, T5_IDS.sentinels).sum() == denoiser.sentinel) for i, _ in examples[:10])
    return np.array([len(i) - extra for i, _ in examples])


@pytest.mark.parametrize("sentinel", [True, False])
def test_the_uniform_prefix_is_uniform(sentinel):
    found = prefix_lengths(Denoiser("prefix", prefix=None, sentinel=sentinel), 21, 40_000)
    counts = np.bincount(found, minlength=22)
    assert counts[0] == 0
    assert counts[21] == 0
    chi2 = ((counts[1:21] - 2000.0) ** 2 / 2000).sum()
    assert chi2 < 19 + 5 * np.sqrt(38)


@pytest.mark.parametrize("share", [0.25, 0.75])
@pytest.mark.parametrize("sentinel", [True, False])
def test_the_fixed_prefix_is_fixed(share, sentinel):
    found = prefix_lengths(Denoiser("prefix", prefix=share, sentinel=sentinel), 100, 50)
    assert set(found.tolist()) == {round(100 * share)}


def test_mixture_options_are_laid_over_the_denoisers():
    plain = MixtureOptions(mode_tokens=False, prefix_split="uniform", prefix_sentinel=False).resolved()
    assert [d.mode for d in plain] == [None] * 7
    assert plain[2] == Denoiser("prefix", 0.34, prefix=None, sentinel=False)
    fixed = MixtureOptions(prefix_split="fixed_prefix", fixed_prefix=0.75).resolved()
    assert fixed[2].prefix == 0.75
    own = (Denoiser("span", 2.0, 5.0, 0.2),)
    assert MixtureOptions(denoisers=own).resolved() == own
    with pytest.raises(ValueError, match="ul2_fat5"):
        MixtureOptions(name="ul3")


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(("most_input", "most_target"), [(512, 512), (1024, 256), (1024, 512), (64, 64)])
@pytest.mark.parametrize("roll", [True, False])
def test_the_longest_window_fits_and_is_the_longest(name, most_input, most_target, roll):
    mixture = Mixture(MIXTURES[name], T5_IDS, roll)
    window = longest_window(mixture, most_input, most_target)
    keys = example_keys(0, 0, np.arange(4000))

    def longest(lengths):
        plans = [mixture.plan(keys, lengths, np.full(4000, d)) for d in range(len(mixture.denoisers))]
        return max(p.input_lengths.max() for p in plans), max(p.label_lengths.max() for p in plans)

    inside = longest(np.minimum(np.arange(4000) % (window + 1), window))
    assert inside[0] <= most_input
    assert inside[1] <= most_target
    beyond = longest(np.full(4000, window + 1))
    assert beyond[0] > most_input or beyond[1] > most_target


def test_a_window_that_cannot_fit_is_refused():
    with pytest.raises(ValueError, match="no window fits"):
        longest_window(Mixture(MIXTURES["ul2_fat5"], T5_IDS), 2, 2)


def test_choose_takes_every_subset_equally_often():
    draws, size, count = 40_000, 7, 4  # more than half: by its complement
    keys = derive(example_keys(0, 0, np.arange(draws)), 1)
    chosen = choose(keys, np.full(draws, size), np.full(draws, count)).reshape(draws, count)
    assert (np.diff(chosen, axis=1) > 0).all()
    seen = Counter(map(tuple, chosen.tolist()))
    assert len(seen) == 35
    chi2 = sum((n - draws / 35) ** 2 / (draws / 35) for n in seen.values())
    assert chi2 < 34 + 5 * np.sqrt(68)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100, 1023, 4097])
def test_permutation_visits_everything_once_in_any_pieces(size):
    whole = permutation(123, size, 0, size)
    assert sorted(whole.tolist()) == list(range(size))
    cut = size // 3
    assert np.array_equal(np.concatenate([permutation(123, size, 0, cut), permutation(123, size, cut, size)]), whole)
    if size > 50:
        assert not np.array_equal(whole, permutation(124, size, 0, size))
        assert np.abs(np.corrcoef(whole, np.arange(size))[0, 1]) < 4 / np.sqrt(size)
