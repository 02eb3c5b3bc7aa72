"""The kernels of cross-entropy over rows of logits, and their launchers."""
# mypy: allow-untyped-defs, disable-error-code="misc"

from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:  # a guarded import is what the loader of remote code asks for
    raise ImportError("the cross-entropy kernels need Triton") from error

VECTOR = tl.constexpr(8)
"""Neighbouring logits of one thread: 16 bytes of them in bf16. Threads meet once a row, not once a block."""


class Rows(NamedTuple):
    """Results for each row, fp32 `[T]`, zeros at ignored labels but for the log-sum-exp.

    That is `[T, 2]`, the largest logit and the rest: their sum would lose the rest's digits to the largest.
    """

    loss: torch.Tensor
    z_loss: torch.Tensor
    correct: torch.Tensor
    lse: torch.Tensor


@triton.jit
def columns(first, BLOCK: tl.constexpr):
    """Columns `[BLOCK // 8, 8]` from `first` on, such that a row of them is seen to be consecutive."""
    return first + tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def load_logits(p_row, first, V: tl.constexpr, BLOCK: tl.constexpr):
    """Fp32 logits `[BLOCK // 8, 8]` of a row from column `first` on, -inf beyond its end; and their columns."""
    o_v = columns(first, BLOCK)
    return tl.load(p_row + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32), o_v


@triton.jit
def logit_gradient(b_logits, o_v, label, largest, rest, z_loss, smoothing, factor, V: tl.constexpr):
    """Gradient of a row's loss, times `factor`; the row's log-sum-exp is `largest + rest`."""
    b_target = tl.where(o_v == label, 1.0 - smoothing, 0.0) + smoothing / V
    return (tl.exp(b_logits - largest - rest) * (1.0 + 2.0 * z_loss * (largest + rest)) - b_target) * factor


@triton.jit
def ignored_gradient(largest, rest):
    """Gradient of every logit of an ignored row: 0, or, as in torch, NaN where the row has no finite log-sum-exp."""
    return (largest + rest) * 0.0


