"""Gradient of the bias: T5's line (near tiles summed in registers, then along their diagonals), and a dense bias."""
# mypy: allow-untyped-defs

try:
    import triton
    import triton.language as tl
except ImportError as error:  # a guarded import is what the loader of remote code asks for
    raise ImportError("the attention kernels need Triton") from error

from .ops_attention_backward_tile import (
    LOG2_E,
    dropout_keep,
    load_rows,
    score_gradient,
    segment_bounds,
    tile_probabilities,
)


@triton.jit
def tile_score_gradient(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_line, p_dense, p_slopes, stride_ql, stride_kl, stride_vl, stride_ol,
    stride_dm,
    stride_dn, s, h, heads, m0, n0, len_q, len_k, max_q, max_k, q_offset, left, right, scale_log2, p_drop, seed,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, WHOLE_ROWS: tl.constexpr,
):  # fmt: skip
    """Gradient dS of one tile, `[BM, BN]`, fp32; the pointers point at the head's first row in the segment."""
    o_m = m0 + tl.arange(0, BLOCK_M)
    b_q = load_rows(p_q, m0, len_q, stride_ql, BLOCK_M, HEAD_DIM, BLOCK_D)
    b_do = load_rows(p_do, m0, len_q, stride_ol, BLOCK_M, HEAD_DIM, BLOCK_D)
    b_k = load_rows(p_k, n0, len_k, stride_kl, BLOCK_N, HEAD_DIM, BLOCK_D)
    b_v = load_rows(p_v, n0, len_k, stride_vl, BLOCK_N, HEAD_DIM, BLOCK_D)
    b_lse = tl.load(p_lse + o_m, mask=(o_m >= 0) & (o_m < len_q), other=float("inf"))
    b_delta = tl.load(p_delta + o_m, mask=(o_m >= 0) & (o_m < len_q), other=0.0)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    b_p = tile_probabilities(
        b_s, b_lse, 0.0, p_line, 0.0, p_dense, stride_dm, stride_dn, n0 - m0 - q_offset, m0, n0, len_q, len_k, left,
        right, scale_log2, BLOCK_M, BLOCK_N, BIAS, CAUSAL, False, False, WHOLE_ROWS,
    )  # fmt: skip
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
    if DROPOUT:
        b_dp *= dropout_keep(seed, p_drop, s, h, m0, n0, BLOCK_M, BLOCK_N, False)
    return score_gradient(b_p, b_dp, b_delta, 1, WHOLE_ROWS)


@triton.jit(do_not_specialize=["rows_q", "max_q", "max_k", "q_offset", "blocks"])
def near_tiles_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_line, p_tiles, p_cu_q, p_cu_k, p_lengths_k, p_block_segment,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_ob, stride_ol, stride_oh, rows_q, heads, max_q, max_k, q_offset, scale, line_size, left, right,
    first_offset, blocks,
    p_drop, seed,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr, WHOLE_ROWS: tl.constexpr,
):  # fmt: skip
    """Sum of dS over all tiles at one distance from the diagonal. Grid (tile offsets, splits, heads).

    Tile offset t has first key minus first query position `first_offset + t * min(BLOCK_M, BLOCK_N)`; split i takes
    every n-th of all blocks (of queries or keys, whichever are larger) of all segments, and writes one fp32 tile.
    """
    t = tl.program_id(0)
    split = tl.program_id(1)
    h = tl.program_id(2)
    BLOCK: tl.constexpr = BLOCK_M if BLOCK_M >= BLOCK_N else BLOCK_N
    STEP: tl.constexpr = BLOCK_N if BLOCK_M >= BLOCK_N else BLOCK_M
    shift = first_offset + t * STEP + q_offset  # first key minus first query, as indices
    p_line += h * line_size + (left + BLOCK_M + BLOCK_N)
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(split, blocks, tl.num_programs(1)):
        if p_cu_q is not None:
            s = tl.load(p_block_segment + block)
            larger = tl.load((p_cu_q if BLOCK_M >= BLOCK_N else p_cu_k) + s)
            i = block - larger // BLOCK - s
        else:
            per_segment = tl.cdiv(max_q if BLOCK_M >= BLOCK_N else max_k, BLOCK)
            s = block // per_segment
            i = block - s * per_segment
        start_q, len_q = segment_bounds(p_cu_q, s, max_q)
        start_k, len_k = segment_bounds(p_cu_k, s, max_k)
        if p_lengths_k is not None:
            len_k = tl.minimum(len_k, tl.load(p_lengths_k + s))
        if BLOCK_M >= BLOCK_N:
            m0 = i * BLOCK
            n0 = m0 + shift
        else:
            n0 = i * BLOCK
            m0 = n0 - shift
        # a tile off either edge loads no row, and adds zero
        m_inside = (m0 >= 0) & (n0 >= 0)
        len_q = tl.where(m_inside, len_q, -(1 << 30))
        len_k = tl.where(m_inside, len_k, -(1 << 30))
        if p_cu_q is not None:
            batch = start_q * 0
            first_q = start_q
            first_k = start_k
        else:
            batch = s.to(tl.int64)
            first_q = batch * 0
            first_k = first_q
        b_sum += tile_score_gradient(
            p_q + batch * stride_qb + first_q * stride_ql + h * stride_qh,
            p_k + batch * stride_kb + first_k * stride_kl + h * stride_kh,
            p_v + batch * stride_vb + first_k * stride_vl + h * stride_vh,
            p_do + batch * stride_ob + first_q * stride_ol + h * stride_oh,
            p_lse + h.to(tl.int64) * rows_q + start_q, p_delta + h.to(tl.int64) * rows_q + start_q, p_line, None, None,
            stride_ql, stride_kl, stride_vl, stride_ol, 0, 0, s, h, heads, m0, n0, len_q, len_k, max_q, max_k,
            q_offset, left,
            right, scale * LOG2_E, p_drop, seed, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, 1, CAUSAL, DROPOUT,
            WHOLE_ROWS,
        )  # fmt: skip
    o_tile = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tile = (h * tl.num_programs(0) + t) * tl.num_programs(1) + split
    tl.store(p_tiles + tile.to(tl.int64) * (BLOCK_M * BLOCK_N) + o_tile, b_sum)


