"""T5's bias for one tile of scores, read in the order in which a matrix unit's threads hold the tile.

Inside the band the bias of a tile depends on key position - query position alone, so that a tile is made of pieces of
one short line. A strip holds, for 8 rows and 8 (fp32: 4 pairs of) columns, the entries that the 32 threads of a warp
want, 16 bytes a thread: thread `4 * l4 + lm` of a warp holds rows `l4` (+ 8) and columns `2 * lm`, `2 * lm + 1` (+ 8 j)
of the accumulator of a matrix product, on sm_80 and on sm_90 alike. Loads are then wide, consecutive, from a table of a
few KiB that stays in the L1 cache, and need no exchange between threads; another order would only be slower.
"""
# mypy: allow-untyped-defs

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:  # a guarded import is what the loader of remote code asks for
    raise ImportError("the attention kernels need Triton") from error


def expand_strips(
    line: torch.Tensor, left: int, right: int, phase: int, reach: int, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """Strips `[H, X, 8, 4, JJ, 2]` of a bias line `[H, left + right + 1]`, divided by `scale`.

    `strip[h, x, l4, lm, jj, e]` is the bias of distance `8 * (x - x0 + jj) + 2 * lm + e - l4 - phase`, where x0 is
    `strip_origin(left, reach)`.

    Args:
        line: fp32, contiguous, entry `r + left` for distance r, constant beyond its ends.
        left, right: its ends.
        phase: 0 to 7, such that tiles start at distances that are multiples of 8 minus `phase`.
        reach: width plus height of the largest tile.
        scale: factor that the sum of QK^T and the strips will take.
        dtype: of the result; 2 bytes give JJ = 4, 4 bytes JJ = 2, so that a thread reads 16 bytes.
    """
    origin = strip_origin(left, reach)
    count = origin + (right + reach) // 8 + 2
    pairs = 16 // (2 * dtype.itemsize)
    strips = torch.empty((line.shape[0], count, 8, 4, pairs, 2), dtype=dtype, device=line.device)
    expand_strips_kernel[(count, line.shape[0])](line, strips, left, right, origin, phase, scale, JJ=pairs, num_warps=1)
    return strips


def strip_origin(left: int, reach: int) -> int:
    """Index of the strip that starts at distance 0."""
    return (left + reach) // 8 + 2


@triton.jit(do_not_specialize=["left", "right", "origin", "phase"])
def expand_strips_kernel(p_line, p_strips, left, right, origin, phase, scale, JJ: tl.constexpr):
    """Grid (strips, heads)."""
    WIDTH: tl.constexpr = 64 * JJ
    x = tl.program_id(0)
    h = tl.program_id(1)
    o_w = tl.arange(0, WIDTH)
    o_r = 8 * (x - origin + o_w // 2 % JJ) + o_w // (2 * JJ) % 4 * 2 + o_w % 2 - o_w // (8 * JJ) - phase
    o_r = tl.minimum(tl.maximum(o_r, -left), right) + left
    b_line = tl.load(p_line + h * (left + right + 1) + o_r) / scale
    tl.store(p_strips + (h * tl.num_programs(0) + x) * WIDTH + o_w, b_line.to(p_strips.dtype.element_ty))


@triton.jit
def load_bias_tile(p_strips, x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr):
    """Bias fp32 `[BLOCK_M, BLOCK_N]` of the tile whose first key and query are `8 * x` positions apart.

    `p_strips` points at the strip of distance 0; WIDTH is the number of entries of a strip.
    """
    JJ: tl.constexpr = WIDTH // 64
    ROWS: tl.constexpr = BLOCK_M // 16
    COLS: tl.constexpr = BLOCK_N // (8 * JJ)
    o_r = tl.arange(0, COLS * 2 * ROWS)  # (column group, upper or lower 8 rows, 16 rows)
    o_x = x + JJ * (o_r // (2 * ROWS)) - 2 * (o_r % ROWS) - (o_r // ROWS) % 2
    b_strips = tl.load(p_strips + o_x[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])
    b_strips = tl.reshape(b_strips, (COLS, 2, ROWS, 8, 4, JJ, 2))
    b_strips = tl.permute(b_strips, (2, 1, 3, 0, 5, 4, 6))
    return tl.reshape(b_strips, (BLOCK_M, BLOCK_N)).to(tl.float32)
