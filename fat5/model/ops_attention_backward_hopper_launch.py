"""Launches the fused backward kernel for sm_90 where it applies."""
# mypy: allow-untyped-defs, disable-error-code="union-attr"

from typing import NamedTuple

import torch

try:
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError as error:  # a guarded import is what the loader of remote code asks for
    raise ImportError("the attention kernels need Triton") from error

from .ops_attention_backward_hopper import fused_backward_kernel
from .ops_attention_bias_grad import near_diagonals_kernel
from .ops_attention_bias_grad_hopper import near_sums_kernel
from .ops_attention_bias_line import (
    line_gradient,
    line_gradient_of_sums,
    near_offsets,
    padded_line,
    segment_of_blocks,
)
from .ops_attention_configs import (
    BACKWARD_SM90_FUSED,
    FEW_KEYS,
    NEAR_IN_FUSED,
    NEAR_SUMS_GROUP,
    NEAR_SUMS_RING,
    NEAR_SUMS_TILES,
    FusedConfig,
)
from .ops_attention_diagonals_hopper import FOLDED, PLACES
from .ops_device import multiprocessors

NONE, T5 = range(2)
DIAGONALS = 512  # no fewer than there are in 64 rows of near sums


def hopper_config(q, k, v, do, bias, problem, capability) -> FusedConfig | None:
    """Configuration if the kernel takes this call, else None: the copy engine knows no stride of 0, say."""
    head_dim = q.shape[-1]
    fits = (
        capability == 90 and q.dtype in (torch.bfloat16, torch.float16) and head_dim in (64, 128)
        and bias.kind in (NONE, T5) and problem.dropout_p == 0 and problem.scale > 0 and problem.max_seqlen_k > FEW_KEYS
        and all(x.data_ptr() % 16 == 0 and all(n > 0 and n % 8 == 0 for n in x.stride()[:3]) for x in (q, k, v, do))
    )  # fmt: skip
    return BACKWARD_SM90_FUSED[head_dim] if fits else None


class NearSums(NamedTuple):
    """Sums of dS along diagonals, as the fused kernel leaves them.

    Attributes:
        sums: fp32 `[H, blocks of keys, rows, FOLDED]`.
        first: offset (first key minus first query position) of the nearest tiles on the left.
        offsets: number of near tile offsets.
        lowest: row of all those of `diagonal_products` that is the first in `sums`.
    """

    sums: torch.Tensor
    first: int
    offsets: int
    lowest: int

    @property
    def first_distance(self) -> int:
        """Distance of column 0 of row 0."""
        return self.first + 8 * (self.lowest - 6) - 7


