"""The kernel of linear layers on the few rows of a step of decoding, and its launcher."""
# mypy: allow-untyped-defs, disable-error-code="misc"

from collections.abc import Sequence

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:  # a guarded import is what the loader of remote code asks for
    raise ImportError("the kernel of few rows needs Triton") from error

from .ops_early_launch import launch_options, prefetch_rows, wait_for_earlier
from .ops_gated_linear_kernels import LinearConfig


def few_rows_config(rows: int, depth: int, part: int) -> LinearConfig:
    """Configuration for a number of rows, at most 64, on a part, ten times its compute capability.

    Little is computed: time goes into waiting for the weights, so that tiles are narrow, for many programs to wait at
    once, and each asks for much of its weights at once. Tuned on one H200, T5 base and large.
    """
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    if depth <= 1024:
        block_n, block_k, stages = 32, 128, 4
    elif block_m < 64:
        block_n, block_k, stages = 16, 256, 6
    else:
        block_n, block_k, stages = 16, 128, 8
    shared = 200 << 10 if part in (90, 100) else 96 << 10  # of the least that supported parts have
    stages = min(stages, shared // (2 * (block_m + block_n) * block_k))
    return LinearConfig(block_m, block_n, block_k, 4, stages)


@triton.jit(do_not_specialize=["rows"])
def few_rows_linear_kernel(
    p_x, p_weight_0, p_weight_1, p_weight_2, p_out, rows,
    D: tl.constexpr, F: tl.constexpr, WEIGHTS: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of features, weight after weight)."""
    tiles: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    place = tl.program_id(0) // tiles
    p_weight = p_weight_0
    if place == 1:
        p_weight = p_weight_1
    if place == 2:
        p_weight = p_weight_2
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    # beyond the edge the first row is read again: no mask in the loop
    o_x = tl.where(o_m < rows, o_m, 0)[:, None] * D + o_k[None, :]
    o_w = tl.where(o_n < F, o_n, 0)[None, :] * D + o_k[:, None]
    if EARLY:
        prefetch_rows(p_weight + tl.where(o_n < F, o_n, 0) * D, D)
    wait_for_earlier(EARLY)
    b_out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, D, BLOCK_K):
        if D % BLOCK_K == 0:
            b_out = tl.dot(tl.load(p_x + o_x + first), tl.load(p_weight + o_w + first), b_out)
        else:
            m_k = o_k < D - first
            b_x = tl.load(p_x + o_x + first, mask=m_k[None, :], other=0.0)
            b_out = tl.dot(b_x, tl.load(p_weight + o_w + first, mask=m_k[:, None], other=0.0), b_out)
    o_out = o_m[:, None] * (WEIGHTS * F) + place * F + o_n[None, :]
    m_out = (o_m < rows)[:, None] & (o_n < F)[None, :]
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_out)


def launch(x: torch.Tensor, weights: Sequence[torch.Tensor], config: LinearConfig, early: bool) -> torch.Tensor:
    """`x` times each weight, side by side: `[rows, F times the number of weights]`.

    Args:
        x: `[rows, D]`, contiguous, bf16 or fp16.
        weights: one to three `[F, D]`, contiguous, likewise.
        config: of the launch.
        early: see `ops_early_launch`.
    """
    (rows, depth), features = x.shape, weights[0].shape[0]
    out = torch.empty((rows, features * len(weights)), dtype=x.dtype, device=x.device)
    if out.numel():
        grid = (triton.cdiv(features, config.block_n) * len(weights),)
        few_rows_linear_kernel[grid](
            x, weights[0], weights[len(weights) > 1], weights[-1], out, rows, depth, features, len(weights), early,
            config.block_m, config.block_n, config.block_k, num_warps=config.num_warps, num_stages=config.num_stages,
            **launch_options(early),
        )  # fmt: skip
    return out