@triton.jit
def loss_kernel(
    p_logits, p_labels, p_loss, p_z_loss, p_correct, p_lse, stride, ignore_index, z_loss, smoothing, factor,
    V: tl.constexpr, BLOCK: tl.constexpr, SMOOTH: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Grid (rows). With GRADIENT the logits are overwritten by it, while most of the row is still in the L2 cache."""
    row = tl.program_id(0)
    label = tl.load(p_labels + row)
    p_row = p_logits + tl.cast(row, tl.int64) * stride
    ignored = label == ignore_index
    inside = (label >= 0) & (label < V)  # else NaN comes out, as an error that does not wait for the device
    target = tl.load(p_row + label, mask=inside, other=float("nan")).to(tl.float32)
    b_max = tl.full((BLOCK // VECTOR,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK // VECTOR,), tl.float32)
    b_plain = tl.zeros((BLOCK // VECTOR,), tl.float32)
    base = tl.where(target == float("-inf"), 0.0, target)
    for first in range(0, V, BLOCK):
        b_logits, o_v = load_logits(p_row, first, V, BLOCK)
        b_new = tl.maximum(b_max, tl.max(b_logits, axis=1))
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)  # -inf - -inf is NaN
        b_sum = b_sum * tl.exp(b_max - b_shift) + tl.sum(tl.exp(b_logits - b_shift[:, None]), axis=1)
        b_max = b_new
        if SMOOTH:
            b_plain += tl.sum(tl.where(o_v < V, b_logits - base, 0.0), axis=1)
    largest = tl.max(b_max, axis=0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    rest = tl.log(tl.sum(b_sum * tl.exp(b_max - shift), axis=0))
    loss = shift - target + rest
    if SMOOTH:
        loss -= smoothing * (tl.sum(b_plain, axis=0) / V)
    z = z_loss * (shift + rest) * (shift + rest)
    tl.store(p_loss + row, tl.where(ignored, 0.0, loss + z))
    tl.store(p_z_loss + row, tl.where(ignored, 0.0, z))
    tl.store(p_correct + row, tl.where(ignored, 0.0, (target >= largest).to(tl.float32)))
    tl.store(p_lse + 2 * row, shift)
    tl.store(p_lse + 2 * row + 1, rest)
    if GRADIENT:
        if ignored:
            b_zero = tl.full((BLOCK // VECTOR, VECTOR), ignored_gradient(shift, rest), p_logits.dtype.element_ty)
            for first in range(0, V, BLOCK):
                o_v = columns(first, BLOCK)
                tl.store(p_row + o_v, b_zero, mask=o_v < V)
        else:
            for first in range(0, V, BLOCK):
                b_logits, o_v = load_logits(p_row, first, V, BLOCK)
                b_grad = logit_gradient(b_logits, o_v, label, shift, rest, z_loss, smoothing, factor, V)
                tl.store(p_row + o_v, b_grad.to(p_logits.dtype.element_ty), mask=o_v < V)


@triton.jit
def gradient_kernel(
    p_logits, p_labels, p_lse, p_drow, p_out, stride, stride_drow, stride_out, blocks, ignore_index, z_loss, smoothing,
    factor, V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows x blocks of a row). `p_out` may be `p_logits`."""
    row = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK
    label = tl.load(p_labels + row)
    row_64 = tl.cast(row, tl.int64)
    b_logits, o_v = load_logits(p_logits + row_64 * stride, first, V, BLOCK)
    scale = tl.load(p_drow + row_64 * stride_drow) * factor
    largest, rest = tl.load(p_lse + 2 * row), tl.load(p_lse + 2 * row + 1)
    b_grad = logit_gradient(b_logits, o_v, label, largest, rest, z_loss, smoothing, scale, V)
    b_grad = tl.where(label == ignore_index, ignored_gradient(largest, rest), b_grad)
    tl.store(p_out + row_64 * stride_out + o_v, b_grad.to(p_out.dtype.element_ty), mask=o_v < V)


def launch_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    rows: Rows,
    ignore_index: int,
    z_loss: float,
    smoothing: float,
    factor: float | None = None,
) -> None:
    """Fill `rows`, and with a `factor` overwrite the logits by the gradient of the summed loss times it.

    Args:
        logits: `[T, V]`, consecutive columns.
        labels: ints `[T]`, contiguous.
        rows: what to fill, each contiguous.
        ignore_index, z_loss, smoothing: as in `cross_entropy`.
        factor: None for the losses alone.
    """
    count, vocab = logits.shape
    if count:
        block = min(max(triton.next_power_of_2(vocab), 32), 8192)
        loss_kernel[(count,)](
            logits, labels, rows.loss, rows.z_loss, rows.correct, rows.lse, logits.stride(0), ignore_index, z_loss,
            smoothing, factor or 0.0, vocab, block, smoothing > 0, factor is not None,
            num_warps=min(max(block // 512, 1), 16),
        )  # fmt: skip


def launch_gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    drow: torch.Tensor,
    out: torch.Tensor,
    ignore_index: int,
    z_loss: float,
    smoothing: float,
    factor: float = 1.0,
) -> None:
    """Write the gradient of the logits to `out`, which may be the logits.

    Args:
        logits, out: `[T, V]`, consecutive columns.
        labels, lse: as they went into, and came out of, `launch_loss`.
        drow: gradient of each row's loss, fp32 `[T]`, any stride.
        ignore_index, z_loss, smoothing: as in `cross_entropy`.
        factor: on the gradient.
    """
    count, vocab = logits.shape
    if count:
        block = min(max(triton.next_power_of_2(vocab), 32), 4096)
        blocks = triton.cdiv(vocab, block)
        gradient_kernel[(count * blocks,)](
            logits, labels, lse, drow, out, logits.stride(0), drow.stride(0), out.stride(0), blocks, ignore_index,
            z_loss, smoothing, factor, vocab, block, num_warps=min(max(block // 1024, 1), 4),
        )  # fmt: skip
