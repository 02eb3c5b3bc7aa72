"""Host side of the line of T5's bias in the backward pass: what its kernels read, and its gradient from their sums."""
# mypy: allow-untyped-defs

from typing import TYPE_CHECKING

import torch

try:
    import triton
except ImportError as error:  # a guarded import is what the loader of remote code asks for
    raise ImportError("the attention kernels need Triton") from error

from .ops_attention_bias_grad import diagonal_sums_kernel, line_gradient_kernel, pad_line_kernel

if TYPE_CHECKING:
    from .ops_attention_bias import BiasArgs
    from .ops_attention_problem import Problem

LOG2_E = 1.4426950408889634
T5 = 1


def padded_line(bias: "BiasArgs", reach: int, factor: float = LOG2_E) -> torch.Tensor | None:
    """The line times `factor`, its ends repeated `reach` times, so that any near tile reads within it."""
    if bias.line is None:
        return None
    heads, size = bias.line.shape
    padded = torch.empty((heads, size + 2 * reach), dtype=torch.float32, device=bias.line.device)
    pad_line_kernel[(heads, triton.cdiv(size + 2 * reach, 512))](bias.line, padded, size, reach, factor, BLOCK=512)
    return padded


def near_offsets(bias: "BiasArgs", problem: "Problem", block_m: int, block_n: int) -> tuple[int, int]:
    """First and number of the offsets (first key minus first query position) of the tiles within the line's reach.

    All offsets are `q_offset` below a multiple of the smaller side.
    """
    step = min(block_m, block_n)
    lowest, highest = -(bias.left + block_n - 2), bias.right + block_m - 2
    if problem.causal:
        highest = min(highest, block_m - 1)
    first = -((-lowest - problem.q_offset) // step) * step - problem.q_offset
    return first, max(0, (highest - first) // step + 1)


def segment_of_blocks(cu: torch.Tensor, rows: int, block: int) -> tuple[int, torch.Tensor]:
    """Upper bound on the blocks of all packed segments, and each one's segment; a segment starts at `cu //
    block + s`.
    """
    segments = cu.numel() - 1
    starts = cu[:-1] // block + torch.arange(segments, dtype=torch.int32, device=cu.device)
    index = torch.arange(rows // block + segments, dtype=torch.int32, device=cu.device)
    return index.numel(), torch.searchsorted(starts, index, right=True, out_int32=True) - 1


def line_gradient(
    tiles: torch.Tensor,
    far: torch.Tensor,
    bias: "BiasArgs",
    first: int,
    step: int,
    heads: int,
    offsets: int,
    keys_first: bool,
) -> torch.Tensor:
    """Gradient of the line, fp32 `[H, left + right + 1]`.

    Args:
        tiles: sums of dS over the near tiles, fp32 `[H * offsets, splits, BM, BN]` (`[.., BN, BM]` if keys_first).
        far: sums of dS beyond the left and the right end, fp32 `[H, n, 2]`.
        bias: the line.
        first: offset of the first tiles, see `near_offsets`; step: from one to the next; offsets: their number.
        heads: H.
        keys_first: tiles are transposed.
    """
    block_m, block_n = tiles.shape[2:] if not keys_first else tiles.shape[:1:-1]
    block = max(block_m, block_n)
    sums = torch.empty((heads * offsets, 2 * block), dtype=torch.float32, device=tiles.device)
    chunk = min(32, 2 * block)
    diagonal_sums_kernel[(heads * offsets, 2 * block // chunk)](
        tiles, sums, tiles.shape[1], BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_C=chunk, KEYS_FIRST=keys_first
    )
    return line_gradient_of_sums(sums, far, bias, first - (block_m - 1), step, offsets)


def line_gradient_of_sums(
    sums: torch.Tensor,
    far: torch.Tensor,
    bias: "BiasArgs",
    first: int,
    step: int,
    offsets: int,
) -> torch.Tensor:
    """As `line_gradient`, from sums along diagonals, fp32 `[H * offsets, width]`, a power of two wide: the first of
    them is of distance `first`, and `step` more with each offset.
    """
    dline = torch.empty((sums.shape[0] // offsets, bias.left + bias.right + 1), dtype=torch.float32, device=sums.device)
    line_gradient_kernel[(dline.shape[0],)](
        sums, far, dline, offsets, first, step, bias.left, bias.right, far.shape[1],
        WIDTH=sums.shape[1], BLOCK_L=triton.next_power_of_2(bias.left + bias.right + 1), BLOCK_F=1024,
    )  # fmt: skip
    return dline
