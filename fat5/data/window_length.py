"""How many raw tokens make one example."""

from collections.abc import Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from fat5.data.corpus_order import shuffled
from fat5.data.documents import DataError, read_documents
from fat5.data.encode import Encoder, naming_documents
from fat5.data.options import CorpusOptions
from fat5.data.packing import best_fit
from fat5.data.random_streams import example_keys
from fat5.data.span_corruption import Mixture, noise_counts
from fat5.data.token_store import TokenStore

#: Share of padding, on the side that binds, up to which rows count as full.
MOST_PADDING = 0.03

_SAMPLE = 4096
_FRACTIONS = (1.0, 0.75, 0.5, 0.4, 0.33, 0.25, 0.2, 0.167)


def longest_window(mixture: Mixture, max_input_length: int, max_target_length: int) -> int:
    """Find the longest raw window whose input and target fit, whatever the denoiser and the draws.

    Raises:
        ValueError: not even a window of two tokens fits.
    """
    lengths = np.arange(1, max_input_length + max_target_length + 1)
    fits = np.ones(len(lengths), dtype=bool)
    for d in mixture.denoisers:
        if d.kind == "span":
            r, mu = (np.full(len(lengths), x, dtype=np.float32) for x in (d.r, d.mu))
            noise, spans = noise_counts(lengths, r, mu, mixture.most_spans)
            longest_input = lengths - noise + spans + mixture.random_roll
            longest_target = noise + spans + (mixture.random_roll | (spans == 0))
        elif d.prefix is not None:
            prefix = np.minimum(np.maximum(np.rint(lengths * d.prefix), 1), lengths - 1)
            longest_input, longest_target = prefix + d.sentinel, lengths - prefix + d.sentinel
        else:
            longest_input = lengths - 1 + d.sentinel
            longest_target = np.maximum(lengths - 1, 1) + d.sentinel
        fits &= longest_input + (d.mode is not None) + 1 <= max_input_length
        fits &= longest_target + 1 <= max_target_length
    window = len(lengths) if fits.all() else int(np.argmin(fits))
    if window < 2:
        raise ValueError(
            f"no window fits max_input_length {max_input_length} and max_target_length {max_target_length} with this"
            " mixture; make them larger"
        )
    return window


def checked_window(mixture: Mixture, window: int | None, max_input_length: int, max_target_length: int) -> int:
    """Give `window`, or the longest that fits where it is None.

    Raises:
        ValueError: `window` is longer than fits.
    """
    longest = longest_window(mixture, max_input_length, max_target_length)
    if window is not None and window > longest:
        raise ValueError(
            f"data.window is {window}, and at most {longest} raw tokens fit max_input_length {max_input_length} and"
            f" max_target_length {max_target_length} under every denoiser of the mixture"
        )
    return window or longest


def window_that_packs(
    documents: NDArray[np.int64], mixture: Mixture, max_input_length: int, max_target_length: int
) -> int:
    """Find the longest window with which rows of segments are filled, by packing a sample of the corpora.

    Examples as long as a row leave gaps that no other example fills; shorter windows pack better. Tries
    falling lengths and takes the first with at most `MOST_PADDING` on the side that binds, or else the one
    with the least.

    Args:
        documents: the lengths of a sample of documents, in tokens.
        mixture: the denoisers.
        max_input_length: encoder tokens of a row.
        max_target_length: decoder tokens of a row.
    """
    longest = longest_window(mixture, max_input_length, max_target_length)
    least = (1.0, longest)
    for fraction in _FRACTIONS:
        window = max(2, int(longest * fraction))
        padding = padding_share(mixture, windows_of(documents, window), max_input_length, max_target_length)
        if padding <= MOST_PADDING:
            return window
        least = min(least, (padding, window))
    return least[1]


def padding_share(mixture: Mixture, lengths: NDArray[np.int64], most_input: int, most_labels: int) -> float:
    """Pack a sample of windows; give the share of padding on the side that binds."""
    lengths = lengths[shuffled(0, 0, len(lengths))[:_SAMPLE]]
    plan = mixture.plan(example_keys(0, 0, np.arange(len(lengths))), lengths)
    bins = int(best_fit(plan.input_lengths, plan.label_lengths, most_input, most_labels).max()) + 1
    filled = plan.input_lengths.sum() / (bins * most_input), plan.label_lengths.sum() / (bins * most_labels)
    return float(1 - max(filled))


def windows_of(documents: NDArray[np.int64], window: int) -> NDArray[np.int64]:
    """Cut documents of these lengths into windows; give the windows' lengths."""
    count = -(-documents // window)
    lengths = np.full(int(count.sum()), window)
    lengths[np.cumsum(count) - 1] = documents - (count - 1) * window
    return lengths


def stored_documents(stores: Sequence[TokenStore]) -> NDArray[np.int64]:
    """Give the lengths of documents spread evenly over tokenised corpora."""
    found = []
    step = max(1, sum(store.documents for store in stores) // _SAMPLE)
    for store in stores:
        for _, ends in store.shards():
            chosen = np.arange(0, len(ends), step)
            found.append(ends[chosen] - np.where(chosen > 0, ends[chosen - 1], 0))
    return np.concatenate(found)


def streamed_documents(corpora: Sequence[CorpusOptions], encoder: Encoder) -> NDArray[np.int64]:
    """Give the lengths of the first documents of streamed corpora.

    Raises:
        DataError: a corpus cannot be read or encoded, or they hold no text.
    """
    found: list[int] = []
    for corpus in corpora:
        with naming_documents(corpus):
            texts = list(islice(read_documents(corpus), _SAMPLE // (4 * len(corpora))))
            found += map(len, encoder(texts))
    lengths = np.array(found, dtype=np.int64)
    if not lengths.any():
        raise DataError(f"the corpus {corpora[0].name} holds no text")
    return lengths[lengths > 0]