def near_sums_of(bias, problem, k, cu_k, block_m, block_n) -> NearSums | None:
    """Memory for the near sums, or None if another kernel is to form them: the line is too long for the fused one, or
    the heads are too wide for its registers, or the sequences so long that its dearer far tiles outweigh the gain.
    """
    first, offsets = near_offsets(bias, problem, block_m, block_n)
    if offsets > PLACES or k.shape[3] > 64 or problem.max_seqlen_k > NEAR_IN_FUSED:
        return None
    heads = k.shape[2]
    # the first row with a distance beyond the left end, and the first with none before the right end
    lowest = max(0, (41 - first - bias.left) // 8 + 1)
    rows = max(1, -(-(55 - first + bias.right) // 8) - lowest)
    if cu_k is None:
        blocks = k.shape[0] * -(-problem.max_seqlen_k // block_n)
        sums = torch.empty((heads, blocks, rows, FOLDED), dtype=torch.float32, device=k.device)
    else:  # each segment starts a block; some are left out
        blocks = k.shape[1] // block_n + cu_k.numel() - 1
        sums = torch.zeros((heads, blocks, rows, FOLDED), dtype=torch.float32, device=k.device)
    return NearSums(sums, first, offsets, lowest)


def readable_tiles(tiles: int, block_m: int, max_k: int) -> int:
    """How many tiles of lse and delta there must be, so that whatever the kernels copy lies in them.

    They copy a tile ahead. A causal program, whose keys only queries from a certain place on see, begins at that place
    also where its segment has ended before it; a pair of blocks of queries may begin behind its segment.

    Args:
        tiles: of the queries there are.
        block_m: queries of a tile.
        max_k: keys of the longest segment.
    """
    return tiles + -(-max_k // block_m) + 4


def launch_hopper(
    config, do, q, k, v, row_tiles, dq_tiles, dk, dv, far, near, bias, cu_q, cu_k, lengths_k, problem, grid
):
    """Fills dq_tiles, dk, dv, the far sums and the near ones."""
    block_m, block_n, num_warps, stages = config.tiles
    heads, head_dim = q.shape[2:]
    q_desc, do_desc = (rows_descriptor(x, block_m) for x in (q, do))
    line, line_size, left, right = None, 0, 0, 1
    first, offsets, sums, lowest = 0, 0, None, 0
    if bias.kind == T5:
        left, right = bias.left, bias.right
        line = padded_line(bias, block_m + block_n, 1 / problem.scale)
        line_size = line.shape[1]
        first, offsets = near_offsets(bias, problem, block_m, block_n)
    if near is not None:
        sums, lowest = near.sums, near.lowest
    fused_backward_kernel[grid](
        q_desc, do_desc, k, v, row_tiles, dq_tiles, dk, dv, far, sums, line, cu_q, cu_k, lengths_k,
        *k.stride()[:3], *v.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], heads, problem.max_seqlen_q,
        problem.max_seqlen_k, problem.q_offset, problem.scale, line_size, left, right, left + block_n,
        left + right + block_m + block_n, first + problem.q_offset, offsets, 0 if sums is None else sums.shape[1],
        lowest, 0 if sums is None else sums.shape[2], HEAD_DIM=head_dim,
        BLOCK_M=block_m, BLOCK_N=block_n, BIAS=bias.kind, CAUSAL=problem.causal, LINE_GRADIENT=far is not None,
        PLACES=0 if near is None else PLACES, STAGES=stages, LATE_DP=config.late_dp, HALF_P=config.half_p,
        num_warps=num_warps,
    )  # fmt: skip


def rows_descriptor(x: torch.Tensor, block: int) -> TensorDescriptor:
    """What the copy engine needs to fetch `block` rows of one head of `[B, L, H, D]`."""
    box = [1, block, 1, x.shape[-1]]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, NVMMASharedLayout(128, 16, 4))


def hopper_line_gradient(do, q, k, v, row_tiles, far, bias, cu_q, cu_k, lengths_k, problem):
    """As `_line_gradient`, with the kernel for sm_90."""
    block_m, block_n = NEAR_SUMS_TILES
    heads, head_dim = q.shape[2:]
    first, offsets = near_offsets(bias, problem, block_m, block_n)
    if cu_q is None:
        items, item_segment = q.shape[0] * -(-problem.max_seqlen_q // block_n), None
    else:
        items, item_segment = segment_of_blocks(cu_q, q.shape[1], block_n)
    of_a_kind = -(-offsets // 2)
    groups = -(-of_a_kind // NEAR_SUMS_GROUP)
    group = -(-of_a_kind // groups)
    splits = max(1, min(items, multiprocessors(q) // (2 * heads * groups)))
    tiles = torch.empty((heads * offsets, splits, block_n, block_m), dtype=torch.float32, device=q.device)
    line = padded_line(bias, block_m + block_n, 1 / problem.scale)
    near_sums_kernel[(splits, heads, 2 * groups)](
        rows_descriptor(q, block_m), rows_descriptor(do, block_m), rows_descriptor(k, block_n),
        rows_descriptor(v, block_n), row_tiles, line, tiles, cu_q, cu_k, lengths_k, item_segment, heads,
        problem.max_seqlen_q, problem.max_seqlen_k, problem.q_offset, problem.scale, line.shape[1],
        bias.left + block_m + block_n, bias.left, bias.right, first + problem.q_offset, offsets, items,
        HEAD_DIM=head_dim, BLOCK_M=block_m, GROUP=group, RING=min(group, NEAR_SUMS_RING[head_dim]),
        CAUSAL=problem.causal, num_warps=8,
    )  # fmt: skip
    return line_gradient(tiles, far, bias, first, block_m, heads, offsets, keys_first=True)


def line_gradient_of_diagonals(near: NearSums, far, bias):
    """Gradient of the line, fp32 `[H, left + right + 1]`, from what the fused kernel has summed."""
    heads, blocks, rows, _ = near.sums.shape
    sums = torch.empty((heads, DIAGONALS), dtype=torch.float32, device=far.device)
    near_diagonals_kernel[(heads, DIAGONALS // 32)](near.sums, sums, blocks, rows, BLOCK_B=128, BLOCK_C=32, num_warps=8)
    return line_gradient_of_sums(sums, far, bias, near.first_distance, 0, 1)
