"""Collate raw windows into a denoised, padded batch."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fat5.data import layout
from fat5.data.batches import check_text
from fat5.data.random_streams import example_keys
from fat5.data.span_corruption import Mixture
from fat5.data.windows import Window


class DenoisingCollator:
    """Denoise raw windows and pad the batch to its longest input and target.

    What an example becomes depends on (seed, epoch, index) alone. Picklable, for the workers of a DataLoader.

    Args:
        mixture: the denoisers and special ids.
        seed: the seed of all masks.
        denoiser: index into the mixture that every example gets, instead of a draw (evaluation per denoiser).
    """

    def __init__(self, mixture: Mixture, seed: int = 0, denoiser: int | None = None) -> None:
        self.mixture = mixture
        self.seed = seed
        self.denoiser = denoiser

    def __call__(self, examples: Sequence[Window]) -> dict[str, Tensor]:
        """Make a batch.

        Returns:
            `input_ids` [B, Le] int64; `attention_mask` [B, Le] int64; `labels` [B, Ld] int64, padded with
            -100; `denoiser` [B] int64, index into `mixture.denoisers`.

        Raises:
            DataError: a window holds an id outside the vocabulary, or a special id; the message names its
                index.
        """
        index = np.array([e["index"] for e in examples], dtype=np.int64)
        epoch = np.array([e["epoch"] for e in examples], dtype=np.int64)
        tokens = [np.asarray(e["input_ids"]) for e in examples]
        check_text(tokens, index, self.mixture)
        lengths = np.array([len(t) for t in tokens], dtype=np.int64)
        chosen = None if self.denoiser is None else np.full(len(tokens), self.denoiser)
        plan = self.mixture.plan(example_keys(self.seed, epoch, index), lengths, chosen)
        inputs, labels = self.mixture.corrupt(tokens, plan)
        batch = layout.padded(inputs, plan.input_lengths, labels, plan.label_lengths, self.mixture.ids.pad)
        batch["denoiser"] = torch.from_numpy(plan.denoiser)
        return batch
