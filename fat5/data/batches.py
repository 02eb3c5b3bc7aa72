"""The training batches of a run, as a map-style torch dataset of whole batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from fat5.data import layout
from fat5.data.documents import DataError
from fat5.data.schedule import Budget, Schedule
from fat5.data.span_corruption import Mixture, Plan

Form = Literal["none", "segments", "stream"]
Ints = NDArray[np.int64]
Batch = dict[str, Any]
"""Tensors by name, and in a stream two ints."""


class BatchDataset(Dataset[Batch]):
    """Batch number -> batch, each built on demand: any worker, process or resumed run gets the same one.

    Give it to a `DataLoader` with `batch_size=None`; with several processes, process p of P takes the batches
    p, p + P, p + 2 P, ...

    Args:
        schedule: which examples each batch holds.
        form: `none` (padded rows, one example each), `segments` or `stream`; see `fat5.data.layout`.
        total: number of batches.
    """

    def __init__(self, schedule: Schedule, form: Form, total: int) -> None:
        self.schedule = schedule
        self.form = form
        self.total = total

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, number: int) -> Batch:
        """Build a batch.

        Returns:
            What `fat5.data.layout` says for the form, and `denoiser` [N] int64: the denoiser of every
            example, in the order of rows and segments.

        Raises:
            DataError: the corpus holds an id that is not text.
        """
        schedule = self.schedule
        return build_batch(schedule.mixture, schedule.budget, self.form, self.gather(number))

    def gather(self, number: int) -> "Gathered":
        """Give the windows of a batch before they are denoised."""
        if not 0 <= number < self.total:
            raise IndexError(f"batch {number} of {self.total}")
        parts = self.schedule.batch(number)
        index = np.concatenate([block.index[part] for block, part in parts])
        return Gathered(
            tokens=self.schedule.windows.tokens(index),
            index=index,
            plan=join([block.plan.take(np.arange(part.start, part.stop)) for block, part in parts]),
            sizes=np.concatenate([bin_sizes(block.ends, part) for block, part in parts]),
        )


@dataclass(frozen=True)
class Gathered:
    """The N windows of a batch, ordered by bin.

    Attributes:
        tokens: their raw tokens.
        index: [N] their numbers in the data set, for messages.
        plan: what is to be done to them.
        sizes: [bins] how many of them each bin has.
    """

    tokens: Sequence[NDArray[np.integer]]
    index: Ints
    plan: Plan
    sizes: Ints


def build_batch(mixture: Mixture, budget: Budget, form: Form, gathered: Gathered) -> Batch:
    """Denoise windows and lay them out.

    Args:
        mixture: the denoisers.
        budget: the width of a row of segments.
        form: the layout.
        gathered: the windows.

    Returns:
        As `BatchDataset`.
    """
    check_text(gathered.tokens, gathered.index, mixture)
    plan = gathered.plan
    inputs, labels = mixture.corrupt(gathered.tokens, plan)
    lengths = plan.input_lengths, plan.label_lengths
    batch: Batch
    if form == "stream":
        batch = layout.stream(inputs, lengths[0], labels, lengths[1])
    elif form == "segments":
        widths = budget.inputs, budget.labels
        batch = layout.segments(inputs, lengths[0], labels, lengths[1], gathered.sizes, *widths, mixture.ids.pad)
    else:
        batch = layout.padded(inputs, lengths[0], labels, lengths[1], mixture.ids.pad)
    batch["denoiser"] = torch.from_numpy(plan.denoiser)
    return batch


def check_text(tokens: Sequence[NDArray[np.integer]], index: Ints, mixture: Mixture) -> None:
    """Refuse ids that are no text.

    Raises:
        DataError: a window holds an id outside the vocabulary, or a special one; the message names it.
    """
    everything = np.concatenate(tokens)
    if not len(everything):
        return
    text = mixture.is_text
    if everything.min() >= 0 and everything.max() < len(text) and text[everything].all():
        return
    for n, window in zip(index.tolist(), tokens, strict=True):
        outside = (window < 0) | (window >= len(text))
        if outside.any():
            raise DataError(
                f"example {n} holds id {int(window[outside][0])}, outside the tokenizer's {len(text)} ids; was the"
                " corpus tokenised with another tokenizer?"
            )
        special = ~text[window]
        if special.any():
            raise DataError(
                f"example {n} holds the special id {int(window[special][0])} in its text; tokenise the corpus with"
                " `fat5 tokenize`, which encodes such text as ordinary characters"
            )


def bin_sizes(ends: Ints, part: slice) -> Ints:
    """Count the examples of each bin within a slice that begins and ends between bins."""
    inside = ends[(ends > part.start) & (ends <= part.stop)]
    return np.diff(inside, prepend=part.start)


def join(plans: list[Plan]) -> Plan:
    """Put plans one behind the other."""
    if len(plans) == 1:
        return plans[0]
    return Plan(**{name: np.concatenate([getattr(p, name) for p in plans]) for name in vars(plans[0])})