@triton.jit
def pad_line_kernel(p_line, p_padded, size, reach, factor, BLOCK: tl.constexpr):
    """A head's line times `factor`, its ends repeated `reach` times. Grid (heads, padded size / BLOCK)."""
    h = tl.program_id(0)
    o_l = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    width = size + 2 * reach
    b_line = tl.load(p_line + h * size + tl.minimum(tl.maximum(o_l - reach, 0), size - 1))
    tl.store(p_padded + h * width + o_l, b_line * factor, mask=o_l < width)


@triton.jit(do_not_specialize=["splits"])
def diagonal_sums_kernel(
    p_tiles,
    p_sums,
    splits,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """Sums of one tile offset's tiles along their diagonals, over all splits. Grid (offset and head, diagonals
    / BLOCK_C).

    Diagonal c of a tile holds the pairs with key minus query c - (BLOCK_M - 1) away from the tile's first pair.
    """
    tile = tl.program_id(0)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_m = tl.arange(0, BLOCK_M)
    o_n = o_c[None, :] - (BLOCK_M - 1) + o_m[:, None]
    m_tile = (o_n >= 0) & (o_n < BLOCK_N)
    b_sum = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    p_tiles += tile.to(tl.int64) * splits * (BLOCK_M * BLOCK_N)
    o_tile = o_n * BLOCK_M + o_m[:, None] if KEYS_FIRST else o_m[:, None] * BLOCK_N + o_n
    for split in tl.range(0, splits, loop_unroll_factor=8):
        b_sum += tl.load(p_tiles + split * (BLOCK_M * BLOCK_N) + o_tile, mask=m_tile, other=0.0)
    tl.store(p_sums + tile * (tl.num_programs(1) * BLOCK_C) + o_c, tl.sum(b_sum, 0))


@triton.jit(do_not_specialize=["blocks"])
def near_diagonals_kernel(p_near, p_sums, blocks, rows, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sums over all blocks of keys of the near sums `[H, blocks, rows, 16]`, of which column f of row y belongs to
    diagonal 8 y + f. Grid (heads, diagonals / BLOCK_C).
    """
    h = tl.program_id(0)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_b = tl.arange(0, BLOCK_B)
    o_y = o_c // 8
    b_sum = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    p_near += h.to(tl.int64) * blocks * (rows * 16) + o_y * 16 + o_c % 8
    for first in range(0, blocks, BLOCK_B):
        p_block = p_near[None, :] + (first + o_b)[:, None].to(tl.int64) * (rows * 16)
        m_block = (first + o_b < blocks)[:, None]
        b_sum += tl.load(p_block, mask=m_block & (o_y < rows)[None, :], other=0.0)
        b_sum += tl.load(p_block - 8, mask=m_block & ((o_y > 0) & (o_y <= rows))[None, :], other=0.0)
    tl.store(p_sums + h * (tl.num_programs(1) * BLOCK_C) + o_c, tl.sum(b_sum, 0))


@triton.jit(do_not_specialize=["far_pairs"])
def line_gradient_kernel(
    p_sums, p_far, p_dline, offsets, first_distance, step, left, right, far_pairs, WIDTH: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Gradient of one head's line, from rows of WIDTH diagonal sums of the near tiles and the sums over the far ones.
    Grid (heads).
    """
    h = tl.program_id(0)
    o_l = tl.arange(0, BLOCK_L)  # entry of the line
    o_c = tl.arange(0, WIDTH)
    b_line = tl.zeros([BLOCK_L], tl.float32)
    b_left = tl.zeros([WIDTH], tl.float32)
    b_right = tl.zeros([WIDTH], tl.float32)
    for t in range(offsets):
        first = first_distance + t * step  # distance of diagonal 0
        p_row = p_sums + (h * offsets + t) * WIDTH
        o_d = o_l - left - first
        b_line += tl.load(p_row + o_d, mask=(o_d >= 0) & (o_d < WIDTH) & (o_l > 0) & (o_l < left + right), other=0.0)
        b_row = tl.load(p_row + o_c)
        b_left += tl.where(first + o_c <= -left, b_row, 0.0)
        b_right += tl.where(first + o_c >= right, b_row, 0.0)
    b_far_left = tl.zeros([BLOCK_F], tl.float32)
    b_far_right = tl.zeros([BLOCK_F], tl.float32)
    o_f = tl.arange(0, BLOCK_F)
    for f in range(0, far_pairs, BLOCK_F):
        p_pair = p_far + (h * far_pairs + f + o_f) * 2
        b_far_left += tl.load(p_pair, mask=f + o_f < far_pairs, other=0.0)
        b_far_right += tl.load(p_pair + 1, mask=f + o_f < far_pairs, other=0.0)
    b_line = tl.where(o_l == 0, tl.sum(b_left, 0) + tl.sum(b_far_left, 0), b_line)
    b_line = tl.where(o_l == left + right, tl.sum(b_right, 0) + tl.sum(b_far_right, 0), b_line)
    tl.store(p_dline + h * (left + right + 1) + o_l, b_line, mask=o_l <= left + right)


@triton.jit(do_not_specialize=["rows_q", "batches", "max_q", "max_k", "q_offset"])
def dense_gradient_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dense, p_ddense, p_lengths_k,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_ob, stride_ol, stride_oh, stride_db, stride_dh, stride_dm, stride_dn,
    rows_q, batches, heads, grad_heads, max_q, max_k, q_offset, scale, p_drop, seed,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr, WHOLE_ROWS: tl.constexpr,
):  # fmt: skip
    """Sum dS over the batch rows and heads that share a dense bias. Grid (query blocks, key blocks, batch x heads)."""
    m0 = tl.program_id(0) * BLOCK_M
    n0 = tl.program_id(1) * BLOCK_N
    grad_batch = tl.program_id(2) // grad_heads
    grad_head = tl.program_id(2) % grad_heads
    shared_batches = batches if tl.num_programs(2) == grad_heads else 1
    shared_heads = heads if grad_heads == 1 else 1
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(shared_batches * shared_heads):
        s = grad_batch + i // shared_heads
        h = grad_head + i % shared_heads
        batch = s.to(tl.int64)
        len_k = max_k
        if p_lengths_k is not None:
            len_k = tl.minimum(len_k, tl.load(p_lengths_k + s))
        row = h.to(tl.int64) * rows_q + batch * max_q
        b_sum += tile_score_gradient(
            p_q + batch * stride_qb + h * stride_qh, p_k + batch * stride_kb + h * stride_kh,
            p_v + batch * stride_vb + h * stride_vh, p_do + batch * stride_ob + h * stride_oh, p_lse + row,
            p_delta + row,
            None, p_dense + batch * stride_db + h.to(tl.int64) * stride_dh, None, stride_ql, stride_kl, stride_vl,
            stride_ol, stride_dm, stride_dn, s, h, heads, m0, n0, max_q, len_k, max_q, max_k, q_offset, 0, 0,
            scale * LOG2_E,
            p_drop, seed, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, 3, CAUSAL, DROPOUT,
            WHOLE_ROWS,
        )  # fmt: skip
    o_m = m0 + tl.arange(0, BLOCK_M)
    o_n = n0 + tl.arange(0, BLOCK_N)
    p_head = p_ddense + tl.program_id(2).to(tl.int64) * max_q * max_k
    p_tile = p_head + o_m.to(tl.int64)[:, None] * max_k + o_n[None, :]
    tl.store(p_tile, b_sum.to(p_ddense.dtype.element_ty), mask=(o_m < max_q)[:, None] & (o_n < max_k)[None, :])
