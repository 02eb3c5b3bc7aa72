"""Backward kernel that walks the queries for one block of keys: dK, dV, and, when fused, dQ by atomic additions."""
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
    query_regions,
    score_gradient,
    segment_bounds,
    store_rows,
    tile_probabilities,
)


@triton.jit(do_not_specialize=["rows_q", "max_q", "max_k", "q_offset"])
def backward_keys_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dq_tiles, p_dk, p_dv, p_far, p_line, p_slopes, p_dense, p_cu_q, p_cu_k,
    p_lengths_k,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_ob, stride_ol, stride_oh, stride_dkb, stride_dkl, stride_dkh, stride_dvb, stride_dvl, stride_dvh,
    stride_db, stride_dh, stride_dm, stride_dn,
    rows_q, heads, max_q, max_k, q_offset, scale, line_size, left, right, p_drop, seed,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, FUSED: tl.constexpr, LINE_GRADIENT: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (key blocks, heads, segments).

    `p_dq_tiles` holds one fp32 tile `[BLOCK_D, BLOCK_M]` per block of queries and head; `p_far` receives, per program,
    the sums of dS over the tiles beyond either end of the bias line.
    """
    n0 = tl.program_id(0) * BLOCK_N
    h = tl.program_id(1)
    s = tl.program_id(2)
    start_k, len_k = segment_bounds(p_cu_k, s, max_k)
    start_q, len_q = segment_bounds(p_cu_q, s, max_q)
    if LINE_GRADIENT:
        p_program = p_far + ((h * tl.num_programs(2) + s) * tl.num_programs(0) + tl.program_id(0)) * 2
    if n0 >= len_k:
        if LINE_GRADIENT:
            tl.store(p_program, 0.0)
            tl.store(p_program + 1, 0.0)
        return
    end_k = len_k  # rows to write: beyond a padded row's length the gradient is zero
    if p_lengths_k is not None:
        len_k = tl.minimum(len_k, tl.load(p_lengths_k + s))
    if p_cu_q is not None:
        batch = 0
        first_q = start_q
        first_k = start_k
        first_tile = start_q // BLOCK_M + s
    else:
        batch = s.to(tl.int64)
        first_q = batch * 0
        first_k = first_q
        first_tile = batch * tl.cdiv(max_q, BLOCK_M)
    p_q += batch * stride_qb + first_q * stride_ql + h * stride_qh
    p_do += batch * stride_ob + first_q * stride_ol + h * stride_oh
    p_k += batch * stride_kb + first_k * stride_kl + h * stride_kh
    p_v += batch * stride_vb + first_k * stride_vl + h * stride_vh
    p_dk += batch * stride_dkb + first_k * stride_dkl + h * stride_dkh
    p_dv += batch * stride_dvb + first_k * stride_dvl + h * stride_dvh
    p_lse += h.to(tl.int64) * rows_q + start_q
    p_delta += h.to(tl.int64) * rows_q + start_q
    o_m = tl.arange(0, BLOCK_M)
    if FUSED:
        o_d = tl.arange(0, BLOCK_D)
        p_dq = p_dq_tiles + (first_tile * tl.num_programs(1) + h) * (BLOCK_D * BLOCK_M)
        p_dq = p_dq + o_d[:, None] * BLOCK_M + o_m[None, :]
        dq_step = tl.num_programs(1) * (BLOCK_D * BLOCK_M)
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

    b_k = load_rows(p_k, n0, len_k, stride_kl, BLOCK_N, HEAD_DIM, BLOCK_D)
    b_v = load_rows(p_v, n0, len_k, stride_vl, BLOCK_N, HEAD_DIM, BLOCK_D)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_sum_left = tl.zeros([BLOCK_N], tl.float32)
    b_sum_right = tl.zeros([BLOCK_N], tl.float32)
    first, near, far = query_regions(n0, len_q, len_k, q_offset, left, right, BLOCK_M, BLOCK_N, BIAS, CAUSAL)
    if n0 >= len_k:
        first, near, far = len_q, len_q, len_q
    for region in tl.static_range(3):  # far before the keys; near; far behind
        begin = first if region == 0 else near if region == 1 else far
        end = near if region == 0 else far if region == 1 else len_q
        for m0 in range(begin, end, BLOCK_M):
            b_q = load_rows(p_q, m0, len_q, stride_ql, BLOCK_M, HEAD_DIM, BLOCK_D)
            b_do = load_rows(p_do, m0, len_q, stride_ol, BLOCK_M, HEAD_DIM, BLOCK_D)
            b_lse = tl.load(p_lse + m0 + o_m, mask=m0 + o_m < len_q, other=float("inf"))
            b_delta = tl.load(p_delta + m0 + o_m, mask=m0 + o_m < len_q, other=0.0)
            offset = n0 - m0 - q_offset
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
            b_p = tile_probabilities(
                b_s, b_lse, far_right if region == 0 else far_left, p_line, slope, p_dense, stride_dm, stride_dn,
                offset,
                m0, n0, len_q, len_k, left, right, scale_log2, BLOCK_M, BLOCK_N, BIAS, CAUSAL, region != 1, True,
                WHOLE_ROWS,
            )  # fmt: skip
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
            if DROPOUT:
                b_keep = dropout_keep(seed, p_drop, s, h, m0, n0, BLOCK_M, BLOCK_N, True)
                b_dv = tl.dot((b_p * b_keep).to(b_do.dtype), b_do, b_dv, input_precision="ieee")
                b_dp *= b_keep
            else:
                b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
            b_ds = score_gradient(b_p, b_dp, b_delta, 0, WHOLE_ROWS)
            if LINE_GRADIENT:
                b_row = tl.sum(b_ds, 1)
                if region == 0:
                    b_sum_right += b_row
                elif region == 2:
                    b_sum_left += b_row
                else:  # the last block of keys, if not full, is near for the mask's sake
                    b_sum_left += tl.where(offset + BLOCK_N - 1 <= -left, b_row, 0.0)
                    b_sum_right += tl.where(offset - (BLOCK_M - 1) >= right, b_row, 0.0)
            b_ds = b_ds.to(b_q.dtype)
            b_dk = tl.dot(b_ds, b_q, b_dk, input_precision="ieee")
            if FUSED:
                b_dq = tl.dot(tl.trans(b_k), b_ds, input_precision="ieee")
                tl.atomic_add(p_dq + tl.cast(m0 // BLOCK_M, tl.int64) * dq_step, b_dq, sem="relaxed")
    store_rows(p_dk, b_dk * scale, n0, end_k, stride_dkl, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_rows(p_dv, b_dv, n0, end_k, stride_dvl, BLOCK_N, HEAD_DIM, BLOCK_D)
    if LINE_GRADIENT:
        tl.store(p_program, tl.sum(b_sum_left, 0))
        tl.store(p_program + 1, tl.sum(b_sum_right, 0))
