"""What the tests of the data share: special ids without a tokenizer, and the way back from an example to its text."""

import dataclasses

import numpy as np
from hypothesis import strategies as st

from fat5.data.denoisers import Denoiser
from fat5.data.span_corruption import Mixture
from fat5.data.special_ids import SpecialIds

T5_IDS = SpecialIds(
    sentinels=np.arange(32099, 31999, -1),
    modes={"[R]": 32100, "[S]": 32101, "[X]": 32102},
    eos=1,
    pad=0,
    vocabulary=32100,
    rows=32128,
    reserved=frozenset({0, 1, *range(32000, 32103)}),
)


def text(rng, length):
    """Draw ordinary ids of T5's vocabulary."""
    return rng.integers(3, 32000, length)


def split(flat, lengths):
    """Cut a flat ragged array back into its examples."""
    return np.split(flat, np.cumsum(lengths)[:-1])


def corrupt(mixture: Mixture, keys, windows, denoiser=None):
    """Plan and corrupt windows: the plan, and the list of (input, target)."""
    lengths = np.array([len(w) for w in windows], dtype=np.int64)
    plan = mixture.plan(keys, lengths, denoiser)
    inputs, labels = mixture.corrupt(windows, plan)
    assert len(inputs) == plan.input_lengths.sum()
    assert len(labels) == plan.label_lengths.sum()
    return plan, list(zip(split(inputs, plan.input_lengths), split(labels, plan.label_lengths), strict=True))


def restore(inputs, labels, ids: SpecialIds, mode=None):
    """Interleave an input and its target at the sentinels: the source text.

    Fails where an example is not well formed: sentinels out of order, missing, or not the same on both sides.
    """
    inputs, labels = list(inputs), list(labels)
    assert inputs.pop() == ids.eos
    assert labels.pop() == ids.eos
    if mode is not None:
        assert inputs.pop(0) == ids.modes[mode]
    number = {int(s): n for n, s in enumerate(ids.sentinels)}
    used = [number[t] for t in inputs if t in number]
    assert used == list(range(len(used))), "sentinels of the input do not count up from the first"
    spans: list[list[int]] = []
    loose: list[int] = []
    for t in labels:
        if t in number:
            assert number[t] == len(spans), "sentinels of the target do not count up from the first"
            spans.append([])
        else:
            (spans[-1] if spans else loose).append(int(t))
    if not used and not spans:  # prefix LM without a sentinel
        return [int(t) for t in inputs] + loose
    assert not loose, "masked text before the first sentinel"
    assert len(spans) in (len(used), len(used) + 1)
    assert len(spans) == len(used) or not spans[-1], "text behind the final sentinel"
    out: list[int] = []
    for t in inputs:
        out += spans[number[t]] if t in number else [int(t)]
    return out


spans = st.builds(
    Denoiser,
    kind=st.just("span"),
    mu=st.floats(1, 80),
    r=st.floats(0.01, 0.99),
    mode=st.sampled_from([None, "[R]", "[X]"]),
)
prefixes = st.builds(
    Denoiser,
    kind=st.just("prefix"),
    prefix=st.none() | st.floats(0.01, 0.99),
    sentinel=st.booleans(),
    mode=st.sampled_from([None, "[S]"]),
)


@st.composite
def special_ids(draw):
    """Sentinels anywhere in the vocabulary, contiguous or not, few or many; text has the ids 2 to 199."""
    count = draw(st.integers(2, 40))
    sentinels = draw(st.permutations(range(200, 260)))[:count]
    return dataclasses.replace(
        T5_IDS,
        sentinels=np.array(sentinels),
        modes={"[R]": 300, "[S]": 301, "[X]": 302},
        vocabulary=300,
        rows=303,
        reserved=frozenset({0, 1, *range(200, 303)}),
    )
