"""The kernels of RMSNorm with a residual sum before it, and their launchers."""
# mypy: allow-untyped-defs, disable-error-code="misc"

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:  # a guarded import is what the loader of remote code asks for
    raise ImportError("the RMSNorm kernels need Triton") from error

from .ops_device import multiprocessors
from .ops_dropout_tile import keep_tile
from .ops_early_launch import launch_options, wait_for_earlier
from .ops_philox import dropped_steps, keep_scale

MAX_WIDTH = 16384
WARPS_PER_MULTIPROCESSOR = 32
"""Enough rows in flight to hide the latency of memory (measured on an H200: 16 are too few at some widths)."""


@triton.jit
def forward_kernel(
    p_hidden, p_branch, p_weight, p_seed, p_out, p_total, p_rstd, eps, dropped, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, DROPOUT: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (rows)."""
    row = tl.program_id(0)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    o_row = tl.cast(row, tl.int64) * D + o_d
    wait_for_earlier(EARLY)
    b_total = tl.load(p_hidden + o_row, mask=m_d, other=0.0)
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0)
    if ADD:
        b_branch = tl.load(p_branch + o_row, mask=m_d, other=0.0).to(tl.float32)
        if DROPOUT:
            b_branch *= tl.where(keep_tile(p_seed, row, 0, dropped, BLOCK), scale, 0.0)  # NaN stays NaN, as in torch
        b_sum = b_total.to(tl.float32) + b_branch
        if p_total.dtype.element_ty == tl.float16:  # T5's residual stream exceeds fp16's range in some checkpoints
            b_sum = tl.clamp(b_sum, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
        b_total = b_sum.to(p_total.dtype.element_ty)
        tl.store(p_total + o_row, b_total, mask=m_d)
    b_x = b_total.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=0) / D + eps)
    tl.store(p_rstd + row, rstd)
    tl.store(p_out + o_row, (b_x * rstd * b_weight.to(tl.float32)).to(p_out.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    p_dout, p_dtotal, p_total, p_weight, p_rstd, p_seed, p_dhidden, p_dbranch, p_partial, p_out, rows, dropped, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, RESIDUAL: tl.constexpr, BRANCH: tl.constexpr, CLAMPED: tl.constexpr,
    DROPOUT: tl.constexpr, RECOMPUTE: tl.constexpr,
):  # fmt: skip
    """Grid (programs): each takes every `programs`-th row, whole, and writes its share of the weight's gradient into a
    row of `p_partial`.

    With RECOMPUTE `p_out` receives what forward wrote there.
    """
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0)
    b_dweight = tl.zeros((BLOCK,), tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        o_row = tl.cast(row, tl.int64) * D + o_d
        b_x = tl.load(p_total + o_row, mask=m_d, other=0.0).to(tl.float32)
        b_dout = tl.load(p_dout + o_row, mask=m_d, other=0.0).to(tl.float32)
        if RESIDUAL:
            b_dtotal = tl.load(p_dtotal + o_row, mask=m_d, other=0.0).to(tl.float32)
        rstd = tl.load(p_rstd + row)
        b_normed = b_x * rstd
        if RECOMPUTE:
            tl.store(p_out + o_row, (b_normed * b_weight.to(tl.float32)).to(p_out.dtype.element_ty), mask=m_d)
        b_dweight += b_dout * b_normed
        b_dnormed = b_dout * b_weight.to(tl.float32)
        b_dx = rstd * (b_dnormed - b_normed * (tl.sum(b_dnormed * b_normed, axis=0) / D))
        if RESIDUAL:
            b_dx += b_dtotal
        if CLAMPED:
            b_dx = tl.where(tl.abs(b_x) < 65504.0, b_dx, 0.0)
        tl.store(p_dhidden + o_row, b_dx.to(p_dhidden.dtype.element_ty), mask=m_d)
        if BRANCH:
            if DROPOUT:
                b_dx *= tl.where(keep_tile(p_seed, row, 0, dropped, BLOCK), scale, 0.0)
            tl.store(p_dbranch + o_row, b_dx.to(p_dbranch.dtype.element_ty), mask=m_d)
    tl.store(p_partial + tl.program_id(0) * D + o_d, b_dweight, mask=m_d)


@triton.jit(do_not_specialize=["rows"])
def sum_rows_kernel(p_partial, p_out, rows, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Grid (blocks of columns): column sums of fp32 `[rows, D]`, always in the same order."""
    o_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    o_m = tl.arange(0, BLOCK_M)
    b_sum = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, rows, BLOCK_M):
        m_tile = (first + o_m < rows)[:, None] & (o_d < D)[None, :]
        b_sum += tl.load(p_partial + (first + o_m)[:, None] * D + o_d[None, :], mask=m_tile, other=0.0)
    tl.store(p_out + o_d, tl.sum(b_sum, axis=0).to(p_out.dtype.element_ty), mask=o_d < D)


