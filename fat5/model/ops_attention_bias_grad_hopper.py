"""Sums of dS over the tiles near the diagonal for sm_90, in Gluon: keys slide through shared memory past the
queries.
"""
# mypy: allow-untyped-defs, disable-error-code="assignment"

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import async_copy
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
except ImportError as error:  # a guarded import is what the loader of remote code asks for
    raise ImportError("the attention kernels need Triton") from error

from .ops_attention_backward_hopper import bias_tile, issue_tile, tile_of

LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def place_of(
    item, items, p_cu_q, p_cu_k, p_lengths_k, p_item_segment, max_q, max_k, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr
):
    """Of one block of BLOCK_N queries: segment, batch row, index, first query and key row, lengths, first tile
    of lse.
    """
    item = gl.minimum(item, items - 1)
    if p_cu_q is not None:
        s = gl.load(p_item_segment + item)
        batch = s * 0
        first_q = gl.load(p_cu_q + s)
        first_k = gl.load(p_cu_k + s)
        j = item - first_q // BLOCK_N - s
        len_q = gl.load(p_cu_q + s + 1) - first_q
        len_k = gl.load(p_cu_k + s + 1) - first_k
        first_tile = first_q // BLOCK_M + s
    else:
        per_segment = (max_q + BLOCK_N - 1) // BLOCK_N
        s = item // per_segment
        batch = s
        first_q = s * 0
        first_k = s * 0
        j = item - s * per_segment
        len_q = max_q
        len_k = max_k
        first_tile = s * ((max_q + BLOCK_M - 1) // BLOCK_M)
    if p_lengths_k is not None:
        len_k = gl.minimum(len_k, gl.load(p_lengths_k + s))
    return s, batch, j, first_q, first_k, len_q, len_k, first_tile


@gluon.jit
def issue_keys(k_desc, v_desc, k_buf, v_buf, bars, batch, row, h, count, RING: gl.constexpr):
    """Start the copies of one block of keys and values, the count-th of this program."""
    slot = count % RING
    mbarrier.expect(bars.index(slot), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [batch, row, h, 0], bars.index(slot), k_buf.index(slot))
    tma.async_copy_global_to_shared(v_desc, [batch, row, h, 0], bars.index(slot), v_buf.index(slot))


@gluon.jit(do_not_specialize=["max_q", "max_k", "q_offset", "items"])
def near_sums_kernel(
    q_desc, do_desc, k_desc, v_desc, p_rows, p_line, p_tiles, p_cu_q, p_cu_k, p_lengths_k, p_item_segment,
    heads, max_q, max_k, q_offset, scale, line_size, line_zero, left, right, first_shift, offsets, items,
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, GROUP: gl.constexpr, RING: gl.constexpr, CAUSAL: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Grid (splits, heads, 2 x groups of GROUP tile offsets).

    Blocks of BLOCK_M queries meet blocks of BLOCK_N = 2 BLOCK_M keys. Tile offset t has its first key first_shift +
    t * BLOCK_M after its first query; those of even and odd t meet every other block of queries, so each program takes
    one of the two kinds, GROUP offsets of it, for a run of pairs of blocks of queries, of any segments. From one pair
    to the next it needs one new block of keys: RING of them, GROUP or GROUP - 1, stay in shared memory. It writes one
    fp32 tile `[keys, queries]` per offset to `p_tiles` `[H, offsets, splits, BLOCK_N, BLOCK_M]`.
    """
    BLOCK_N: gl.constexpr = 2 * BLOCK_M
    element: gl.constexpr = q_desc.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_M, 16])
    column: gl.constexpr = gl.SliceLayout(0, layout)
    shared_rows: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    split = gl.program_id(0)
    h = gl.program_id(1)
    kind = gl.program_id(2) % 2
    first_t = gl.program_id(2) // 2 * (2 * GROUP) + kind  # then every other
    first_shift += first_t * BLOCK_M
    second = (first_shift // BLOCK_M) & 1  # which block of a pair these offsets meet
    per_split = (items + gl.num_programs(0) - 1) // gl.num_programs(0)
    begin = split * per_split
    end = gl.minimum(begin + per_split, items)
    p_line += h * line_size + line_zero
    scale_log2 = scale * LOG2_E

    q_buf = gl.allocate_shared_memory(element, [2, 1, BLOCK_M, 1, HEAD_DIM], q_desc.layout)
    do_buf = gl.allocate_shared_memory(element, [2, 1, BLOCK_M, 1, HEAD_DIM], do_desc.layout)
    k_buf = gl.allocate_shared_memory(element, [RING, 1, BLOCK_N, 1, HEAD_DIM], k_desc.layout)
    v_buf = gl.allocate_shared_memory(element, [RING, 1, BLOCK_N, 1, HEAD_DIM], v_desc.layout)
    row_buf = gl.allocate_shared_memory(gl.float32, [3, 2 * BLOCK_M], shared_rows)
    q_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_bars = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(2):
        mbarrier.init(q_bars.index(stage), 1)
    for stage in gl.static_range(RING):
        mbarrier.init(k_bars.index(stage), 1)
    # where a block of queries is beyond the segment
    o_row = gl.arange(0, 2 * BLOCK_M, gl.BlockedLayout([4], [32], [num_warps], [0]))
    row_buf.index(2).store(gl.where(o_row < BLOCK_M, float("inf"), 0.0))
    gl.thread_barrier()

    b_zero = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout)
    b_sums = (b_zero,)
    for _extra in gl.static_range(GROUP - 1):
        b_sums = b_sums + (b_zero,)  # noqa: RUF005  (the compiler knows no unpacking)
    s, batch, j, first_q, first_k, len_q, len_k, first_tile = place_of(
        begin, items, p_cu_q, p_cu_k, p_lengths_k, p_item_segment, max_q, max_k, BLOCK_M, BLOCK_N
    )
    last_s = s - s - 1
    if begin < end:
        issue_tile(
            q_desc, do_desc, q_buf, do_buf, row_buf, q_bars, p_rows, batch,
            first_q + (2 * j + second) * BLOCK_M, h, (first_tile + 2 * j + second) * heads + h, 0, BLOCK_M, False,
            num_warps,
        )  # fmt: skip
    issued = begin * 0  # blocks of keys
    oldest = begin * 0  # the first of them that this pair needs
    for item in range(begin, end):
        q_slot = (item - begin) & 1
        m0 = (2 * j + second) * BLOCK_M
        first_n = m0 + first_shift
        key_row = first_k + first_n
        # empty where the block of queries is beyond the segment
        len_k = gl.where(m0 < len_q, len_k, 0)
        mbarrier.wait(q_bars.index(q_slot), ((item - begin) >> 1) & 1)
        async_copy.wait_group(0)
        gl.thread_barrier()  # all warps have done with the pair before
        oldest += 1
        if s != last_s:
            oldest = issued
            for t in gl.static_range(RING):
                issue_keys(k_desc, v_desc, k_buf, v_buf, k_bars, batch, key_row + t * BLOCK_N, h, issued + t, RING)
            issued += RING
        last_s = s
        s, batch_next, j, first_q, first_k, len_q, len_next, first_tile = place_of(
            item + 1, items, p_cu_q, p_cu_k, p_lengths_k, p_item_segment, max_q, max_k, BLOCK_M, BLOCK_N
        )
        if item + 1 < end:
            issue_tile(
                q_desc, do_desc, q_buf, do_buf, row_buf, q_bars, p_rows, batch_next,
                first_q + (2 * j + second) * BLOCK_M, h, (first_tile + 2 * j + second) * heads + h,
                1 - q_slot, BLOCK_M, False, num_warps,
            )  # fmt: skip
        q_tile = tile_of(q_buf, q_slot, BLOCK_M, HEAD_DIM).permute([1, 0])
        do_tile = tile_of(do_buf, q_slot, BLOCK_M, HEAD_DIM).permute([1, 0])
        rows = row_buf.index(gl.where(len_k > 0, q_slot, 2))
        new_sums = ()
        for t in gl.static_range(GROUP):
            n0 = first_n + t * BLOCK_N
            slot = (oldest + t) % RING
            mbarrier.wait(k_bars.index(slot), ((oldest + t) // RING) & 1)
            # no branch around the products: ptxas 13 then reuses their descriptors where they were never computed
            # beyond the line's reach the bias is constant, so that the tile may as well be nearer
            p_first = p_line + gl.minimum(gl.maximum(n0 - m0 - q_offset, -left - BLOCK_N), right + BLOCK_M)
            b_bias = bias_tile(p_first, n0 - m0 - q_offset, -n0, len_k - n0, BLOCK_M, BLOCK_N, 1, CAUSAL, layout)
            b_s = warpgroup_mma(tile_of(k_buf, slot, BLOCK_N, HEAD_DIM), q_tile, b_bias, is_async=True)
            b_dp = warpgroup_mma(tile_of(v_buf, slot, BLOCK_N, HEAD_DIM), do_tile, b_zero, use_acc=False, is_async=True)
            b_lse = rows.slice(0, BLOCK_M).load(column)
            b_delta = rows.slice(BLOCK_M, BLOCK_M).load(column)
            b_s = warpgroup_mma_wait(num_outstanding=1, deps=[b_s])
            b_p = gl.exp2(b_s * scale_log2 - b_lse[None, :])
            b_dp, b_p = warpgroup_mma_wait(num_outstanding=0, deps=[b_dp, b_p])  # b_p, so that it is done by then
            b_sum = b_sums[t]
            # with a third sum registers run out if the compiler leaves this work until the next tile's products run,
            # hence a branch; nothing is lost where there are no keys
            if (GROUP < 3) | (len_k > 0):
                b_sum += b_p * (b_dp - b_delta[None, :])
            new_sums = new_sums + (b_sum,)  # noqa: RUF005
            gl.thread_barrier()  # all warps have done with this block; nor may the next one's loads take registers yet
            if t == 0:  # noqa: SIM102  (decided by the compiler, the other at run time)
                if (RING < GROUP) | ((s == last_s) & (item + 1 < end)):
                    issue_keys(k_desc, v_desc, k_buf, v_buf, k_bars, batch, key_row + RING * BLOCK_N, h, issued, RING)
                    issued += 1
        b_sums = new_sums
        batch = batch_next
        len_k = len_next
    o_n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout))
    o_tile = o_n[:, None] * BLOCK_M + gl.arange(0, BLOCK_M, column)[None, :]
    for t in gl.static_range(GROUP):
        offset = first_t + 2 * t
        if offset < offsets:
            tile = (h * offsets + offset) * gl.num_programs(0) + split
            gl.store(p_tiles + tile.to(gl.int64) * (BLOCK_M * BLOCK_N) + o_tile, b_sums[t])
