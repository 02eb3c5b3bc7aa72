"""The optimizer and the schedule that a recipe names."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainingArguments, get_scheduler

from fat5.optim import AdamWScale, WarmupStableDecay
from fat5.optim.adamw_scale import Rounding
from fat5.train.errors import TrainingError
from fat5.train.options import TrainingOptions

_ROUNDINGS: dict[str, Rounding] = {"bf16_kahan": "kahan", "bf16_stochastic": "stochastic"}


def own_optimizer(training: TrainingOptions) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """Give class and arguments of an optimizer of FAT5; None for one of `transformers`, which `Trainer` makes."""
    if training.optimizer != "adamw_scale":
        return None
    return AdamWScale, {
        "lr": training.learning_rate,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
        "rounding": _ROUNDINGS.get(training.precision, "nearest"),
        "seed": training.seed,
    }


def require_optimizer(training: TrainingOptions, args: TrainingArguments) -> None:
    """Try an optimizer of `transformers` out, which may need a package that is not installed.

    Raises:
        TrainingError: it cannot be made.
    """
    if own_optimizer(training) is not None:
        return
    from transformers import Trainer

    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        raise TrainingError(f"training.optimizer {training.optimizer}: {error}") from error


def make_schedule(training: TrainingOptions, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Make the schedule of a run.

    Raises:
        TrainingError: its options do not fit.
    """
    warmup, steps, options = training.warmup_steps, training.steps, training.schedule_options
    try:
        if training.schedule == "wsd":
            factor = WarmupStableDecay(steps, warmup, **options)
            # A plain function: of another callable LambdaLR would save the attributes, and put them back over those of
            # a run that has been extended.
            return LambdaLR(optimizer, lambda step: factor(step))
        return get_scheduler(training.schedule, optimizer, warmup, steps, options)
    except (TypeError, ValueError) as error:
        raise TrainingError(f"training.schedule_options do not fit schedule {training.schedule}: {error}") from error


def rates(training: TrainingOptions) -> Callable[[int], float]:
    """Give the learning rate as a function of the step.

    Raises:
        TrainingError: the schedule's options do not fit.
    """
    schedule: Any = make_schedule(training, torch.optim.SGD([torch.zeros(1)], lr=training.learning_rate))
    [factor] = schedule.lr_lambdas
    return lambda step: training.learning_rate * factor(step)


def require_same_rates(before: TrainingOptions, after: TrainingOptions, steps: int) -> None:
    """Refuse another schedule if it would have had other learning rates in the steps already done.

    Raises:
        TrainingError: it would have.
    """
    old, new = rates(before), rates(after)
    differing = next((step for step in range(steps + 1) if old(step) != new(step)), None)
    if differing is not None:
        raise TrainingError(
            f"with training.steps {after.steps} and schedule {after.schedule} {after.schedule_options or ''} the "
            f"learning rate of step {differing + 1} would have been {new(differing):.4g}; the run, which is at step "
            f"{steps}, had {old(differing):.4g} there. A run that may be extended takes schedule wsd (from before its "
            "decay, or with the decay's end in schedule_options.earlier_ends); else start a new run from its model"
        )
