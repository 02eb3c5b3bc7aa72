"""What every backward kernel does with one tile of scores: probabilities, gradient of the scores, tile by tile."""
# mypy: allow-untyped-defs

try:
    import triton
    import triton.language as tl
except ImportError as error:  # a guarded import is what the loader of remote code asks for
    raise ImportError("the attention kernels need Triton") from error

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def segment_bounds(p_cu, s, max_length):
    """First row and length of segment `s`: from the cumulative lengths, or row `s` of a padded batch."""
    if p_cu is not None:
        start = tl.load(p_cu + s).to(tl.int64)
        length = (tl.load(p_cu + s + 1) - start).to(tl.int32)
    else:
        start = s.to(tl.int64) * max_length
        length = max_length
    return start, length


@triton.jit
def load_rows(p_base, start, length, stride_l, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `start` to `start + BLOCK` of one head, `[BLOCK, BLOCK_D]`; zero beyond `length` and the head's width."""
    o_l = tl.arange(0, BLOCK)
    o_d = tl.arange(0, BLOCK_D)
    p_tile = p_base + tl.cast(start, tl.int64) * stride_l + o_l[:, None] * stride_l + o_d[None, :]
    m_tile = (start + o_l < length)[:, None]
    if BLOCK_D != HEAD_DIM:
        m_tile = m_tile & (o_d < HEAD_DIM)[None, :]
    return tl.load(p_tile, mask=m_tile, other=0.0)


@triton.jit
def store_rows(
    p_base, b_tile, start, length, stride_l, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Counterpart of `load_rows`; converts to the element type of `p_base`."""
    o_l = tl.arange(0, BLOCK)
    o_d = tl.arange(0, BLOCK_D)
    p_tile = p_base + tl.cast(start, tl.int64) * stride_l + o_l[:, None] * stride_l + o_d[None, :]
    m_tile = (start + o_l < length)[:, None]
    if BLOCK_D != HEAD_DIM:
        m_tile = m_tile & (o_d < HEAD_DIM)[None, :]
    tl.store(p_tile, b_tile.to(p_base.dtype.element_ty), mask=m_tile)


@triton.jit
def tile_probabilities(
    b_s, b_lse, far, p_line, slope, p_dense, stride_m, stride_n, offset, m0, n0, len_q, len_k, left, right, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr, CAUSAL: tl.constexpr, PLAIN: tl.constexpr,
    KEYS_FIRST: tl.constexpr, WHOLE_ROWS: tl.constexpr,
):  # fmt: skip
    """exp2(scores + bias - lse) of one tile, `[BN, BM]` if KEYS_FIRST else `[BM, BN]`; zero where the key is
    not visible.

    PLAIN: all keys are visible and the bias is the number `far`: one multiply-add and one exp2 per score. Otherwise
    `offset` is the distance key - query of the tile's first key and query, and `p_line` points at the bias (log2
    units) of distance 0 in a line that reaches a tile's width beyond both ends.

    WHOLE_ROWS: the tile holds all keys of its rows, whose probabilities then sum to 1 without the rounding of lse.
    """
    AXIS_M: tl.constexpr = 0 if KEYS_FIRST else 1
    AXIS_N: tl.constexpr = 1 if KEYS_FIRST else 0
    if PLAIN:
        b_p = tl.exp2(b_s * scale_log2 - tl.expand_dims(b_lse - far, AXIS_M))
    else:
        o_m = tl.expand_dims(tl.arange(0, BLOCK_M), AXIS_M)
        o_n = tl.expand_dims(tl.arange(0, BLOCK_N), AXIS_N)
        b_x = b_s * scale_log2 - tl.expand_dims(b_lse, AXIS_M)
        if BIAS == 1:
            # beyond the line's reach the bias is constant, so that the tile may as well be nearer
            p_first = p_line + tl.minimum(tl.maximum(offset, -left - BLOCK_N), right + BLOCK_M)
            b_x += tl.load(p_first + (o_n - o_m))
        elif BIAS == 2:
            b_x -= slope * tl.abs(offset + o_n - o_m)
        elif BIAS == 3:
            p_tile = (
                p_dense
                + tl.cast(m0, tl.int64) * stride_m
                + tl.cast(n0, tl.int64) * stride_n
                + o_m * stride_m
                + o_n * stride_n
            )
            b_x += tl.load(p_tile, mask=(m0 + o_m < len_q) & (n0 + o_n < len_k), other=0.0).to(tl.float32) * LOG2_E
        m_visible = n0 + o_n < len_k
        if CAUSAL:
            m_visible = m_visible & (offset + o_n - o_m <= 0)
        b_p = tl.where(m_visible, tl.exp2(b_x), 0.0)
    if WHOLE_ROWS:
        b_sum = tl.sum(b_p, AXIS_M)
        b_p /= tl.expand_dims(tl.where(b_sum > 0, b_sum, 1.0), AXIS_M)
    return b_p


@triton.jit
def score_gradient(b_p, b_dp, b_delta, AXIS_N: tl.constexpr, WHOLE_ROWS: tl.constexpr):
    """Gradient dS = P * (dP - delta) of one tile, fp32, its keys along AXIS_N.

    WHOLE_ROWS: the tile holds all keys of its rows, so that delta is their sum of P * dP, and `b_delta` is not used. Of
    few keys dS may be a small difference, to which dO @ O brings the rounding of O.
    """
    if WHOLE_ROWS:
        b_delta = tl.sum(b_p * b_dp, AXIS_N)
    return b_p * (b_dp - tl.expand_dims(b_delta, AXIS_N))


@triton.jit
def query_regions(
    n0, len_q, len_k, q_offset, left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Where the blocks of queries that see a block of keys change kind, as multiples of BLOCK_M.

    Blocks of queries from `first` to `near` lie so far before the keys that the bias is constant, those from `near` to
    `far` need the bias or the mask score by score, those from `far` on lie far behind the keys.
    """
    first = 0
    if CAUSAL:
        first = tl.maximum(n0 - q_offset, 0) // BLOCK_M * BLOCK_M
    near = first
    far = len_q
    if (BIAS < 2) & (n0 + BLOCK_N <= len_k):
        if (BIAS == 1) | CAUSAL:
            near = tl.maximum(tl.maximum(n0 - q_offset - right + 1, 0) // BLOCK_M * BLOCK_M, first)
            far = tl.cdiv(tl.maximum(n0 - q_offset + BLOCK_N - 1 + left, 0), BLOCK_M) * BLOCK_M
        else:
            far = 0
    return first, tl.minimum(near, len_q), tl.minimum(far, len_q)


@triton.jit
def key_regions(
    m0, len_k, q_offset, left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Where the blocks of keys that a block of queries sees change kind, as multiples of BLOCK_N.

    Blocks of keys up to `near` lie far behind the queries, those from `near` to `far` need the bias or the mask score
    by score, those from `far` to `full` lie far before the queries; what is left up to `last` is one block not full.
    """
    position = m0 + q_offset
    last = len_k
    if CAUSAL:
        last = tl.maximum(tl.minimum(len_k, position + BLOCK_M), 0)
    full = len_k // BLOCK_N * BLOCK_N
    near = 0
    far = 0
    if BIAS >= 2:
        far = last
    elif (BIAS == 1) | CAUSAL:
        near = tl.minimum(tl.maximum(position - left + 1, 0) // BLOCK_N * BLOCK_N, full)
        far = tl.cdiv(tl.maximum(position + BLOCK_M - 1 + right, 0), BLOCK_N) * BLOCK_N
    near = tl.minimum(near, last)
    far = tl.minimum(tl.maximum(far, near), last)
    return near, far, tl.maximum(tl.minimum(full, last), far), last


@triton.jit
def dropout_keep(
    p_seed, p_drop, s, h, m0, n0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEYS_FIRST: tl.constexpr
):  # fmt: skip
    """Factor on each probability of one tile: 0 where dropped, else 1 / (1 - p_drop).

    Philox on (key, query, head, segment), so that no tiling and no layout changes what is dropped.
    """
    AXIS_M: tl.constexpr = 0 if KEYS_FIRST else 1
    AXIS_N: tl.constexpr = 1 if KEYS_FIRST else 0
    o_m = m0 + tl.expand_dims(tl.arange(0, BLOCK_M), AXIS_M)
    o_n = n0 + tl.expand_dims(tl.arange(0, BLOCK_N), AXIS_N)
    b_random, _, _, _ = tl.philox(tl.load(p_seed), o_n, o_m, h, s)
    return tl.where(tl.uint_to_uniform_float(b_random) > p_drop, 1.0 / (1.0 - p_drop), 0.0)
