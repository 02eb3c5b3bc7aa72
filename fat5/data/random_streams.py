"""Counter-based random numbers: every draw is a hash of (seed, epoch, example index, counter).

There is no generator state, so an example's draws depend on nothing but its key: not on the batch it is in,
the worker that makes it, or how the run got there. All functions take and return whole arrays.

The hash is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Keys = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)


def mix(x: Keys) -> Keys:
    """Scramble 64-bit integers (a bijection); returns a new array of the same shape."""
    x = x ^ (x >> np.uint64(30))
    x *= _M1
    x ^= x >> np.uint64(27)
    x *= _M2
    x ^= x >> np.uint64(31)
    return x


def example_keys(seed: int, epoch: ArrayLike, index: ArrayLike) -> Keys:
    """Give the key of each example's random stream.

    Args:
        seed: the run's data seed, any non-negative integer below 2**64.
        epoch: [B] or scalar, non-negative.
        index: [B] or scalar, non-negative: the example's place in the data set.
    """
    return derive(derive(mix(_steps(seed)), epoch), index)


def derive(keys: Keys, label: ArrayLike) -> Keys:
    """Give new keys for sub-streams `label` (integers) of the streams `keys`; broadcasts."""
    return mix(keys ^ mix(_steps(label)))


def bits(keys: Keys, counter: ArrayLike) -> Keys:
    """Draw 64 random bits: number `counter` of each key's stream; broadcasts."""
    return mix(keys + _steps(counter))


def _steps(counter: ArrayLike) -> Keys:
    return (np.atleast_1d(counter).astype(np.uint64) + np.uint64(1)) * _GOLDEN


def uniform(keys: Keys, counter: ArrayLike) -> NDArray[np.float64]:
    """Draw numbers in [0, 1) with 53 random bits."""
    return (bits(keys, counter) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def below(keys: Keys, counter: ArrayLike, bound: ArrayLike) -> NDArray[np.int64]:
    """Draw integers in [0, bound), bound in 1 to 2**31; broadcasts. The bias is below bound / 2**32."""
    high = bits(keys, counter) >> np.uint64(32)
    return ((high * np.asarray(bound).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def choose(keys: Keys, sizes: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Choose `counts[u]` distinct items of `sizes[u]` for every urn u, all subsets equally likely.

    Draws with replacement and redraws what was drawn before: the procedure treats all items alike, so every
    subset of the wanted size has the same chance. Where more than half is wanted, the complement is drawn, so
    that few draws are repeats.

    Args:
        keys: [U] one random stream for each urn.
        sizes: [U] number of items.
        counts: [U] how many to choose, at most `sizes`.

    Returns:
        [sum(counts)] the chosen items, 0-based within their urn, urn after urn, ascending.
    """
    ends = np.cumsum(sizes)
    base = ends - sizes
    total = int(ends[-1]) if len(ends) else 0
    inverted = counts * 2 > sizes
    missing = np.where(inverted, sizes - counts, counts)
    chosen = np.zeros(total, dtype=bool)
    owner = np.empty(total, dtype=np.int32)
    drawn = np.zeros(len(sizes), dtype=np.int64)
    active = np.flatnonzero(missing)
    while len(active):
        want = missing[active]
        urn = np.repeat(active, want)
        order = np.arange(len(urn))
        counter = drawn[urn] + order - np.repeat(np.cumsum(want) - want, want)
        item = base[urn] + below(keys[urn], counter, sizes[urn])
        owner[item] = order
        fresh = (owner[item] == order) & ~chosen[item]
        chosen[item] = True
        drawn[active] += want
        missing -= np.bincount(urn[fresh], minlength=len(sizes))
        active = active[missing[active] > 0]
    if inverted.any():
        chosen ^= np.repeat(inverted, sizes)
    return np.flatnonzero(chosen) - np.repeat(base, counts)


def permutation(key: int, size: int, start: int, stop: int) -> NDArray[np.int64]:
    """Give places `start` to `stop` of a pseudo-random permutation of range(size), in O(stop - start) memory.

    A four-round Feistel network over the next even power of two, walked until it lands inside (Black and
    Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    keys = bits(np.atleast_1d(np.uint64(key)), np.arange(4))
    value = np.arange(start, stop, dtype=np.uint64)
    inside = np.zeros(len(value), dtype=bool)
    while not inside.all():
        outside = np.flatnonzero(~inside)
        left, right = value[outside] >> shift, value[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (mix(right + round_key) & mask)
        value[outside] = (left << shift) | right
        inside = value < np.uint64(size)
    return value.astype(np.int64)
