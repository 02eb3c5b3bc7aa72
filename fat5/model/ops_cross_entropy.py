"""Cross-entropy on logits that are at hand: the public function, its reference and its operator."""

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from .ops_attention import kernels_serve
from .ops_attention_checks import DTYPES
from .ops_operator import is_transformed, on_its_device

try:
    import triton  # noqa: F401  (named here so that the loader of remote code sees a guarded import)

    from .ops_cross_entropy_kernels import Rows, launch_gradient, launch_loss
except ImportError:
    pass


class CrossEntropy(NamedTuple):
    """What cross-entropy gives, as fp32 tensors on the device; none waits for it.

    Attributes:
        loss: with its share of z-loss; the one to differentiate. A scalar, or `[...]` without reduction.
        z_loss: that share, detached, reduced likewise.
        accuracy: share of the labels whose logit is the largest, or without reduction 1 for each such label.
    """

    loss: torch.Tensor
    z_loss: torch.Tensor
    accuracy: torch.Tensor


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: torch.Tensor | int | None = None,
) -> CrossEntropy:
    """Cross-entropy with z-loss, computed in fp32 without a copy of the logits.

    Args:
        logits: `[..., V]`, one of bf16, fp16, fp32 for the kernels.
        labels: ints `[...]`. On the kernels one outside the vocabulary makes the loss NaN.
        z_loss: factor on the squared log-sum-exp that is added to each label's loss.
        label_smoothing: share of the target that is spread over the vocabulary.
        ignore_index: labels that count for nothing. Without any other, loss and gradients are 0. As in torch, though,
            the gradients are NaN where the log-sum-exp of such a row is not finite.
        reduction: "sum", "none", or "mean": the sum divided by `num_items`.
        num_items: None for the number of labels that are not ignored.

    Raises:
        ValueError: shapes or options that do not fit together.

    Sources: label smoothing of Szegedy et al. 2015 (arXiv:1512.00567), z-loss of Mesh TensorFlow (Chowdhery et al.
    2022, arXiv:2204.02311, section 5).
    """
    check_options(labels, logits.shape[:-1], z_loss, label_smoothing, reduction)
    flat, targets = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).to(logits.device)
    if logits.dtype in DTYPES and kernels_serve(logits.device) and not is_transformed():
        rows = torch.ops.fat5.cross_entropy_forward(flat, targets, ignore_index, z_loss, label_smoothing)[:3]
    else:
        rows = reference_rows(flat, targets, ignore_index, z_loss, label_smoothing)
    if reduction == "none":
        return CrossEntropy(rows[0].view(labels.shape), *(x.detach().view(labels.shape) for x in rows[1:]))
    return reduce((rows[0].sum(), rows[1].sum(), rows[2].sum()), targets, ignore_index, reduction, num_items)


def check_options(
    labels: torch.Tensor, shape: torch.Size, z_loss: float, label_smoothing: float, reduction: str
) -> None:
    """Refuse what would be computed wrongly."""
    check_labels(labels, shape)
    if not 0 <= label_smoothing < 1 or z_loss < 0:
        raise ValueError(f"need 0 <= label_smoothing < 1 and z_loss >= 0: got {label_smoothing}, {z_loss}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none': got {reduction!r}")


def check_labels(labels: torch.Tensor, shape: torch.Size) -> None:
    """Refuse labels that are not one for each row."""
    if labels.shape != shape or labels.is_floating_point():
        raise ValueError(
            f"labels must be ints {list(shape)}, one for each row: got {labels.dtype} {list(labels.shape)}"
        )


def reduce(
    sums: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    labels: torch.Tensor,
    ignore_index: int,
    reduction: str,
    num_items: torch.Tensor | int | None,
) -> CrossEntropy:
    """Sums of loss, z-loss and right predictions, divided as `cross_entropy` says."""
    loss, z, correct = sums
    labelled = (labels != ignore_index).sum()
    count = labelled.clamp(min=1)
    if reduction == "mean":
        items = num_items.to(loss.device) if isinstance(num_items, torch.Tensor) else num_items
        divisor = count if items is None else torch.where(labelled > 0, items, 1)  # without labels the items may be 0
        loss, z = loss / divisor, z / divisor
    return CrossEntropy(loss, z.detach(), correct.detach() / count)


def reference_rows(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, z_loss: float, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, z-loss and right predictions of each row in plain torch, in fp32 or better. Differentiable by autograd."""
    logits, labels = logits.to(torch.promote_types(logits.dtype, torch.float32)), labels.long()
    counts = labels != ignore_index
    loss = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none", label_smoothing=smoothing)
    z = torch.where(counts, z_loss * logits.logsumexp(-1).square(), 0.0)
    target = logits.gather(-1, labels.where(counts, 0)[:, None])[:, 0]
    correct = counts & (target >= logits.amax(-1))
    return loss + z, z, correct.to(logits.dtype)


def new_rows(like: torch.Tensor, count: int) -> "Rows":
    """Room for the results of `count` rows."""
    shapes = ((count,), (count,), (count,), (count, 2))
    return Rows(*(torch.empty(shape, dtype=torch.float32, device=like.device) for shape in shapes))


def row_shapes(like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same for the operators' shape functions, which run where there is no Triton."""
    shapes = ((), (), (), (2,))
    return tuple(like.new_empty((like.shape[0], *shape), dtype=torch.float32) for shape in shapes)


@torch.library.custom_op("fat5::cross_entropy_forward", mutates_args=())
@on_its_device
def cross_entropy_forward(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, z_loss: float, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, z-loss, right predictions, fp32 `[T]`, and log-sum-exp `[T, 2]` of logits `[T, V]`."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    rows = new_rows(logits, logits.shape[0])
    launch_loss(logits, labels.contiguous(), rows, ignore_index, z_loss, smoothing)
    return rows.loss, rows.z_loss, rows.correct, rows.lse


@cross_entropy_forward.register_fake
def _forward_shapes(logits: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return row_shapes(logits)


@torch.library.custom_op("fat5::cross_entropy_backward", mutates_args=())
@on_its_device
def cross_entropy_backward(
    drow: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    z_loss: float,
    smoothing: float,
) -> torch.Tensor:
    """Gradient of the logits, contiguous, for `drow` `[T]`, that of the losses."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    launch_gradient(logits, labels.contiguous(), lse, drow, out, ignore_index, z_loss, smoothing)
    return out


@cross_entropy_backward.register_fake
def _backward_shape(drow: torch.Tensor, logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return logits.new_empty(logits.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:2], output[3])
    ctx.options = inputs[2:]


def _backward(ctx: Any, drow: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    logits, labels, lse = ctx.saved_tensors
    return torch.ops.fat5.cross_entropy_backward(drow, logits, labels, lse, *ctx.options), *[None] * 4


cross_entropy_forward.register_autograd(_backward, setup_context=_save_for_backward)
