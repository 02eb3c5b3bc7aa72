"""Forward kernel: one block of queries of one head of one segment, over the keys it sees."""
# mypy: allow-untyped-defs

try:
    import triton
    import triton.language as tl
except ImportError as error:  # a guarded import is what the loader of remote code asks for
    raise ImportError("the attention kernels need Triton") from error

from .ops_attention_backward_tile import dropout_keep, load_rows, segment_bounds, store_rows
from .ops_attention_strips import load_bias_tile

LOG2_E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def forward_regions(
    m0, len_k, q_offset, left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Where the blocks of keys that a block of queries sees change kind, as multiples of BLOCK_N.

    Full blocks up to `near` lie far before the queries, those from `near` to `far` need the bias or the causal
    mask score by score, those from `far` to `full` lie far behind the queries; from `full` to `last` at most one
    block is left, which is not full.
    """
    position = m0 + q_offset
    last = len_k
    if CAUSAL:
        last = tl.maximum(tl.minimum(len_k, position + BLOCK_M), 0)
    full = len_k // BLOCK_N * BLOCK_N
    near = 0
    far = 0
    if BIAS >= 2:
        far = full
    elif (BIAS == 1) | CAUSAL:
        if BIAS == 1:
            near = tl.maximum(position - left + 1, 0) // BLOCK_N * BLOCK_N
            far = tl.cdiv(tl.maximum(position + BLOCK_M - 1 + right, 0), BLOCK_N) * BLOCK_N
        else:
            near = tl.maximum(position + 1, 0) // BLOCK_N * BLOCK_N
        if CAUSAL:
            far = tl.cdiv(last, BLOCK_N) * BLOCK_N
    near = tl.minimum(near, full)
    far = tl.minimum(tl.maximum(far, near), full)
    if CAUSAL:
        full = tl.minimum(full, far)
    return near, far, full, tl.maximum(last, full)


@triton.jit
def attend_block(
    b_q, b_out, b_max, b_sum, p_k, p_v, desc_k, desc_v, row_k, row_v, col_k, col_v, p_strips, p_dense, far, slope,
    seed, p_drop, s, h, heads, max_q, max_k, m0, n0, left, right, len_q, len_k, q_offset, stride_kl, stride_vl,
    stride_dm, stride_dn, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BIAS: tl.constexpr,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, TAIL: tl.constexpr, TMA: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax. BIAS and CAUSAL say what has to be done score by score."""
    if TMA and not TAIL:
        b_k = desc_k.load([row_k + n0, col_k])
    else:
        b_k = load_rows(p_k, n0, len_k if TAIL else n0 + BLOCK_N, stride_kl, BLOCK_N, HEAD_DIM, BLOCK_D)
    offset = n0 - m0 - q_offset
    if BIAS == 1:
        x = (offset + (q_offset & 7)) // 8
        if TAIL:  # beyond the strips' reach the bias is constant: any tile as far will do
            x = tl.minimum(tl.maximum(x, -((left + BLOCK_N) // 8) - 1), (right + BLOCK_M) // 8 + 2)
        b_bias = load_bias_tile(p_strips, x, BLOCK_M, BLOCK_N, WIDTH)
        b_s = tl.dot(b_q, tl.trans(b_k), b_bias, input_precision="ieee")
    else:
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    if BIAS >= 2 or CAUSAL or TAIL:
        o_m = tl.arange(0, BLOCK_M)[:, None]
        o_n = tl.arange(0, BLOCK_N)[None, :]
        b_s *= scale_log2
        if BIAS == 2:
            b_s -= slope * tl.abs(offset + o_n - o_m)
        elif BIAS == 3:
            p_tile = p_dense + tl.cast(m0, tl.int64) * stride_dm + tl.cast(n0, tl.int64) * stride_dn
            p_tile += o_m * stride_dm + o_n * stride_dn
            b_s += tl.load(p_tile, mask=(m0 + o_m < len_q) & (n0 + o_n < len_k), other=0.0).to(tl.float32) * LOG2_E
        m_visible = n0 + o_n < len_k
        if CAUSAL:
            m_visible = m_visible & (offset + o_n - o_m <= 0)
        b_s = tl.where(m_visible, b_s, -INFINITY)
        b_new = tl.maximum(b_max, tl.max(b_s, 1) + far)
        b_base = tl.where(b_new == -INFINITY, 0.0, b_new)
        b_p = tl.exp2(b_s - (b_base - far)[:, None])
    else:
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2 + far)
        b_base = tl.where(b_new == -INFINITY, 0.0, b_new)
        b_p = tl.exp2(b_s * scale_log2 - (b_base - far)[:, None])
    b_rescale = tl.exp2(b_max - b_base)
    b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
    if DROPOUT:
        b_p *= dropout_keep(seed, p_drop, s, h, m0, n0, BLOCK_M, BLOCK_N, False)
    b_out = b_out * b_rescale[:, None]
    if TMA and not TAIL:
        b_v = desc_v.load([row_v + n0, col_v])
    else:
        b_v = load_rows(p_v, n0, len_k if TAIL else n0 + BLOCK_N, stride_vl, BLOCK_N, HEAD_DIM, BLOCK_D)
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out, input_precision="ieee")
    return b_out, b_new, b_sum


@triton.jit(
    do_not_specialize=[
        "rows_kb", "rows_kh", "cols_kh", "rows_vb", "rows_vh", "cols_vh", "rows_q", "heads", "max_q", "max_k",
        "q_offset",
        "left", "right", "strip_origin", "strips",
    ]
)  # fmt: skip
def forward_kernel(
    p_q, p_k, p_v, p_out, p_lse, desc_k, desc_v, p_line, p_strips, p_slopes, p_dense, p_cu_q, p_cu_k, p_lengths_k,
    p_seed, stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_ob, stride_ol, stride_oh, stride_db, stride_dh, stride_dm, stride_dn, rows_kb, rows_kh, cols_kh,
    rows_vb, rows_vh, cols_vh, rows_q, heads, max_q, max_k, q_offset, scale, left, right, strip_origin, strips,
    p_drop,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BIAS: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, TMA: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid (query blocks, heads, segments)."""
    block = tl.program_id(0)
    if CAUSAL:  # the longest rows first
        block = tl.num_programs(0) - 1 - block
    m0 = block * BLOCK_M
    h = tl.program_id(1)
    s = tl.program_id(2)
    start_q, len_q = segment_bounds(p_cu_q, s, max_q)
    start_k, len_k = segment_bounds(p_cu_k, s, max_k)
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
    p_k += batch * stride_kb + first_k * stride_kl + h * stride_kh
    p_v += batch * stride_vb + first_k * stride_vl + h * stride_vh
    p_out += batch * stride_ob + first_q * stride_ol + h * stride_oh
    row_k = (batch * rows_kb + first_k).to(tl.int32) + h * rows_kh
    row_v = (batch * rows_vb + first_k).to(tl.int32) + h * rows_vh
    col_k = h * cols_kh
    col_v = h * cols_vh
    scale_log2 = scale * LOG2_E
    slope = 0.0
    far_left = 0.0
    far_right = 0.0
    if BIAS == 1:
        p_line += h * (left + right + 1)
        far_left = tl.load(p_line) * LOG2_E
        far_right = tl.load(p_line + left + right) * LOG2_E
        p_strips += (h * strips + strip_origin) * WIDTH
    elif BIAS == 2:
        slope = tl.load(p_slopes + h) * LOG2_E
    elif BIAS == 3:
        p_dense += batch * stride_db + h.to(tl.int64) * stride_dh
    seed = p_seed

    b_q = load_rows(p_q, m0, len_q, stride_ql, BLOCK_M, HEAD_DIM, BLOCK_D)
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_M], -INFINITY, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    near, far, full, last = forward_regions(m0, len_k, q_offset, left, right, BLOCK_M, BLOCK_N, BIAS, CAUSAL)
    if (BIAS == 1) | CAUSAL | (BIAS >= 2):
        for n0 in range(near, far, BLOCK_N):
            b_out, b_max, b_sum = attend_block(
                b_q, b_out, b_max, b_sum, p_k, p_v, desc_k, desc_v, row_k, row_v, col_k, col_v, p_strips, p_dense,
                0.0, slope, seed, p_drop, s, h, heads, max_q, max_k, m0, n0, left, right, len_q, len_k, q_offset,
                stride_kl, stride_vl, stride_dm,
                stride_dn, scale_log2, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, BIAS, CAUSAL, DROPOUT, False, TMA, WIDTH,
            )  # fmt: skip
    if BIAS < 2:
        for n in range(0, near + full - far, BLOCK_N):
            before = n < near
            n0 = tl.where(before, n, n - near + far)
            b_out, b_max, b_sum = attend_block(
                b_q, b_out, b_max, b_sum, p_k, p_v, desc_k, desc_v, row_k, row_v, col_k, col_v, p_strips, p_dense,
                tl.where(before, far_left, far_right), slope, seed, p_drop, s, h, heads, max_q, max_k, m0, n0, left,
                right, len_q, len_k, q_offset,
                stride_kl, stride_vl, stride_dm, stride_dn, scale_log2, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, 0, False,
                DROPOUT, False, TMA, WIDTH,
            )  # fmt: skip
    if full < last:
        b_out, b_max, b_sum = attend_block(
            b_q, b_out, b_max, b_sum, p_k, p_v, desc_k, desc_v, row_k, row_v, col_k, col_v, p_strips, p_dense,
            0.0, slope, seed, p_drop, s, h, heads, max_q, max_k, m0, full, left, right, len_q, len_k, q_offset,
            stride_kl, stride_vl, stride_dm,
            stride_dn, scale_log2, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, BIAS, CAUSAL, DROPOUT, True, TMA, WIDTH,
        )  # fmt: skip
    b_out = b_out / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    store_rows(p_out, b_out, m0, len_q, stride_ol, BLOCK_M, HEAD_DIM, BLOCK_D)
    o_m = m0 + tl.arange(0, BLOCK_M)
    b_lse = tl.where(b_sum == 0.0, INFINITY, b_max + tl.log2(b_sum))
    tl.store(p_lse + h.to(tl.int64) * rows_q + start_q + o_m, b_lse, mask=o_m < len_q)
