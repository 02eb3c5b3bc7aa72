"""T5's own preprocessing of one example, ported plainly: the oracle of the tests and the peer of the benchmark.

Ported from `t5/data/preprocessors.py` of google-research/text-to-text-transfer-transformer (Apache-2.0):
`random_spans_noise_mask`, `noise_span_to_unique_sentinel`, `nonnoise_span_to_unique_sentinel`,
`random_prefix_noise_mask`, `drop_noise_tokens`, `drop_nonnoise_tokens`. All arithmetic of the counts in fp32.
"""

import numpy as np


def span_counts(length, r, mu):
    """Masked tokens and spans of a window of at least two tokens."""
    noise = int(np.round(np.float32(length) * np.float32(r)))
    noise = min(max(noise, 1), length - 1)
    return noise, max(int(np.round(np.float32(noise) / np.float32(mu))), 1)


def random_segmentation(rng, items, segments):
    """Cut `items` things into `segments` nonempty runs, uniformly."""
    first = np.concatenate([[0], rng.permutation(np.arange(items - 1) < segments - 1)])
    return np.bincount(np.cumsum(first), minlength=segments)


def random_spans_mask(rng, length, r, mu, roll=True, most_spans=None):
    """Draw which tokens are masked: [length] bool."""
    if length < 2:
        return np.zeros(length, dtype=bool)
    noise, spans = span_counts(length, r, mu)
    spans = min(spans, most_spans or spans)
    masked = random_segmentation(rng, noise, spans)
    kept = random_segmentation(rng, length - noise, spans)
    starts = np.cumsum(np.stack([kept, masked], axis=1).reshape(-1))[:-1]
    mask = np.cumsum(np.bincount(starts, minlength=length)[:length]) % 2 == 1
    return np.roll(mask, rng.integers(length)) if roll else mask


def random_prefix_mask(rng, length):
    """Keep a uniform number of first tokens, at least one of each part; mask the rest."""
    most = length - 1
    return np.arange(length) >= rng.integers(min(most, 1), most + 1)


def span_to_sentinel(tokens, mask, sentinels):
    """Replace every run of the mask by the next sentinel."""
    before = np.concatenate([[False], mask[:-1]])
    first = mask & ~before
    numbered = np.where(first, np.asarray(sentinels)[np.maximum(np.cumsum(first) - 1, 0)], tokens)
    return numbered[~(mask & before)]


def span_corruption(rng, tokens, r, mu, sentinels, eos, mode=None, roll=True):
    """Corrupt one window as T5 does: its input and its target."""
    mask = random_spans_mask(rng, len(tokens), r, mu, roll, len(sentinels) - int(roll))
    inputs = span_to_sentinel(tokens, mask, sentinels)
    targets = span_to_sentinel(tokens, ~mask, sentinels)
    head = [] if mode is None else [mode]
    return np.concatenate([head, inputs, [eos]]).astype(np.int64), np.append(targets, eos)


def prefix_lm(rng, tokens, sentinels, eos, mode=None, sentinel=True):
    """Cut one window in two: its input and its target."""
    mask = random_prefix_mask(rng, len(tokens))
    head = [] if mode is None else [mode]
    mark = [sentinels[0]] if sentinel else []
    return (
        np.concatenate([head, tokens[~mask], mark, [eos]]).astype(np.int64),
        np.concatenate([mark, tokens[mask], [eos]]).astype(np.int64),
    )
