"""Cross-entropy from hidden states and the head's weight, without a tensor of tokens times vocabulary.

Chunks of tokens, large enough that matrix products stay efficient: logits of a chunk, their loss, their gradient in
their place, and from it the gradients of hidden states and weight, all while forward runs; backward only scales them.
Three matrix products, as with all logits at once.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .ops_attention import kernels_serve
from .ops_attention_checks import DTYPES
from .ops_cross_entropy import CrossEntropy, check_options, new_rows, reduce, reference_rows, row_shapes
from .ops_operator import is_transformed, on_its_device

try:
    import triton  # noqa: F401  (named here so that the loader of remote code sees a guarded import)

    from .ops_cross_entropy_kernels import Rows, launch_gradient, launch_loss
except ImportError:
    pass

CHUNK_TOKENS = 2048
"""Tokens of a chunk: its logits take 125 MiB at T5's vocabulary and 1 GiB at mT5's, in 16 bits."""
FP16_FACTOR = 256.0
"""On gradients of logits where they are stored in fp16, at most about 1 and mostly below what it holds."""
ALIGNMENT = 64
"""Rows of logits begin at multiples of so many elements, whatever the vocabulary, for wide loads and stores."""


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: torch.Tensor | int | None = None,
) -> CrossEntropy:
    """`cross_entropy(logit_scale * hidden_states @ weight.T, labels)`, in the memory of a chunk of its logits.

    The weight's gradient is summed in fp32. With reduction "none" the logits are computed twice.

    Args:
        hidden_states: `[..., D]`, one of bf16, fp16, fp32 for the kernels.
        weight: of the head, `[V, D]`, in the same dtype. Under autocast both are cast to its.
        labels: ints `[...]`. On the kernels one outside the vocabulary makes the loss NaN.
        logit_scale: factor on the logits: `d_model**-0.5` for T5's tied head.
        z_loss, label_smoothing, ignore_index, reduction, num_items: as in `cross_entropy`.

    Raises:
        ValueError: shapes, dtypes or options that do not fit together.
    """
    device = hidden_states.device
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
    check_options(labels, hidden_states.shape[:-1], z_loss, label_smoothing, reduction)
    if weight.dim() != 2 or weight.shape[-1] != hidden_states.shape[-1] or weight.dtype != hidden_states.dtype:
        raise ValueError(
            f"the weight must be [V, {hidden_states.shape[-1]}] in {hidden_states.dtype}: got {list(weight.shape)} in "
            f"{weight.dtype}"
        )
    hidden, targets = hidden_states.reshape(-1, hidden_states.shape[-1]), labels.reshape(-1).to(device)
    options = (logit_scale, ignore_index, z_loss, label_smoothing)
    if not (hidden.dtype in DTYPES and kernels_serve(device)) or is_transformed():
        rows = reference_rows(F.linear(hidden, weight) * logit_scale, targets, *options[1:])
    elif reduction == "none":
        rows = torch.ops.fat5.linear_cross_entropy_rows(hidden, weight, targets, *options)[:3]
    else:
        learns = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
        sums = torch.ops.fat5.linear_cross_entropy_sum(hidden, weight, targets, *options, *learns)[:3]
        return reduce(sums, targets, ignore_index, reduction, num_items)
    if reduction == "none":
        return CrossEntropy(rows[0].view(labels.shape), *(x.detach().view(labels.shape) for x in rows[1:]))
    return reduce((rows[0].sum(), rows[1].sum(), rows[2].sum()), targets, ignore_index, reduction, num_items)


def _chunks(
    hidden: torch.Tensor, weight: torch.Tensor, logit_scale: float
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Rows of a chunk, its hidden states, and its scaled logits, in memory that the next chunk takes over."""
    tokens, vocab = hidden.shape[0], weight.shape[0]
    count = -(-tokens // CHUNK_TOKENS)
    size = min(tokens, ALIGNMENT * -(-tokens // (count * ALIGNMENT))) if count else 0
    pitch = ALIGNMENT * -(-vocab // ALIGNMENT)
    memory = torch.empty((size, pitch), dtype=hidden.dtype, device=hidden.device)[:, :vocab]
    for first in range(0, tokens, max(size, 1)):
        rows = slice(first, min(first + size, tokens))
        logits = memory[: rows.stop - first]
        torch.addmm(logits, hidden[rows], weight.t(), beta=0, alpha=logit_scale, out=logits)
        yield rows, hidden[rows], logits


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    """`total += a @ b`, or with `first` `total = a @ b`, in fp32 from the products to the sum."""
    if a.dtype == torch.float32 or total.device.type != "cuda":
        torch.addmm(total, a.float(), b.float(), beta=0 if first else 1, out=total)
    elif first:
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=total)
    else:
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)


def _stored_factor(dtype: torch.dtype, z_loss: float) -> float:
    """Factor on gradients of logits where they are stored in a dtype: a power of two that lets none overflow.

    Of the loss they are 1 at most, of the z-loss `2 * z_loss * lse`, whose log-sum-exp may be as large as a logit.
    """
    if dtype != torch.float16:
        return 1.0
    largest = torch.finfo(torch.float16).max
    return min(FP16_FACTOR, 2.0 ** math.floor(math.log2(largest / (1 + 2 * z_loss * largest))))


@torch.library.custom_op("fat5::linear_cross_entropy_sum", mutates_args=())
@on_its_device
def linear_cross_entropy_sum(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    logit_scale: float,
    ignore_index: int,
    z_loss: float,
    smoothing: float,
    hidden_learns: bool,
    weight_learns: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums of loss, z-loss and right predictions, fp32; gradients of the summed loss by `hidden` and, fp32, `weight`.

    `hidden` is `[T, D]`. A gradient that is not wanted is empty. Both are without their factor `logit_scale`, the
    weight's with `_stored_factor`: what is small in fp16 is to be multiplied by the scale of the loss first.
    """
    hidden, labels = hidden.contiguous(), labels.contiguous()
    results = new_rows(hidden, hidden.shape[0])
    dhidden = torch.empty(hidden.shape if hidden_learns else 0, dtype=hidden.dtype, device=hidden.device)
    allocate = torch.empty if hidden.shape[0] else torch.zeros
    dweight = allocate(weight.shape if weight_learns else 0, dtype=torch.float32, device=hidden.device)
    stored = _stored_factor(hidden.dtype, z_loss)
    factor = stored if hidden_learns or weight_learns else None
    for rows, states, logits in _chunks(hidden, weight, logit_scale):
        its = Rows(*(x[rows] for x in results))
        launch_loss(logits, labels[rows], its, ignore_index, z_loss, smoothing, factor)
        if hidden_learns:
            torch.addmm(dhidden[rows], logits, weight, beta=0, alpha=1 / stored, out=dhidden[rows])
        if weight_learns:
            _add_product(dweight, logits.t(), states, first=rows.start == 0)
    return results.loss.sum(), results.z_loss.sum(), results.correct.sum(), dhidden, dweight


@linear_cross_entropy_sum.register_fake
def _sum_shapes(hidden: torch.Tensor, weight: torch.Tensor, *options: Any) -> tuple[torch.Tensor, ...]:
    hidden_learns, weight_learns = options[-2:]
    return (
        *(hidden.new_empty((), dtype=torch.float32) for _ in range(3)),
        hidden.new_empty(hidden.shape if hidden_learns else 0),
        hidden.new_empty(weight.shape if weight_learns else 0, dtype=torch.float32),
    )


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*output[3:])
    ctx.dtype, ctx.logit_scale = inputs[0].dtype, inputs[3]
    ctx.stored = _stored_factor(ctx.dtype, inputs[5])
    ctx.learns = inputs[-2:]


def _scale_gradients(ctx: Any, dloss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if torch.is_grad_enabled():  # for derivatives of derivatives: those are refused, where otherwise they would be 0
        dloss = dloss.detach().requires_grad_()
    return _scaled_gradients(ctx, dloss)


@once_differentiable
def _scaled_gradients(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gradients: list[torch.Tensor | None] = []
    factors = ctx.logit_scale, ctx.logit_scale / ctx.stored
    for gradient, learns, factor in zip(ctx.saved_tensors, ctx.learns, factors, strict=True):
        scaled = gradient.new_empty(gradient.shape, dtype=ctx.dtype)
        # one dimension makes `dloss` count in fp32, and `out` saves a copy in fp32
        gradients.append(torch.mul(gradient, dloss.reshape(1) * factor, out=scaled) if learns else None)
    return *gradients, *[None] * 7


linear_cross_entropy_sum.register_autograd(_scale_gradients, setup_context=_save_gradients)


@torch.library.custom_op("fat5::linear_cross_entropy_rows", mutates_args=())
@on_its_device
def linear_cross_entropy_rows(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    logit_scale: float,
    ignore_index: int,
    z_loss: float,
    smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, z-loss, right predictions, fp32 `[T]`, and log-sum-exp `[T, 2]` of each row."""
    hidden, labels = hidden.contiguous(), labels.contiguous()
    results = new_rows(hidden, hidden.shape[0])
    for rows, _, logits in _chunks(hidden, weight, logit_scale):
        launch_loss(logits, labels[rows], Rows(*(x[rows] for x in results)), ignore_index, z_loss, smoothing)
    return results.loss, results.z_loss, results.correct, results.lse


@linear_cross_entropy_rows.register_fake
def _rows_shapes(hidden: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return row_shapes(hidden)


@torch.library.custom_op("fat5::linear_cross_entropy_rows_backward", mutates_args=())
@on_its_device
def linear_cross_entropy_rows_backward(
    drow: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    logit_scale: float,
    ignore_index: int,
    z_loss: float,
    smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `hidden` and `weight`, in their dtype, for `drow` `[T]`, that of the losses."""
    hidden, labels = hidden.contiguous(), labels.contiguous()
    dhidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    allocate = torch.empty if hidden.shape[0] else torch.zeros
    dweight = allocate(weight.shape, dtype=torch.float32, device=hidden.device)
    for rows, states, logits in _chunks(hidden, weight, logit_scale):
        launch_gradient(
            logits, labels[rows], lse[rows], drow[rows], logits, ignore_index, z_loss, smoothing, logit_scale
        )
        torch.mm(logits, weight, out=dhidden[rows])
        _add_product(dweight, logits.t(), states, first=rows.start == 0)
    return dhidden, dweight.to(weight.dtype)


@linear_cross_entropy_rows_backward.register_fake
def _rows_backward_shapes(
    drow: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], output[3])
    ctx.options = inputs[3:]


def _compute_gradients(ctx: Any, drow: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    gradients = torch.ops.fat5.linear_cross_entropy_rows_backward(drow, *ctx.saved_tensors, *ctx.options)
    return *gradients, *[None] * 5


linear_cross_entropy_rows.register_autograd(_compute_gradients, setup_context=_save_inputs)
