"""What a run's batches hold: lengths, padding, noise, and the share of each denoiser."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fat5.data.batches import Form, Gathered, build_batch, join
from fat5.data.layout import IGNORED
from fat5.data.schedule import Budget
from fat5.data.span_corruption import Mixture


@dataclass(frozen=True)
class BatchStatistics:
    """Figures over some batches.

    Attributes:
        batches: how many.
        examples: examples in them.
        raw: [N] raw tokens of each example.
        inputs: [N] input tokens.
        labels: [N] target tokens.
        noise: [N] masked tokens.
        denoiser: [N] index into the mixture.
        input_padding: share of the encoder positions that are padding.
        label_padding: share of the decoder positions that are padding.
        budget_inputs: share of the encoder's token budget that is used (packed batches).
        budget_labels: share of the decoder's.
    """

    batches: int
    raw: NDArray[np.int64]
    inputs: NDArray[np.int64]
    labels: NDArray[np.int64]
    noise: NDArray[np.int64]
    denoiser: NDArray[np.int64]
    input_padding: float
    label_padding: float
    budget_inputs: float
    budget_labels: float

    @property
    def examples(self) -> int:
        """Number of examples."""
        return len(self.raw)


def measure_batches(mixture: Mixture, budget: Budget, form: Form, batches: Iterable[Gathered]) -> BatchStatistics:
    """Build batches and measure them."""
    plans = []
    positions, real = np.zeros(2), np.zeros(2)
    count = 0
    for gathered in batches:
        batch = build_batch(mixture, budget, form, gathered)
        plans.append(gathered.plan)
        count += 1
        positions += batch["input_ids"].numel(), batch["labels"].numel()
        real += gathered.plan.input_lengths.sum(), (batch["labels"] != IGNORED).sum().item()
    plan = join(plans)
    room = count * budget.bins * np.array([budget.inputs, budget.labels])
    padding, used = 1 - real / positions, real / room
    return BatchStatistics(
        batches=count,
        raw=plan.lengths,
        inputs=plan.input_lengths,
        labels=plan.label_lengths,
        noise=plan.noise,
        denoiser=plan.denoiser,
        input_padding=float(padding[0]),
        label_padding=float(padding[1]),
        budget_inputs=float(used[0]),
        budget_labels=float(used[1]),
    )
