"""From a recipe's data, mixture and evaluation sections to what the trainer reads."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedTokenizerBase

from fat5.data import DenoisingCollator, Mixture, WindowDataset
from fat5.data.batches import BatchDataset
from fat5.data.setup import open_mixture, open_windows, streamed_batches, training_batches
from fat5.data.stream import StreamBatches
from fat5.train.errors import TrainingError
from fat5.train.options import EvaluationOptions
from fat5.train.recipe import Recipe

_SHOWN_TOKENS = 24


@dataclass(frozen=True)
class RunData:
    """The examples of a run and how they are corrupted.

    Attributes:
        mixture: the denoisers and the special ids.
        batches: all batches of the run, in order; those of streamed corpora without an end.
        held_out: the windows that are evaluated on; None without evaluation corpora.
        held_out_collator: makes batches of them; its seed is the evaluation's own, so that the masks are always the
            same.
    """

    mixture: Mixture
    batches: BatchDataset | StreamBatches
    held_out: Any | None
    held_out_collator: DenoisingCollator

    @property
    def denoisers(self) -> list[str]:
        """The denoisers' names as they appear in the log, `[R] span mu=3 r=0.15` as `R-span-mu3-r0.15`."""
        return [name.translate(str.maketrans(" ", "-", "[]=")) for name in self.mixture.names]

    def describe(self, number: int, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
        """Say which examples batch `number` holds: its number, theirs, and how each begins. Not of streamed corpora."""
        assert isinstance(self.batches, BatchDataset), "streamed batches have no numbers"
        gathered = self.batches.gather(number)
        return [
            {"batch": number, "example": index, "text": tokenizer.decode(tokens[:_SHOWN_TOKENS].tolist())}
            for index, tokens in zip(gathered.index.tolist(), gathered.tokens, strict=True)
        ]


def load_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, embedding_rows: int, batches_per_step: int
) -> RunData:
    """Tokenise the corpora, or find them tokenised, and lay out the run.

    Args:
        recipe: what to read and how to corrupt it.
        tokenizer: the model's.
        embedding_rows: rows of the model's embedding.
        batches_per_step: forward passes of a step, over all processes.

    Raises:
        TrainingError: a corpus cannot be read, or tokenizer, mixture and lengths do not go together.
    """
    options, training = recipe.data, recipe.training
    sizes = {"batch_size": training.micro_batch_size, "batches_per_step": batches_per_step, "seed": training.seed}
    batches: BatchDataset | StreamBatches
    try:
        mixture = open_mixture(options, recipe.mixture, tokenizer, embedding_rows)
        if mixture.ids.vocabulary > embedding_rows:
            raise ValueError(
                f"the tokenizer in model.path {recipe.model.path} has {mixture.ids.vocabulary} ids, and the model "
                f"{embedding_rows} embedding rows: it is another model's, or was given tokens that the model was not; "
                "`fat5 train-tokenizer --extend` gives both"
            )
        if options.train[0].streaming:
            batches = streamed_batches(options, mixture, tokenizer, **sizes)
            window = batches.window
        else:
            windows = open_windows(options.train, options, mixture, tokenizer)
            batches = training_batches(options, windows, mixture, steps=training.steps, **sizes)
            window = windows.window
        held_out = None
        if options.evaluation:
            held_out = _chosen(open_windows(options.evaluation, options, mixture, tokenizer, window), recipe.evaluation)
    except ValueError as error:  # DataError among them; each says what to change
        raise TrainingError(str(error)) from error
    return RunData(mixture, batches, held_out, DenoisingCollator(mixture, recipe.evaluation.seed))


def _chosen(windows: WindowDataset, options: EvaluationOptions) -> Dataset[Any]:
    """Take as many held-out windows as the recipe wants, spread at random over the corpora, always the same."""
    if options.examples is None or options.examples >= len(windows):
        return windows
    chosen = np.random.default_rng(options.seed).choice(len(windows), options.examples, replace=False)
    return Subset(windows, np.sort(chosen).tolist())