def launch_forward(
    hidden: torch.Tensor,
    branch: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    out_dtype: torch.dtype,
    early: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised rows, their sums and inverse root mean squares.

    Args:
        hidden: `[..., D]`, contiguous.
        branch: `[..., D]`, contiguous, or None for the norm alone.
        weight: `[D]`.
        eps: added to the mean square.
        dropout_p: probability of dropping an element of `branch`.
        seed: of the dropout, int64 `[1]`.
        out_dtype: of the normalised rows.
        early: see `ops_early_launch`.

    Returns:
        Normalised `[..., D]`; the sum `[..., D]` (empty without a branch); fp32 `[rows]`.
    """
    width = hidden.shape[-1]
    rows = hidden.numel() // width
    out = torch.empty(hidden.shape, dtype=out_dtype, device=hidden.device)
    total = torch.empty(0, dtype=hidden.dtype, device=hidden.device)
    if branch is not None:
        total = torch.empty(hidden.shape, dtype=torch.promote_types(hidden.dtype, branch.dtype), device=hidden.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    if rows:
        block = block_width(width)
        warps = 1 if block <= 512 else max(4, block // 1024)  # measured on an H200
        forward_kernel[(rows,)](
            hidden, branch, weight, seed, out, total, rstd, eps, dropped_steps(dropout_p),
            keep_scale(dropout_p), width, block, branch is not None, dropout_p > 0, early, num_warps=warps,
            **launch_options(early),
        )  # fmt: skip
    return out, total, rstd


def launch_backward(
    dout: torch.Tensor,
    dtotal: torch.Tensor | None,
    total: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    dropout_p: float,
    seed: torch.Tensor | None,
    hidden_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden states, branch and weight, and the normalised rows once more.

    Args:
        dout: gradient of the normalised rows, `[..., D]`, contiguous.
        dtotal: gradient of the sum, likewise; None if nothing else uses it.
        total: the sum, or the hidden states where there is no branch.
        weight, rstd, dropout_p, seed: as forward had or returned them.
        hidden_dtype: of the hidden states.
        branch_dtype: of the branch; None without one.
        out_dtype: of the normalised rows; None to leave them out.

    Returns:
        Gradients in the dtypes of hidden states, branch and weight. That of the branch is empty where there is none or
        where it is that of the hidden states. The normalised rows `[..., D]`, or nothing.
    """
    width, rows = total.shape[-1], rstd.shape[0]
    device = total.device
    dhidden = torch.empty(total.shape, dtype=hidden_dtype, device=device)
    branch = branch_dtype is not None and not (branch_dtype == hidden_dtype and dropout_p == 0)
    dbranch = torch.empty(total.shape if branch else 0, dtype=branch_dtype if branch else hidden_dtype, device=device)
    recompute = out_dtype is not None
    out = torch.empty(total.shape if recompute else 0, dtype=out_dtype or weight.dtype, device=device)
    if not rows:
        return dhidden, dbranch, torch.zeros_like(weight), out
    block = block_width(width)
    warps = min(max(block // (256 if width <= 1024 else 1024), 1), 16)
    programs = min(rows, multiprocessors(total) * max(WARPS_PER_MULTIPROCESSOR // warps, 1))
    partial = torch.empty((programs, width), dtype=torch.float32, device=device)
    clamped = branch_dtype is not None and total.dtype == torch.float16
    backward_kernel[(programs,)](
        dout, dtotal, total, weight, rstd, seed, dhidden, dbranch, partial, out, rows, dropped_steps(dropout_p),
        keep_scale(dropout_p), width, block, dtotal is not None, branch, clamped, dropout_p > 0, recompute,
        num_warps=warps,
    )  # fmt: skip
    dweight = torch.empty_like(weight)
    sum_rows_kernel[(triton.cdiv(width, 16),)](partial, dweight, programs, width, 128, 16, num_warps=4)
    return dhidden, dbranch, dweight, out


def block_width(width: int) -> int:
    """Width of a block that holds a row."""
    return max(triton.next_power_of_2(width), 32)
