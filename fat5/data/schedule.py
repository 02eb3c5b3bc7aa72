"""Which examples lie together in which bin of which batch, planned block by block."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fat5.data.corpus_order import CorpusOrder, Position, shuffled
from fat5.data.packing import best_fit
from fat5.data.random_streams import example_keys
from fat5.data.span_corruption import Mixture, Plan
from fat5.data.windows import WindowDataset

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Budget:
    """What a batch holds.

    Attributes:
        bins: bins of a batch.
        inputs: encoder tokens of a bin.
        labels: decoder tokens of a bin.
        packed: False puts every example into a bin of its own.
        block: examples that are packed together; fewer where a pass of the corpora ends.
    """

    bins: int
    inputs: int
    labels: int
    packed: bool
    block: int


@dataclass(frozen=True)
class Block:
    """A planned block: its place in the run, and its examples sorted by bin.

    Attributes:
        number: how many blocks come before.
        first_bin: how many bins come before.
        position: where in the corpora it starts.
        index: [N] window of each example.
        epoch: [N] pass of its corpus.
        plan: how each is corrupted.
        ends: [bins] examples up to and including each bin.
    """

    number: int
    first_bin: int
    position: Position
    index: Ints
    epoch: Ints
    plan: Plan
    ends: Ints

    @property
    def end_bin(self) -> int:
        """Number of bins up to and including this block."""
        return self.first_bin + len(self.ends)


def pack_block(
    mixture: Mixture, budget: Budget, seed: int, number: int, index: Ints, epoch: Ints, lengths: Ints
) -> tuple[Ints, Plan, Ints]:
    """Plan the examples of a block and place them into bins, in random order.

    Returns:
        [N] the order that sorts the examples by bin, their plan in that order, and [bins] how many examples
        there are up to and including each bin.
    """
    mixed = shuffled(seed, number, len(index))
    plan = mixture.plan(example_keys(seed, epoch[mixed], index[mixed]), lengths[mixed])
    if not budget.packed:
        return mixed, plan, np.arange(1, len(index) + 1)
    bins = best_fit(plan.input_lengths, plan.label_lengths, budget.inputs, budget.labels)
    count = int(bins.max()) + 1
    bins = shuffled(seed + 1, number, count)[bins]
    by_bin = np.argsort(bins, kind="stable")
    return mixed[by_bin], plan.take(by_bin), np.cumsum(np.bincount(bins, minlength=count))


class Schedule:
    """The bins of a run, in order; the same whoever asks, and for whichever bins.

    A block of consecutive examples of the order is packed on its own, and its bins shuffled; batch j is bins
    j * `budget.bins` and on, whatever block they are in. A stage of the order starts with the first block
    whose first batch is not before the stage's step.

    Args:
        windows: the corpora.
        order: the order of their windows.
        mixture: the denoisers.
        budget: what a batch holds.
        seed: decides masks and bin order.
        batches_per_step: batches of one optimiser step, over all processes, by which `order` tells stages.
    """

    def __init__(
        self,
        windows: WindowDataset,
        order: CorpusOrder,
        mixture: Mixture,
        budget: Budget,
        seed: int,
        batches_per_step: int = 1,
    ) -> None:
        self.windows = windows
        self.mixture = mixture
        self.budget = budget
        self.seed = seed
        self._order = order
        self._bins_per_step = budget.bins * batches_per_step
        # Where each block known so far starts: its first bin and position.
        self._starts: list[tuple[int, Position]] = [(0, order.start())]
        self._offset = 0
        self._recent: dict[int, Block] = {}

    def batch(self, number: int) -> list[tuple[Block, slice]]:
        """Give the examples of a batch: parts of one or more blocks, as slices of their examples."""
        first, last = number * self.budget.bins, (number + 1) * self.budget.bins
        block = self._block_with(first)
        parts = []
        while first < last:
            stop = min(last, block.end_bin)
            begin = block.ends[first - block.first_bin - 1] if first > block.first_bin else 0
            parts.append((block, slice(int(begin), int(block.ends[stop - block.first_bin - 1]))))
            first = stop
            if first < last:
                block = self._block(block.number + 1)
        return parts

    def state(self, number: int) -> dict[str, Any]:
        """Give what lets another schedule begin at batch `number` without planning all that comes before."""
        block = self._block_with(number * self.budget.bins)
        return {"block": block.number, "first_bin": block.first_bin, "position": asdict(block.position)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Begin at the block of a `state`; batches before it cannot be asked for any more."""
        position = Position(tuple(state["position"]["taken"]), tuple(state["position"]["credit"]))
        self._starts = [(state["first_bin"], position)]
        self._offset = state["block"]
        self._recent.clear()

    def _block_with(self, bin_number: int) -> Block:
        for block in self._recent.values():
            if block.first_bin <= bin_number < block.end_bin:
                return block
        starts = [first for first, _ in self._starts]
        place = int(np.searchsorted(starts, bin_number, side="right")) - 1
        if place < 0:
            raise IndexError(f"bin {bin_number} comes before the state that was loaded")
        block = self._block(self._offset + place)
        while bin_number >= block.end_bin:
            block = self._block(block.number + 1)
        return block

    def _block(self, number: int) -> Block:
        if number not in self._recent:
            first_bin, position = self._starts[number - self._offset]
            step = first_bin // self._bins_per_step
            index, epoch, following = self._order.draw(position, self.budget.block, step)
            lengths = self.windows.locate(index)[2]
            order, plan, ends = pack_block(self.mixture, self.budget, self.seed, number, index, epoch, lengths)
            block = Block(number, first_bin, position, index[order], epoch[order], plan, ends)
            if len(self._starts) == number - self._offset + 1:
                self._starts.append((block.end_bin, following))
            while len(self._recent) > 1:
                del self._recent[next(iter(self._recent))]
            self._recent[number] = block
        return self._recent[number]
