"""Backward kernels over the queries: delta before, dQ of the deterministic form, and dQ's last step of the
fused form.
"""
# mypy: allow-untyped-defs

try:
    import triton
    import triton.language as tl
except ImportError as error:  # a guarded import is what the loader of remote code asks for
    raise ImportError("the attention kernels need Triton") from error

from .ops_attention_backward_tile import (
    LOG2_E,
    dropout_keep,
    key_regions,
    load_rows,
    score_gradient,
    segment_bounds,
    store_rows,
    tile_probabilities,
)


@triton.jit(do_not_specialize=["rows_q", "max_q"])
def delta_kernel(
    p_out, p_do, p_lse, p_delta, p_dq_tiles, p_row_tiles, p_cu_q, stride_ob, stride_ol, stride_oh,
    stride_gb, stride_gl, stride_gh, rows_q,
    max_q, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Delta = rowsum(dO * O), fp32; clears the tiles to which the fused form adds dQ. Grid (query blocks,
    heads, segments).

    The Hopper kernel takes lse and delta in tiles too, `[2, BLOCK_M]` per block of queries and head, +inf and 0 beyond
    the segment.
    """
    m0 = tl.program_id(0) * BLOCK_M
    h = tl.program_id(1)
    s = tl.program_id(2)
    start_q, len_q = segment_bounds(p_cu_q, s, max_q)
    if m0 >= len_q:
        return
    if p_cu_q is not None:
        batch = start_q * 0
        first_q = start_q
        first_tile = start_q // BLOCK_M + s
    else:
        batch = s.to(tl.int64)
        first_q = batch * 0
        first_tile = batch * tl.cdiv(max_q, BLOCK_M)
    p_out += batch * stride_ob + first_q * stride_ol + h * stride_oh
    p_do += batch * stride_gb + first_q * stride_gl + h * stride_gh
    b_out = load_rows(p_out, m0, len_q, stride_ol, BLOCK_M, HEAD_DIM, BLOCK_D).to(tl.float32)
    b_do = load_rows(p_do, m0, len_q, stride_gl, BLOCK_M, HEAD_DIM, BLOCK_D).to(tl.float32)
    o_m = m0 + tl.arange(0, BLOCK_M)
    b_delta = tl.sum(b_out * b_do, 1)
    row = h.to(tl.int64) * rows_q + start_q
    tl.store(p_delta + row + o_m, b_delta, mask=o_m < len_q)
    tile = (first_tile + m0 // BLOCK_M) * tl.num_programs(1) + h
    if p_row_tiles is not None:
        b_lse = tl.load(p_lse + row + o_m, mask=o_m < len_q, other=float("inf"))
        p_rows = p_row_tiles + tile * (2 * BLOCK_M) + tl.arange(0, BLOCK_M)
        tl.store(p_rows, b_lse)
        tl.store(p_rows + BLOCK_M, b_delta)
    if FUSED:
        p_tile = p_dq_tiles + tile * (BLOCK_D * BLOCK_M)
        o_tile = tl.arange(0, BLOCK_D)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        tl.store(p_tile + o_tile, tl.zeros([BLOCK_D, BLOCK_M], tl.float32))


@triton.jit(do_not_specialize=["max_q"])
def dq_store_kernel(
    p_dq_tiles, p_dq, p_cu_q, stride_qb, stride_ql, stride_qh, max_q, scale, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, REGISTER_ORDER: tl.constexpr,
):  # fmt: skip
    """Store dQ in its own layout and element type from the fused form's fp32 tiles. Grid (query blocks, heads,
    segments).

    REGISTER_ORDER: the tiles lie as the Hopper kernel's `register_order` left them.
    """
    m0 = tl.program_id(0) * BLOCK_M
    h = tl.program_id(1)
    s = tl.program_id(2)
    start_q, len_q = segment_bounds(p_cu_q, s, max_q)
    if m0 >= len_q:
        return
    if p_cu_q is not None:
        p_dq += start_q * stride_ql
        first_tile = start_q // BLOCK_M + s
    else:
        p_dq += s.to(tl.int64) * stride_qb
        first_tile = s.to(tl.int64) * tl.cdiv(max_q, BLOCK_M)
    p_tile = p_dq_tiles + ((first_tile + m0 // BLOCK_M) * tl.num_programs(1) + h) * (BLOCK_D * BLOCK_M)
    if REGISTER_ORDER:
        b_dq = tl.load(p_tile + tl.arange(0, BLOCK_D * BLOCK_M))
        b_dq = tl.reshape(b_dq, [BLOCK_M // 8, BLOCK_D // 16, 8, 4, 2, 2])
        b_dq = tl.reshape(tl.permute(b_dq, [1, 4, 2, 0, 3, 5]), [BLOCK_D, BLOCK_M])
    else:
        b_dq = tl.load(p_tile + tl.arange(0, BLOCK_D)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :])
    b_dq = tl.trans(b_dq) * scale
    store_rows(p_dq + h * stride_qh, b_dq, m0, len_q, stride_ql, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["rows_q", "max_q", "max_k", "q_offset"])
def backward_queries_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dq, p_line, p_slopes, p_dense, p_cu_q, p_cu_k, p_lengths_k,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_ob, stride_ol, stride_oh, stride_dqb, stride_dql, stride_dqh, stride_db, stride_dh, stride_dm, stride_dn,
    rows_q, heads, max_q, max_k, q_offset, scale, line_size, left, right, p_drop, seed,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, WHOLE_ROWS: tl.constexpr,
):  # fmt: skip
    """Compute dQ of one block of queries, walking the keys. Grid (query blocks, heads, segments)."""
    m0 = tl.program_id(0) * BLOCK_M
    h = tl.program_id(1)
    s = tl.program_id(2)
    start_k, len_k = segment_bounds(p_cu_k, s, max_k)
    start_q, len_q = segment_bounds(p_cu_q, s, max_q)
    if m0 >= len_q:
        return
    if p_lengths_k is not None:
        len_k = tl.minimum(len_k, tl.load(p_lengths_k + s))
    if p_cu_q is not None:
        batch = start_q * 0
        first_q = start_q
        first_k = start_k
    else:
        batch = s.to(tl.int64)
        first_q = batch * 0
        first_k = first_q
    p_q += batch * stride_qb + first_q * stride_ql + h * stride_qh
    p_do += batch * stride_ob + first_q * stride_ol + h * stride_oh
    p_dq += batch * stride_dqb + first_q * stride_dql + h * stride_dqh
    p_k += batch * stride_kb + first_k * stride_kl + h * stride_kh
    p_v += batch * stride_vb + first_k * stride_vl + h * stride_vh
    p_lse += h.to(tl.int64) * rows_q + start_q
    p_delta += h.to(tl.int64) * rows_q + start_q
    slope = 0.0
    far_left = 0.0
    far_right = 0.0
    if BIAS == 1:
        p_line += h * line_size + (left + BLOCK_M + BLOCK_N)
        far_left = tl.load(p_line - left)
        far_right = tl.load(p_line + right)
    elif BIAS == 2:
        slope = tl.load(p_slopes + h) * LOG2_E
    elif BIAS == 3:
        p_dense += batch * stride_db + h.to(tl.int64) * stride_dh
    scale_log2 = scale * LOG2_E

    o_m = m0 + tl.arange(0, BLOCK_M)
    b_q = load_rows(p_q, m0, len_q, stride_ql, BLOCK_M, HEAD_DIM, BLOCK_D)
    b_do = load_rows(p_do, m0, len_q, stride_ol, BLOCK_M, HEAD_DIM, BLOCK_D)
    b_lse = tl.load(p_lse + o_m, mask=o_m < len_q, other=float("inf"))
    b_delta = tl.load(p_delta + o_m, mask=o_m < len_q, other=0.0)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    near, far, full, last = key_regions(m0, len_k, q_offset, left, right, BLOCK_M, BLOCK_N, BIAS, CAUSAL)
    for region in tl.static_range(4):  # far behind the queries; near; far before; the last block of keys, if not full
        begin = 0 if region == 0 else near if region == 1 else far if region == 2 else full
        end = near if region == 0 else far if region == 1 else full if region == 2 else last
        for n0 in range(begin, end, BLOCK_N):
            b_k = load_rows(p_k, n0, len_k, stride_kl, BLOCK_N, HEAD_DIM, BLOCK_D)
            b_v = load_rows(p_v, n0, len_k, stride_vl, BLOCK_N, HEAD_DIM, BLOCK_D)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            b_p = tile_probabilities(
                b_s, b_lse, far_left if region == 0 else far_right, p_line, slope, p_dense, stride_dm, stride_dn,
                n0 - m0 - q_offset, m0, n0, len_q, len_k, left, right, scale_log2, BLOCK_M, BLOCK_N, BIAS, CAUSAL,
                region == 0 or region == 2, False, WHOLE_ROWS,
            )  # fmt: skip
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
            if DROPOUT:
                b_dp *= dropout_keep(seed, p_drop, s, h, m0, n0, BLOCK_M, BLOCK_N, False)
            b_ds = score_gradient(b_p, b_dp, b_delta, 1, WHOLE_ROWS).to(b_k.dtype)
            b_dq = tl.dot(b_ds, b_k, b_dq, input_precision="ieee")
    store_rows(p_dq, b_dq * scale, m0, len_q, stride_dql, BLOCK_M, HEAD_DIM, BLOCK_D)
