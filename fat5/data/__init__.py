"""UL2 data: corpora in, denoised batches out.

A corpus is tokenised once into memory-mapped shards (`tokenize_corpus`), cut into raw windows
(`WindowDataset`), and denoised on the fly (`DenoisingCollator`), each example by a random stream of its own.
"""

from fat5.data.batches import BatchDataset
from fat5.data.collator import DenoisingCollator
from fat5.data.denoisers import MIXTURES, Denoiser
from fat5.data.documents import DataError
from fat5.data.options import CorpusOptions, DataOptions, MixtureOptions, StageOptions
from fat5.data.setup import open_mixture, open_windows, streamed_batches, training_batches
from fat5.data.span_corruption import Mixture
from fat5.data.special_ids import FAMILY_SENTINELS, SpecialIds, special_ids
from fat5.data.stream import StreamBatches
from fat5.data.token_store import TokenStore, tokenize_corpus
from fat5.data.window_length import checked_window, longest_window
from fat5.data.windows import Window, WindowDataset

__all__ = [
    "FAMILY_SENTINELS",
    "MIXTURES",
    "BatchDataset",
    "CorpusOptions",
    "DataError",
    "DataOptions",
    "Denoiser",
    "DenoisingCollator",
    "Mixture",
    "MixtureOptions",
    "SpecialIds",
    "StageOptions",
    "StreamBatches",
    "TokenStore",
    "Window",
    "WindowDataset",
    "checked_window",
    "longest_window",
    "open_mixture",
    "open_windows",
    "special_ids",
    "streamed_batches",
    "tokenize_corpus",
    "training_batches",
]
