"""Training batches from corpora that are read as streams, with a state that resumes exactly."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch.utils.data
from numpy.typing import NDArray
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from fat5.data.batches import Form, Gathered, bin_sizes, build_batch, join
from fat5.data.documents import DataError, DocumentStream
from fat5.data.encode import Encoder, naming_documents
from fat5.data.options import CorpusOptions
from fat5.data.schedule import Budget, pack_block
from fat5.data.span_corruption import Mixture, Plan

Ints = NDArray[np.int64]

# Documents that are encoded together.
_DOCUMENTS = 256
# Windows of different corpora are numbered this far apart.
_APART = 1 << 40


class WindowStream:
    """The endless windows of one streamed corpus, pass after pass.

    Args:
        corpus: what to read.
        encoder: makes ids of text.
        window: raw tokens of a full window.
        first_index: the number of its first window.
    """

    def __init__(self, corpus: CorpusOptions, encoder: Encoder, window: int, first_index: int) -> None:
        self._corpus = corpus
        self._documents = DocumentStream(corpus)
        self._encoder = encoder
        self._window = window
        self._first_index = first_index
        self._epoch = 0
        self._count = 0  # windows of this pass before the buffered ones
        self._used = 0  # buffered windows already given
        self._buffer: list[NDArray[np.int32]] = []
        self._source = self._documents.state()  # where the buffered documents begin

    def next(self) -> tuple[NDArray[np.int32], int, int]:
        """Give the next window: its tokens, number and epoch.

        Raises:
            DataError: the corpus cannot be read or encoded, or a whole pass has no text.
        """
        self.epoch()
        self._used += 1
        number = self._first_index + self._count + self._used - 1
        return self._buffer[self._used - 1], number, self._epoch

    def epoch(self) -> int:
        """Give the pass of the next window; reads on where none is left.

        Raises:
            DataError: as `next`.
        """
        while self._used == len(self._buffer):
            self._fill()
        return self._epoch

    def _fill(self) -> None:
        self._count += len(self._buffer)
        self._used = 0
        self._source = self._documents.state()
        texts = list(islice(self._documents, _DOCUMENTS))
        if not texts:
            if not self._count:
                raise DataError(f"the corpus {self._corpus.name} holds no text")
            self._documents = DocumentStream(self._corpus)
            self._source = self._documents.state()
            self._epoch += 1
            self._count = 0
            self._buffer = []
            return
        with naming_documents(self._corpus):
            documents = self._encoder(texts)
        self._buffer = [ids[at : at + self._window] for ids in documents for at in range(0, len(ids), self._window)]

    def state(self) -> dict[str, Any]:
        """Give the place of the next window."""
        return {"source": self._source, "epoch": self._epoch, "count": self._count, "used": self._used}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self._documents = DocumentStream(self._corpus, state["source"])
        self._corpus = self._documents.corpus
        self._source = state["source"]
        self._epoch, self._count, self._buffer = state["epoch"], state["count"], []
        if state["used"]:
            self._fill()
            self._used = state["used"]


@dataclass(frozen=True)
class _Block:
    state: dict[str, Any]  # before it was drawn
    index: Ints
    tokens: list[NDArray[np.int32]]
    plan: Plan
    ends: Ints


class StreamBatches(IterableDataset[dict[str, Any]]):
    """The batches of a run over streamed corpora, without an end.

    Every process and worker reads the whole stream and keeps its own batches, so that a batch does not depend
    on how many there are. Each batch carries a `state`; `load_state` of the last batch that was used, in as
    many or another number of processes and workers, goes on with the next.

    Args:
        corpora: what to read.
        stages: first step of each stage and its weights, as for `CorpusOrder`; by tokens.
        tokenizer: makes ids of text.
        mixture: the denoisers.
        budget: what a batch holds.
        form: the layout of a batch.
        window: raw tokens of a full window.
        seed: decides masks and the order within a block.
        batches_per_step: batches of an optimiser step, over all processes, by which stages are told.

    Raises:
        ValueError: several corpora and no weights.
    """

    def __init__(
        self,
        corpora: Sequence[CorpusOptions],
        stages: Sequence[tuple[int, Sequence[float] | None]],
        tokenizer: PreTrainedTokenizerBase,
        mixture: Mixture,
        budget: Budget,
        form: Form,
        window: int,
        seed: int,
        batches_per_step: int = 1,
    ) -> None:
        if len(corpora) > 1 and stages[0][1] is None:
            raise ValueError("several streamed corpora need weights: a stream does not tell its size")
        self._corpora = list(corpora)
        self._stages = [(step, list(weights or [1.0])) for step, weights in stages]
        self._tokenizer = tokenizer
        self.mixture = mixture
        self.budget = budget
        self.form = form
        self.window = window
        self._seed = seed
        self._batches_per_step = batches_per_step
        self._state: dict[str, Any] | None = None
        self.process, self.processes = 0, 1

    def load_state(self, state: dict[str, Any]) -> None:
        """Begin behind the batch that carried `state`; before iterating."""
        self._state = state

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield this process's and worker's batches, as `BatchDataset` gives them, and the `state` after
        each.
        """
        worker = torch.utils.data.get_worker_info()
        workers, own = (worker.num_workers, worker.id) if worker else (1, 0)
        for n, (gathered, state) in enumerate(self.gathered()):
            if n % self.processes == self.process and n // self.processes % workers == own:
                yield {**build_batch(self.mixture, self.budget, self.form, gathered), "state": state}

    def gathered(self) -> Iterator[tuple[Gathered, dict[str, Any]]]:
        """Yield the windows of every batch, before they are denoised, and the state after it."""
        encoder = Encoder(self._tokenizer, self.mixture.ids)
        sources = [WindowStream(c, encoder, self.window, i * _APART) for i, c in enumerate(self._corpora)]
        number = bins_done = batches = step = 0
        if self._state is not None:
            for source, its_state in zip(sources, self._state["sources"], strict=True):
                source.load_state(its_state)
            number, step, bins_done, batches = (self._state[k] for k in ("block", "step", "bins_done", "batches"))
        parts: list[tuple[_Block, slice]] = []
        missing = self.budget.bins
        while True:
            block = self._draw(sources, number, step)
            while bins_done < len(block.ends):
                stop = min(bins_done + missing, len(block.ends))
                begin = int(block.ends[bins_done - 1]) if bins_done else 0
                parts.append((block, slice(begin, int(block.ends[stop - 1]))))
                missing -= stop - bins_done
                bins_done = stop
                if not missing:
                    batches += 1
                    yield _gather(parts), {**block.state, "bins_done": bins_done, "batches": batches}
                    parts, missing = [], self.budget.bins
            number += 1
            bins_done = 0
            step = batches // self._batches_per_step

    def _draw(self, sources: list[WindowStream], number: int, step: int) -> _Block:
        state = {"sources": [s.state() for s in sources], "block": number, "step": step}
        weights = next(w for first, w in reversed(self._stages) if first <= step)
        tokens = [0.0] * len(sources)
        drawn: list[tuple[NDArray[np.int32], int, int]] = []
        while len(drawn) < self.budget.block:
            # What is drawn is shuffled: a pass of the only corpus ends first. Of several, none tells how long it is.
            if len(sources) == 1 and drawn and sources[0].epoch() != drawn[-1][2]:
                break
            # The next window is of the corpus whose tokens are furthest behind its weight.
            which = min((t / w, i) for i, (t, w) in enumerate(zip(tokens, weights, strict=True)) if w)[1]
            drawn.append(sources[which].next())
            tokens[which] += len(drawn[-1][0])
        index = np.array([i for _, i, _ in drawn], dtype=np.int64)
        epoch = np.array([e for _, _, e in drawn], dtype=np.int64)
        lengths = np.array([len(ids) for ids, _, _ in drawn], dtype=np.int64)
        order, plan, ends = pack_block(self.mixture, self.budget, self._seed, number, index, epoch, lengths)
        return _Block(state, index[order], [drawn[i][0] for i in order.tolist()], plan, ends)


def _gather(parts: list[tuple[_Block, slice]]) -> Gathered:
    return Gathered(
        tokens=[ids for block, part in parts for ids in block.tokens[part]],
        index=np.concatenate([block.index[part] for block, part in parts]),
        plan=join([block.plan.take(np.arange(part.start, part.stop)) for block, part in parts]),
        sizes=np.concatenate([bin_sizes(block.ends, part) for block, part in parts]),
    )
