"""From a recipe's data and mixture sections to training batches."""

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fat5.data.batches import BatchDataset
from fat5.data.corpus_order import CorpusOrder
from fat5.data.documents import read_documents
from fat5.data.encode import Encoder
from fat5.data.hub_revision import pinned
from fat5.data.options import CorpusOptions, DataOptions, MixtureOptions
from fat5.data.schedule import Budget, Schedule
from fat5.data.span_corruption import Mixture
from fat5.data.special_ids import special_ids
from fat5.data.stream import StreamBatches
from fat5.data.token_store import TokenStore, tokenize_corpus
from fat5.data.window_length import checked_window, stored_documents, streamed_documents, window_that_packs
from fat5.data.windows import WindowDataset

# Examples that are packed together; more for large batches, as the last one of a block is only partly filled.
_BLOCK = 8192
_BLOCK_OF_ROWS = 256


def open_mixture(
    options: DataOptions, mixture: MixtureOptions, tokenizer: PreTrainedTokenizerBase, embedding_rows: int | None
) -> Mixture:
    """Resolve a recipe's mixture for a tokenizer and a model.

    Raises:
        ValueError: tokenizer and mixture do not go together.
    """
    denoisers = mixture.resolved()
    ids = special_ids(tokenizer, denoisers, embedding_rows, options.sentinels)
    return Mixture(denoisers, ids, mixture.random_roll)


def open_windows(
    corpora: tuple[CorpusOptions, ...],
    options: DataOptions,
    mixture: Mixture,
    tokenizer: PreTrainedTokenizerBase,
    window: int | None = None,
) -> WindowDataset:
    """Tokenise corpora, or find them tokenised, and cut them into windows.

    Args:
        corpora: of the recipe, for training or for evaluation.
        options: the recipe's data section.
        mixture: the denoisers.
        tokenizer: makes ids of text.
        window: raw tokens of a window; None decides by `options` and these corpora. Held-out text takes the training
            text's.

    Raises:
        ValueError: a corpus cannot be read (`DataError`), or the window does not fit.
    """
    cache = None if options.cache is None else Path(options.cache).expanduser()
    stores = [tokenize_corpus(corpus, tokenizer, mixture.ids, cache) for corpus in corpora]
    return WindowDataset(stores, window or _window(stores, options, mixture))


def _window(stores: list[TokenStore], options: DataOptions, mixture: Mixture) -> int:
    lengths = options.max_input_length, options.max_target_length
    if options.window is None and options.packing == "segments":
        return window_that_packs(stored_documents(stores), mixture, *lengths)
    return checked_window(mixture, options.window, *lengths)


def batch_budget(options: DataOptions, batch_size: int) -> Budget:
    """Give what a batch of `batch_size` rows holds.

    A `stream` has no rows: its one bin has as many tokens as the rows would.
    """
    stream = options.packing == "stream"
    rows = batch_size if stream else 1
    return Budget(
        bins=1 if stream else batch_size,
        inputs=rows * options.max_input_length,
        labels=rows * options.max_target_length,
        packed=options.packing != "none",
        block=max(_BLOCK, _BLOCK_OF_ROWS * rows),
    )


def training_batches(
    options: DataOptions,
    windows: WindowDataset,
    mixture: Mixture,
    *,
    batch_size: int,
    batches_per_step: int,
    steps: int,
    seed: int,
) -> BatchDataset:
    """Lay out all batches of a run.

    Args:
        options: the recipe's data section.
        windows: the training corpora, as `open_windows` gives them.
        mixture: the denoisers.
        batch_size: rows of a batch (one forward pass of one process).
        batches_per_step: batches of an optimiser step, over accumulation and processes.
        steps: optimiser steps of the run.
        seed: decides order and masks.
    """
    order = CorpusOrder(windows, options.weights(), seed)
    budget = batch_budget(options, batch_size)
    schedule = Schedule(windows, order, mixture, budget, seed, batches_per_step)
    return BatchDataset(schedule, options.packing, steps * batches_per_step)


def streamed_batches(
    options: DataOptions,
    mixture: Mixture,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    batches_per_step: int,
    seed: int,
) -> StreamBatches:
    """Read the training corpora as streams; as `training_batches`, without an end.

    A data set of the Hub is read in the commit that it has now, in every pass.

    Raises:
        ValueError: several corpora without weights, or the window does not fit.
    """
    lengths = options.max_input_length, options.max_target_length
    options = replace(options, train=tuple(map(pinned, options.train)))
    if options.window is None and options.packing == "segments":
        documents = streamed_documents(options.train, Encoder(tokenizer, mixture.ids))
        window = window_that_packs(documents, mixture, *lengths)
    else:
        window = checked_window(mixture, options.window, *lengths)
    batches = StreamBatches(
        options.train,
        options.weights(),
        tokenizer,
        mixture,
        batch_budget(options, batch_size),
        options.packing,
        window,
        seed,
        batches_per_step,
    )
    for corpus in options.train:
        next(read_documents(corpus), None)  # a corpus that is not there is told now, not in the middle of a run
    return batches
