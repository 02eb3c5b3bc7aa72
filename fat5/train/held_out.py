"""The held-out loss and accuracy, over all denoisers together and for each one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Forward = Callable[[Mapping[str, Tensor]], Tensor]
Columns = tuple[Tensor, ...]
Gather = Callable[[Columns], Columns]


@dataclass(frozen=True)
class Examples:
    """What the held-out examples came to.

    Attributes:
        losses: [N] summed loss of each, nats.
        targets: [N] number of targets of each.
        correct: [N] targets to which the model gave the highest probability.
        z: [N] sum over the targets of log²(Z), Z the sum of the exponentials that the softmax divides by: the z-loss of
            Mesh TensorFlow and PaLM, without its coefficient.
        denoiser: [N] int64, which denoiser corrupted each. The others are fp64.
    """

    losses: Tensor
    targets: Tensor
    correct: Tensor
    z: Tensor
    denoiser: Tensor

    def of(self, chosen: Tensor) -> "Examples":
        """Take some of the examples."""
        return Examples(*(column[chosen] for column in self.columns))

    @property
    def columns(self) -> Columns:
        """All columns, in order."""
        return self.losses, self.targets, self.correct, self.z, self.denoiser


def example_sums(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum over each example's targets.

    Args:
        logits: [B, L, V], any floating dtype; the softmax is taken in fp32.
        labels: [B, L] int64, -100 where there is no target.

    Returns:
        Loss in nats, number of targets, correct ones, and log²(Z); each [B] fp64.
    """
    real = labels != -100
    precise = logits.float()
    per_token = F.cross_entropy(precise.flatten(0, 1), labels.flatten(), reduction="none")  # 0 at -100
    z = precise.logsumexp(-1).square().masked_fill(~real, 0)
    correct = (logits.argmax(-1) == labels) & real
    sums = [per_token.view_as(labels), real, correct, z]
    loss, targets, right, squares = (x.double().sum(1) for x in sums)
    return loss, targets, right, squares


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


def summarise(examples: Examples, names: Sequence[str], prefix: str) -> dict[str, float]:
    """Give the figures to log.

    `{prefix}_loss` over all and `{prefix}_{denoiser}_loss`, their standard errors (`_se`), `..._accuracy` likewise
    (share of the targets), and `{prefix}_log_z_squared`, the mean over all targets.

    Args:
        examples: all of them.
        names: the denoisers, in the order of their ids; one that corrupted no example is left out.
        prefix: what the names of the figures begin with.
    """
    denoiser = examples.denoiser
    groups = {prefix: torch.ones_like(denoiser, dtype=torch.bool)}
    for i, name in enumerate(names):  # denoisers of one name do the same thing, and are one group
        key = f"{prefix}_{name}"
        groups[key] = groups.get(key, torch.zeros_like(denoiser, dtype=torch.bool)) | (denoiser == i)
    figures: dict[str, float] = {}
    for key, chosen in groups.items():
        if chosen.any():
            its = examples.of(chosen)
            figures[f"{key}_loss"], error = mean_and_error(its.losses, its.targets)
            if error is not None:
                figures[f"{key}_loss_se"] = error
            figures[f"{key}_accuracy"] = (its.correct.sum() / its.targets.sum()).item()
    figures[f"{prefix}_log_z_squared"] = (examples.z.sum() / examples.targets.sum()).item()
    return figures


@torch.no_grad()
def measure(
    forward: Forward, batches: Iterable[Mapping[str, Tensor]], gather: Gather = lambda columns: columns
) -> Examples:
    """Run over the held-out batches.

    Args:
        forward: batch to logits [B, L, V].
        batches: what the collator makes, `denoiser` included.
        gather: collects a batch's columns from all processes.
    """
    columns = []
    for batch in batches:
        sums = example_sums(forward(batch), batch["labels"])
        columns.append(gather((*sums, batch["denoiser"])))
    return Examples(*(torch.cat(column) for column in zip(*columns, strict=True)))
