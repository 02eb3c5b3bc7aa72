"""Which example comes when: corpora mixed by weight, each shuffled anew in every pass, stages by step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fat5.data.random_streams import bits, derive, example_keys, permutation
from fat5.data.windows import WindowDataset

Ints = NDArray[np.int64]

# Labels of the random streams that decide orders, apart from those that decide masks.
_PASS, _BLOCK = 0x0A55, 0xB10C


@dataclass(frozen=True)
class Position:
    """Where a run stands in its corpora.

    Attributes:
        taken: windows drawn from each group so far, over all passes.
        credit: for each group, the share of a window it is owed: what rounding has left over.
    """

    taken: tuple[int, ...]
    credit: tuple[float, ...]


class CorpusOrder:
    """The endless order of a run's training windows.

    Without weights all corpora are one group, and an epoch holds every window once. With weights each corpus
    is a group of its own and goes through its windows at its own pace, all of them once before any again; its
    share of the tokens is its weight's share of all weights.

    Args:
        windows: the corpora.
        stages: first step of each stage and its weights, one for each corpus, by rising step; (0, None)
            stands for a single group.
        seed: decides the shuffles.

    Raises:
        ValueError: a stage does not have one weight for each corpus, or all its weights are 0.
    """

    def __init__(self, windows: WindowDataset, stages: Sequence[tuple[int, Sequence[float] | None]], seed: int) -> None:
        self._seed = seed
        corpora = windows.corpora
        grouped = any(weights is not None for _, weights in stages)
        sizes = [c.windows for c in corpora] if grouped else [len(windows)]
        self._sizes = sizes
        self._first = np.cumsum([0, *sizes])[:-1]
        self._stages = []
        for step, weights in stages:
            shares = np.ones(1)
            if weights is not None:
                if len(weights) != len(corpora) or not sum(weights):
                    raise ValueError(f"the stage from step {step} needs a weight for each of {len(corpora)} corpora")
                # A corpus of shorter windows needs more of them for the same tokens.
                shares = np.array([w * c.windows / c.tokens for w, c in zip(weights, corpora, strict=True)])
            elif grouped:
                shares = np.array(sizes, dtype=np.float64)
            self._stages.append((step, shares / shares.sum()))

    def start(self) -> Position:
        """Give the position of a run that has seen nothing."""
        return Position((0,) * len(self._sizes), (0.0,) * len(self._sizes))

    def draw(self, position: Position, count: int, step: int) -> tuple[Ints, Ints, Position]:
        """Draw the next `count` windows with the weights of the stage that `step` is in.

        Fewer where a pass ends, so that whoever shuffles what is drawn does not mix two passes; but not for the sake of
        a weighted corpus that goes through more than a pass in `count` windows.

        Returns:
            [N] index of each window in the data set, [N] its epoch (passes of its corpus that are
            complete), and the new position.
        """
        shares = next(s for first, s in reversed(self._stages) if first <= step)
        credit = np.array(position.credit)
        # What a corpus that is left out has been owed, or has had too much, is shared by the others.
        credit = np.where(shares > 0, credit + shares * credit[shares == 0].sum(), 0.0)
        sizes = np.array(self._sizes)
        left = sizes - np.array(position.taken) % sizes
        ends = (sizes > shares * count) | (len(sizes) == 1)
        counts = _allot(credit, shares, count)
        while (over := ends & (counts > left)).any():
            count = max(1, min(count - 1, int(((left + 1 - credit)[over] / shares[over]).min()) + 1))
            counts = _allot(credit, shares, count)
        owed = credit + shares * count
        index, epoch = [], []
        for group, number in enumerate(counts.tolist()):
            for its_index, its_epoch in self._pass(group, position.taken[group], number):
                index.append(its_index)
                epoch.append(np.full(len(its_index), its_epoch))
        taken = tuple(t + n for t, n in zip(position.taken, counts.tolist(), strict=True))
        return np.concatenate(index), np.concatenate(epoch), Position(taken, tuple((owed - counts).tolist()))

    def _pass(self, group: int, start: int, count: int) -> list[tuple[Ints, int]]:
        """Give `count` windows of a group from its place `start` on, cut where a pass ends."""
        size, end = self._sizes[group], start + count
        pieces = []
        while start < end:
            epoch, place = divmod(start, size)
            stop = min(size, place + end - start)
            key = int(derive(example_keys(self._seed, epoch, group), _PASS)[0])
            pieces.append((self._first[group] + permutation(key, size, place, stop), epoch))
            start += stop - place
        return pieces


def _allot(credit: NDArray[np.float64], shares: NDArray[np.float64], count: int) -> Ints:
    """Divide `count` windows by shares and what is owed from before (largest remainders); [groups]."""
    owed = credit + shares * count
    counts = np.floor(np.maximum(owed, 0)).astype(np.int64)
    while (missing := count - counts.sum()) > 0:
        counts[np.argmax(np.where(shares > 0, owed - counts, -np.inf))] += 1
    while missing < 0:  # a group that has had too much waits, and the others wait for it
        counts[np.argmin(np.where(counts > 0, owed - counts, np.inf))] -= 1
        missing += 1
    return counts


def shuffled(seed: int, block: int, count: int) -> Ints:
    """Give a random order of `count` things, the same for the same (seed, block)."""
    return np.argsort(bits(derive(example_keys(seed, block, 0), _BLOCK), np.arange(count)), kind="stable")
