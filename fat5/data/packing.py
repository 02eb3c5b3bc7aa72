"""Place examples into bins of a fixed token budget for encoder and decoder."""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

# How many lengths, longest first, are tried for one that fits on the other side too.
_TRIES = 8


def best_fit(input_lengths: Ints, label_lengths: Ints, most_input: int, most_labels: int) -> Ints:
    """Pack examples into bins, one bin after the other, until none that is left fits.

    While a bin has room for several, it takes the next example in the order given, so that every bin is a
    fair sample; then the longest that fits. The side that would need more bins binds, and length is measured
    there. There are two pools, of the examples that use more of the other side than the average and of those
    that use less; the bin's content so far decides which of them comes first, so that the other side does not
    run out early.

    Args:
        input_lengths: [N] encoder tokens.
        label_lengths: [N] decoder tokens.
        most_input: encoder tokens of a bin.
        most_labels: decoder tokens of a bin.

    Returns:
        [N] the bin of each example; bins are numbered from 0 without gaps.

    Raises:
        ValueError: an example is larger than a bin.
    """
    if not len(input_lengths):
        return np.empty(0, dtype=np.int64)
    if input_lengths.max() > most_input or label_lengths.max() > most_labels:
        raise ValueError(
            f"an example of {int(input_lengths.max())} input and {int(label_lengths.max())} target tokens does not fit"
            f" a bin of {most_input} and {most_labels}"
        )
    length, side, most, most_side = input_lengths, label_lengths, most_input, most_labels
    if label_lengths.sum() * most_input > input_lengths.sum() * most_labels:
        length, side, most, most_side = label_lengths, input_lengths, most_labels, most_input
    average = float(side.sum() / length.sum())
    pools = (_Pool(length, side, side <= average * length), _Pool(length, side, side > average * length))
    lengths, sides = length.tolist(), side.tolist()
    several, several_side = 2 * int(length.max()), 2 * int(side.max())
    bins = [-1] * len(lengths)
    number = following = 0
    room, room_side = most, most_side
    for _ in range(len(lengths)):
        n = -1
        if room > several and room_side > several_side:
            while bins[following] >= 0:
                following += 1
            n = following
        while n < 0:
            heavy = most_side - room_side > average * (most - room)
            n = pools[not heavy].longest(room, room_side, bins)
            if n < 0:
                n = pools[heavy].longest(room, room_side, bins)
            if n < 0:
                number += 1
                room, room_side = most, most_side
        bins[n] = number
        room -= lengths[n]
        room_side -= sides[n]
    return np.array(bins, dtype=np.int64)


class _Pool:
    """Examples by length; within one length, the one that uses least of the other side comes first."""

    def __init__(self, length: Ints, side: Ints, members: NDArray[np.bool_]) -> None:
        self._top = int(length.max())
        self._stacks: list[list[tuple[int, int]]] = [[] for _ in range(self._top + 1)]
        self._lengths = 0  # a bit for each length that has examples
        chosen = np.flatnonzero(members)
        chosen = chosen[np.argsort(-side[chosen], kind="stable")]
        for n, its_length, its_side in zip(
            chosen.tolist(), length[chosen].tolist(), side[chosen].tolist(), strict=True
        ):
            self._stacks[its_length].append((its_side, n))
            self._lengths |= 1 << its_length

    def longest(self, room: int, room_side: int, bins: list[int]) -> int:
        """Take out the longest unplaced example that fits, or return -1."""
        fitting = self._lengths & ((1 << (min(room, self._top) + 1)) - 1)
        tries = _TRIES
        while fitting and tries:
            at = fitting.bit_length() - 1
            stack = self._stacks[at]
            while stack and bins[stack[-1][1]] >= 0:
                stack.pop()
            if stack and stack[-1][0] <= room_side:
                return stack.pop()[1]
            if stack:
                tries -= 1
            else:
                self._lengths ^= 1 << at
            fitting ^= 1 << at
        return -1
