"""The held-out loss, over all denoisers together and for each one."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Forward = Callable[[Mapping[str, Tensor]], Tensor]
Columns = tuple[Tensor, Tensor, Tensor]
Gather = Callable[[Columns], Columns]


def example_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the cross-entropy over each example's targets.

    Args:
        logits: [B, L, V], any floating dtype; the softmax is taken in fp32.
        labels: [B, L] int64, -100 where there is no target.

    Returns:
        The summed loss in nats [B] and the number of targets [B], both fp64.
    """
    per_token = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")  # 0 at -100
    return per_token.view_as(labels).double().sum(1), (labels != -100).sum(1).double()


def mean_and_error(losses: Tensor, targets: Tensor) -> tuple[float, float | None]:
    """Return the mean loss per target and its standard error, with whole examples as the independent draws.

    The mean R = sum(l_i) / sum(t_i) is a ratio of two random sums; its error is the usual linearised one
    (Cochran, Sampling Techniques, 3rd ed., chapter 6): sqrt(n / (n-1) * sum((l_i - R t_i)^2)) / sum(t_i).
    One example gives no estimate of it: None.
    """
    n, total = len(losses), targets.sum()
    mean = losses.sum() / total
    if n == 1:
        return mean.item(), None
    spread = (losses - mean * targets).square().sum()
    return mean.item(), ((spread * n / (n - 1)).sqrt() / total).item()


def summarise(losses: Tensor, targets: Tensor, denoiser: Tensor, names: Sequence[str], prefix: str) -> dict[str, float]:
    """Give the figures to log: `{prefix}_loss` over all, `{prefix}_{denoiser}_loss`, their errors (`_se`).

    Args:
        losses: [N] summed loss of each example, nats.
        targets: [N] number of targets of each.
        denoiser: [N] which of `names` corrupted each. A denoiser that corrupted none is left out.
        names: the denoisers, in the order of their ids.
        prefix: what the names of the figures begin with.
    """
    everything = torch.ones_like(denoiser, dtype=torch.bool)
    groups = {f"{prefix}_loss": everything}
    for i, name in enumerate(names):  # denoisers of one name do the same thing, and are one group
        key = f"{prefix}_{name}_loss"
        groups[key] = groups.get(key, torch.zeros_like(everything)) | (denoiser == i)
    figures: dict[str, float] = {}
    for key, its in groups.items():
        if its.any():
            figures[key], error = mean_and_error(losses[its], targets[its])
            if error is not None:
                figures[f"{key}_se"] = error
    return figures


@torch.no_grad()
def measure(
    forward: Forward, batches: Iterable[Mapping[str, Tensor]], gather: Gather = lambda columns: columns
) -> Columns:
    """Run over the held-out batches.

    Args:
        forward: batch to logits [B, L, V].
        batches: what the collator makes, `denoiser` included.
        gather: collects a batch's columns from all processes.

    Returns:
        For each example its summed loss and number of targets (fp64) and its denoiser (int64).
    """
    columns = []
    for batch in batches:
        losses, targets = example_losses(forward(batch), batch["labels"])
        columns.append(gather((losses, targets, batch["denoiser"])))
    losses, targets, denoiser = (torch.cat(column) for column in zip(*columns, strict=True))
    return losses, targets, denoiser
