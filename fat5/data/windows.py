"""Raw token windows of tokenised corpora, as a map-style torch dataset."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from fat5.data.token_store import TokenStore


class Window(TypedDict):
    """A raw example: `input_ids`, int [1..window], text ids; its `index` in the data set; and the `epoch`."""

    input_ids: NDArray[np.integer]
    index: int
    epoch: int


@dataclass(frozen=True)
class CorpusSize:
    """How many windows and tokens one corpus has."""

    windows: int
    tokens: int


class WindowDataset(Dataset[Window]):
    """All windows of one or more corpora, in order.

    Every document is cut into consecutive windows of `window` tokens, the last one shorter; nothing is
    dropped and no window holds text of two documents.

    Args:
        stores: the tokenised corpora.
        window: raw tokens of a full window.
    """

    def __init__(self, stores: Sequence[TokenStore], window: int) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1, not {window}")
        self.window = window
        self.epoch = 0
        self._stores = list(stores)
        self.corpora: list[CorpusSize] = []
        self._shards = [shard for store in stores for shard in store.shards()]
        # For each shard, how many windows there are up to and including each document.
        self._windows = []
        for _, ends in self._shards:
            lengths = np.diff(ends, prepend=0)
            self._windows.append(np.cumsum(-(-lengths // window)))
        sizes = [int(w[-1]) if len(w) else 0 for w in self._windows]
        self._shard_ends = np.cumsum(sizes, dtype=np.int64)
        at = 0
        for store in stores:
            count = len(store.shards())
            self.corpora.append(CorpusSize(sum(sizes[at : at + count]), store.tokens))
            at += count

    def __getstate__(self) -> dict[str, object]:
        """Give a worker the folders, not the mapped files' contents."""
        return {"stores": [store.folder for store in self._stores], "window": self.window, "epoch": self.epoch}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Map the same files again."""
        self.__dict__ = vars(WindowDataset([TokenStore(folder) for folder in state["stores"]], state["window"]))
        self.epoch = state["epoch"]

    def __len__(self) -> int:
        return int(self._shard_ends[-1]) if len(self._shard_ends) else 0

    @property
    def identity(self) -> list[str]:
        """What the text of each corpus is; see `TokenStore.identity`."""
        return [store.identity for store in self._stores]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the examples carry, and with it the masks they get."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> Window:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        shard, starts, lengths = (int(x[0]) for x in self.locate(np.array([index])))
        tokens = self._shards[shard][0]
        return Window(input_ids=np.asarray(tokens[starts : starts + lengths]), index=index, epoch=self.epoch)

    def locate(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Find windows: [N] shard, first token within the shard's tokens, and length."""
        shards = np.searchsorted(self._shard_ends, indices, side="right")
        starts, lengths = np.empty_like(indices), np.empty_like(indices)
        for shard in np.unique(shards):
            here = shards == shard
            windows, ends = self._windows[shard], self._shards[shard][1]
            within = indices[here] - (self._shard_ends[shard - 1] if shard else 0)
            document = np.searchsorted(windows, within, side="right")
            begin = np.where(document > 0, ends[document - 1], 0)
            before = np.where(document > 0, windows[document - 1], 0)
            starts[here] = begin + (within - before) * self.window
            lengths[here] = np.minimum(ends[document] - starts[here], self.window)
        return shards, starts, lengths

    def tokens(self, indices: NDArray[np.int64]) -> list[NDArray[np.integer]]:
        """Read windows: one memory-mapped array each."""
        located = zip(*(x.tolist() for x in self.locate(indices)), strict=True)
        return [self._shards[shard][0][start : start + length] for shard, start, length in located]
