"""The kernel of the gated feed-forward's first half without gradients, and its launcher."""
# mypy: allow-untyped-defs, disable-error-code="misc"

from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:  # a guarded import is what the loader of remote code asks for
    raise ImportError("the gated linear kernel needs Triton") from error

from .ops_early_launch import launch_options, prefetch_rows, wait_for_earlier
from .ops_gated_act_kernels import activate


class LinearConfig(NamedTuple):
    """How a kernel of linear layers is launched.

    Attributes:
        block_m, block_n, block_k: tokens, features of each weight, and depth of a tile.
        num_warps, num_stages: Triton's launch options.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


FEW = LinearConfig(16, 32, 128, 4, 4)  # tokens of a step of decoding, tuned on one H200
FEW_SM90 = LinearConfig(64, 32, 128, 4, 4)  # more of them, likewise
SOME = LinearConfig(64, 64, 64, 4, 3)
MANY = LinearConfig(128, 64, 64, 8, 3)  # on any part from sm_80 on
MANY_SM90 = LinearConfig(128, 128, 64, 8, 4)  # tuned on one H200, bf16, T5 base and xl
GROUP_M = 16
"""Rows of tiles that run together and share weights in the L2 cache."""


def gated_linear_config(rows: int, part: int) -> LinearConfig:
    """Configuration for a number of tokens on a part, ten times its compute capability."""
    if rows <= 16:
        return FEW
    if rows <= 64 and part == 90:
        return FEW_SM90
    if rows <= 1024:
        return SOME
    return MANY_SM90 if part == 90 else MANY


@triton.jit(do_not_specialize=["rows"])
def gated_linear_kernel(
    p_x, p_gate, p_up, p_out, rows,
    D: tl.constexpr, F: tl.constexpr, ACT: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of the output, GROUP rows of tiles at a time)."""
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    group = tl.program_id(0) // (GROUP * tiles_n)
    height = min(tiles_m - group * GROUP, GROUP)
    place = tl.program_id(0) % (GROUP * tiles_n)
    o_m = (group * GROUP + place % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = place // height * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    # beyond the edge the first row is read again: no mask in the loop
    o_x = tl.where(o_m < rows, o_m, 0).to(tl.int64)[:, None] * D + o_k[None, :]
    o_w = tl.where(o_n < F, o_n, 0)[None, :] * D + o_k[:, None]
    if EARLY:
        o_row = tl.where(o_n < F, o_n, 0) * D
        prefetch_rows(p_gate + o_row, D)
        prefetch_rows(p_up + o_row, D)
    wait_for_earlier(EARLY)
    b_gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    b_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, D, BLOCK_K):
        if D % BLOCK_K == 0:
            b_x = tl.load(p_x + o_x + first)
            b_gate = tl.dot(b_x, tl.load(p_gate + o_w + first), b_gate)
            b_up = tl.dot(b_x, tl.load(p_up + o_w + first), b_up)
        else:
            m_k = o_k < D - first
            b_x = tl.load(p_x + o_x + first, mask=m_k[None, :], other=0.0)
            b_gate = tl.dot(b_x, tl.load(p_gate + o_w + first, mask=m_k[:, None], other=0.0), b_gate)
            b_up = tl.dot(b_x, tl.load(p_up + o_w + first, mask=m_k[:, None], other=0.0), b_up)
    b_y, _ = activate(b_gate, ACT)
    o_out = o_m.to(tl.int64)[:, None] * F + o_n[None, :]
    m_out = (o_m < rows)[:, None] & (o_n < F)[None, :]
    tl.store(p_out + o_out, (b_y * b_up).to(p_out.dtype.element_ty), mask=m_out)


def launch(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, act: int, config: LinearConfig, early: bool
) -> torch.Tensor:
    """`act(x gate^T) * (x up^T)`, `[rows, F]`.

    Args:
        x: `[rows, D]`, contiguous, bf16 or fp16.
        gate, up: `[F, D]`, contiguous, likewise.
        act: index of the activation.
        config: of the launch.
        early: see `ops_early_launch`.
    """
    (rows, depth), features = x.shape, gate.shape[0]
    out = torch.empty((rows, features), dtype=x.dtype, device=x.device)
    if out.numel():
        grid = (triton.cdiv(rows, config.block_m) * triton.cdiv(features, config.block_n),)
        gated_linear_kernel[grid](
            x, gate, up, out, rows, depth, features, act, GROUP_M, early,
            config.block_m, config.block_n, config.block_k,
            num_warps=config.num_warps, num_stages=config.num_stages, **launch_options(early),
        )  # fmt: skip
    return out
