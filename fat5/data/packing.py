"""Place examples into bins of a fixed token budget for encoder and decoder."""

from bisect import bisect_right
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

# How many lengths, longest first, are tried for one that fits on the other side too; and as many around an aim.
_TRIES = 8
# Share of the bins of the side that needs more, from which on the other side binds as well.
_BOTH_BIND = 0.9


def best_fit(input_lengths: Ints, label_lengths: Ints, most_input: int, most_labels: int) -> Ints:
    """Pack examples into bins, one bin after the other, until none that is left fits.

    While a bin has room for several, it takes the next example in the order given, so that every bin is a
    fair sample; then what fills it best. The side that would need more bins binds, and length is measured
    there: the longest that fits comes next. Where both sides need about as many bins, the longest on one would
    waste room on the other, and the one that fits both comes next.

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
    both_bind = side.sum() * most > _BOTH_BIND * length.sum() * most_side
    rest: _Rest = _ByBothSides(length, side) if both_bind else _ByLength(length, side, most, most_side)
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
            n = rest.take(room, room_side, bins)
            if n < 0:
                number += 1
                room, room_side = most, most_side
        bins[n] = number
        room -= lengths[n]
        room_side -= sides[n]
    return np.array(bins, dtype=np.int64)


class _Rest(Protocol):
    """The examples that are not placed yet."""

    def take(self, room: int, room_side: int, bins: list[int]) -> int:
        """Take out the one that goes best into so much room, or return -1 where none is found."""


class _ByLength:
    """By length on the side that binds.

    There are two pools, of the examples that use more of the other side than the average and of those that use
    less; the bin's content so far decides which of them comes first, so that the other side does not run out early.
    """

    def __init__(self, length: Ints, side: Ints, most: int, most_side: int) -> None:
        self._most, self._most_side = most, most_side
        self._average = float(side.sum() / length.sum())
        heavy = side > self._average * length
        self._light, self._heavy = _Pool(length, side, ~heavy), _Pool(length, side, heavy)

    def take(self, room: int, room_side: int, bins: list[int]) -> int:
        pools = self._heavy, self._light
        if self._most_side - room_side > self._average * (self._most - room):
            pools = self._light, self._heavy
        n = pools[0].longest(room, room_side, bins)
        return n if n >= 0 else pools[1].longest(room, room_side, bins)


class _ByBothSides:
    """By how near an example comes to an aim.

    The aim is an equal part of the room on both sides, for as many examples as still fit: when only one does, all
    of it.
    """

    def __init__(self, length: Ints, side: Ints) -> None:
        self._largest = int((length + side).max())
        self._stacks: list[list[tuple[int, int]]] = [[] for _ in range(int(length.max()) + 1)]
        self._lengths = 0  # a bit for each length that has examples
        order = np.argsort(side, kind="stable")
        for n, its_length, its_side in zip(order.tolist(), length[order].tolist(), side[order].tolist(), strict=True):
            self._stacks[its_length].append((its_side, n))
            self._lengths |= 1 << its_length

    def take(self, room: int, room_side: int, bins: list[int]) -> int:
        many = max(1, (room + room_side) // self._largest)
        aim, aim_side = room / many, room_side / many
        # The last full example leaves some room, best half of it on each side: it has fewer tokens than the aim.
        start = max(0, int(aim - max(0.0, aim + aim_side - self._largest) / 2))
        best, found = float("inf"), (0, -1)
        for at in self._around(start, room):
            place = self._fitting(at, min(room_side, int(aim_side) + 2), bins)
            if place >= 0:
                distance = (aim - at) ** 2 + (aim_side - self._stacks[at][place][0]) ** 2
                if distance < best:
                    best, found = distance, (at, place)
        at, place = found if found[1] >= 0 else self._longest(room, room_side, bins)
        return self._stacks[at].pop(place)[1] if place >= 0 else -1

    def _longest(self, room: int, room_side: int, bins: list[int]) -> tuple[int, int]:
        """Find the length and place of the longest example that fits, or -1 for the place."""
        fitting = self._lengths & ((1 << (room + 1)) - 1)
        tries = _TRIES
        while fitting and tries:
            at = fitting.bit_length() - 1
            place = self._fitting(at, room_side, bins)
            if place >= 0:
                return at, place
            tries -= bool(self._stacks[at])
            fitting ^= 1 << at
        return 0, -1

    def _around(self, start: int, most: int) -> list[int]:
        """Give the lengths up to `most` nearest to `start`, twice `_TRIES` at most, those below first."""
        found = []
        below = self._lengths & ((1 << (min(start, most) + 1)) - 1)
        above = (self._lengths & ((1 << (most + 1)) - 1)) >> (start + 1) << (start + 1)
        for _ in range(_TRIES):
            if below:
                found.append(below.bit_length() - 1)
                below ^= 1 << found[-1]
            if above:
                found.append((above & -above).bit_length() - 1)
                above ^= 1 << found[-1]
        return found

    def _fitting(self, at: int, most_side: int, bins: list[int]) -> int:
        """Find the place, among the examples of a length, of the one with most of the other side that fits, or -1."""
        stack = self._stacks[at]
        place = bisect_right(stack, (most_side, len(bins))) - 1
        while place >= 0 and bins[stack[place][1]] >= 0:
            del stack[place]
            place -= 1
        if not stack:
            self._lengths ^= 1 << at
        return place


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
