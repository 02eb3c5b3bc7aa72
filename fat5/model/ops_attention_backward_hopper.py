"""The fused backward kernel for sm_90, in Gluon: the products of one tile run while the next tile's scores are
formed.
"""
# mypy: allow-untyped-defs

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import async_copy
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
except ImportError as error:  # a guarded import is what the loader of remote code asks for
    raise ImportError("the attention kernels need Triton") from error

from .ops_attention_diagonals_hopper import no_carry, store_carry, store_diagonals, store_strips, thread_sums
from .ops_attention_places_sm90 import hidden_pointer, hidden_zero

LOG2_E = gl.constexpr(1.4426950408889634)
NEAR = gl.constexpr(128)  # keys, at whose grain a tile counts as near or far in the sums


@gluon.jit
def issue_tile(
    q_desc, do_desc, q_buf, do_buf, row_buf, bars, p_rows, batch, row, h, tile, slot,
    BLOCK_M: gl.constexpr, HIDDEN: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Start the copies of one block of queries: Q, dO, and lse and delta, which lie side by side in `p_rows`."""
    bar = bars.index(slot)
    mbarrier.expect(bar, q_desc.block_type.nbytes + do_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(q_desc, [batch, row, h, 0], bar, q_buf.index(slot))
    tma.async_copy_global_to_shared(do_desc, [batch, row, h, 0], bar, do_buf.index(slot))
    o_row = gl.arange(0, 2 * BLOCK_M, gl.BlockedLayout([4], [32], [num_warps], [0]))
    p_row = tile_pointer(p_rows, tile, 2 * BLOCK_M, o_row, HIDDEN)
    async_copy.async_copy_global_to_shared(row_buf.index(slot), p_row)
    async_copy.commit_group()


@gluon.jit
def tile_pointer(p, tile, SIZE: gl.constexpr, o_tile, HIDDEN: gl.constexpr):
    """Where a tile of SIZE fp32 numbers lies, of which a thread has four side by side.

    HIDDEN: formed anew each time, from fewer registers.
    """
    if not HIDDEN:
        return p + (tile.to(gl.int64) * SIZE + o_tile)
    return gl.max_contiguous(gl.multiple_of(hidden_pointer(p + tile.to(gl.int64) * SIZE) + o_tile, 16), 4)


@gluon.jit
def tile_of(buffer, slot, BLOCK_M: gl.constexpr, HEAD_DIM: gl.constexpr):
    """One stage of a buffer of tiles `[1, BLOCK_M, 1, HEAD_DIM]` as `[BLOCK_M, HEAD_DIM]`."""
    return buffer.index(slot).reshape([BLOCK_M, HEAD_DIM])


@gluon.jit
def bias_tile(
    p_first, offset, first_key, end_key, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BIAS: gl.constexpr,
    CAUSAL: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """What to start a tile's product from, in units of q.k: the bias; -inf where the key is not visible.

    `offset` is the distance of the tile's first key from its first query, and `p_first` points at that distance's bias.
    Its keys `first_key` to `end_key` count.
    """
    o_m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, layout))
    # a thread's columns differ from its lane's first by constants, which the instructions hold
    o_lane, o_rest = (o_m & 6)[None, :], (o_m & -7)[None, :]
    o_n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout)) + hidden_zero()
    if BIAS == 1:
        b_bias = gl.load(p_first + (o_n[:, None] - o_lane).to(gl.int64) + -o_rest.to(gl.int64))
    else:
        b_bias = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout)
    m_visible = ((o_n >= first_key) & (o_n < end_key))[:, None]
    if CAUSAL:
        m_visible = m_visible & (offset + o_n[:, None] - o_lane - o_rest <= 0)
    return gl.where(m_visible, b_bias, float("-inf"))


@gluon.jit
def near_bias(
    p_line, h, line_size, reach, span, offset, left, right, end_key, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BIAS: gl.constexpr, CAUSAL: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Whether the product of a tile needs a start, and `bias_tile` if so, else zeros.

    A line of the bias begins with distance `-(reach + BLOCK_M)`, and the last first key of a tile is `span` behind the
    foremost.
    """
    b_bias = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout)
    is_needed = end_key < BLOCK_N
    if CAUSAL:
        is_needed = is_needed | (offset + (BLOCK_N - 1) > 0)
    if BIAS == 1:
        is_needed = is_needed | ((offset + (BLOCK_N - 1) > -left) & (offset - (BLOCK_M - 1) < right))
    if is_needed:
        if BIAS == 1:
            # beyond the line's reach the bias is constant, so that the tile may as well be nearer
            p_line += (h + hidden_zero()) * line_size + BLOCK_M + gl.minimum(gl.maximum(offset + reach, 0), span)
        b_bias = bias_tile(p_line, offset, 0, end_key, BLOCK_M, BLOCK_N, BIAS, CAUSAL, layout)
    return is_needed, b_bias


@gluon.jit(do_not_specialize=["max_q", "max_k", "q_offset", "near_blocks"])
def fused_backward_kernel(
    q_desc, do_desc, p_k, p_v, p_rows, p_dq_tiles, p_dk, p_dv, p_far, p_near, p_line, p_cu_q, p_cu_k,
    p_lengths_k, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh, stride_dkb, stride_dkl, stride_dkh,
    stride_dvb, stride_dvl, stride_dvh,
    heads, max_q, max_k, q_offset, scale, line_size, left, right, reach, span, first_near, near_count, near_blocks,
    lowest_row, rows,
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BIAS: gl.constexpr, CAUSAL: gl.constexpr,
    LINE_GRADIENT: gl.constexpr, PLACES: gl.constexpr, STAGES: gl.constexpr, LATE_DP: gl.constexpr,
    HALF_P: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As `backward_keys_kernel`, fused; lse and delta come in `p_rows`, a tile `[2, BLOCK_M]` per block of queries and
    head.

    A tile of dQ lies in `p_dq_tiles` in the order of the registers of the product that made it.

    LINE_GRADIENT: dS of the far tiles is summed to the left and to the right into `p_far`. If PLACES > 0, that of the
    near ones, `near_count` offsets of which the first has its first key `first_near` after its first query, is summed
    along diagonals into `p_near` `[H, near_blocks, rows, 16]`, see `store_diagonals`.
    """
    element: gl.constexpr = p_k.dtype.element_ty
    GROUPS: gl.constexpr = num_warps // 4
    FAR_PRODUCT: gl.constexpr = LINE_GRADIENT and PLACES == 0
    HIDDEN: gl.constexpr = BIAS == 1 and HEAD_DIM == 128  # where registers are scarcest
    # What is formed anew for each tile, lest it be kept from before the loop on. The descriptors of K and V would fill
    # the uniform registers, whose values then move to a thread's own. With heads of 128 ptxas spills or serializes the
    # products otherwise; without bias and causality it does neither, and is faster so.
    HIDDEN_KV: gl.constexpr = HEAD_DIM == 128 and (BIAS == 1 or CAUSAL)
    HIDDEN_TILE: gl.constexpr = HEAD_DIM == 64 or not CAUSAL
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_M, 16])
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, HEAD_DIM, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [num_warps, 1] if 16 * num_warps <= HEAD_DIM else [4, GROUPS],
        [16, BLOCK_M if 16 * num_warps <= HEAD_DIM else BLOCK_M // GROUPS, 16],
    )  # fmt: skip
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, kv_layout, 2)
    far_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, 8, 16])
    far_ds_layout: gl.constexpr = gl.DotOperandLayout(0, far_layout, 2)
    load_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [num_warps, 1], [1, 0])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    shared_rows: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])

    n0 = gl.program_id(0) * BLOCK_N
    h = gl.program_id(1)
    s = gl.program_id(2)
    len_k = max_k
    len_q = max_q
    batch = s.to(gl.int64)
    first_q = batch * 0
    first_k = batch * 0
    first_tile = batch * ((max_q + BLOCK_M - 1) // BLOCK_M)
    if p_cu_q is not None:
        batch = batch * 0
        first_q = gl.load(p_cu_q + s).to(gl.int64)
        first_k = gl.load(p_cu_k + s).to(gl.int64)
        len_q = (gl.load(p_cu_q + s + 1) - first_q).to(gl.int32)
        len_k = (gl.load(p_cu_k + s + 1) - first_k).to(gl.int32)
        first_tile = first_q // BLOCK_M + s
    end_k = len_k
    if p_lengths_k is not None:
        len_k = gl.minimum(len_k, gl.load(p_lengths_k + s))
    first_block = n0 * 0  # of queries, that sees these keys
    if CAUSAL:
        first_block = gl.maximum(n0 - q_offset, 0) // BLOCK_M
    end_block = gl.where(n0 < len_k, (len_q + BLOCK_M - 1) // BLOCK_M, first_block)

    p_k += batch * stride_kb + first_k * stride_kl + h * stride_kh
    p_v += batch * stride_vb + first_k * stride_vl + h * stride_vh
    first_tile = (first_tile * heads + h).to(gl.int32)
    scale_log2 = scale * LOG2_E
    far_left = 0.0
    far_right = 0.0
    if BIAS == 1:
        p_zero = p_line + (h * line_size + (reach + BLOCK_M))
        far_left = gl.load(p_zero - left) * scale_log2
        far_right = gl.load(p_zero + right) * scale_log2

    k_buf = gl.allocate_shared_memory(element, [1, BLOCK_N, HEAD_DIM], shared)
    v_buf = gl.allocate_shared_memory(element, [1, BLOCK_N, HEAD_DIM], shared)
    q_buf = gl.allocate_shared_memory(element, [STAGES, 1, BLOCK_M, 1, HEAD_DIM], q_desc.layout)
    do_buf = gl.allocate_shared_memory(element, [STAGES, 1, BLOCK_M, 1, HEAD_DIM], do_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), 1)
    ds_buf = gl.allocate_shared_memory(element, [2, BLOCK_N, BLOCK_M], shared)
    row_buf = gl.allocate_shared_memory(gl.float32, [STAGES, 2 * BLOCK_M], shared_rows)

    o_key = gl.arange(0, BLOCK_N, gl.SliceLayout(1, load_layout))
    o_d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, load_layout))
    m_key = (n0 + o_key < len_k)[:, None]
    start_n = n0.to(gl.int64)
    async_copy.async_copy_global_to_shared(
        k_buf.index(0), p_k + start_n * stride_kl + (o_key[:, None] * stride_kl + o_d[None, :]), m_key
    )
    async_copy.async_copy_global_to_shared(
        v_buf.index(0), p_v + start_n * stride_vl + (o_key[:, None] * stride_vl + o_d[None, :]), m_key
    )
    if PLACES > 0:
        b_none = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, score_layout)
        b_left = thread_sums(b_none)
        b_right = b_left
        b_carry = no_carry(b_none)
        strips_buf = gl.allocate_shared_memory(element, [PLACES, 64, 64], shared)
        for place in gl.static_range(PLACES):
            strips_buf.index(place).store(gl.zeros([64, 64], element, load_layout))
    if FAR_PRODUCT:
        # what a tile's dS is multiplied by to sum its rows: nothing if near, a column of ones for the left,
        # one for the right
        far_buf = gl.allocate_shared_memory(element, [3, 8, BLOCK_M], shared)
        o_row = gl.arange(0, 8, gl.SliceLayout(1, load_layout))[:, None]
        o_column = gl.arange(0, BLOCK_M, gl.SliceLayout(0, load_layout))[None, :]
        for side in gl.static_range(3):
            far_buf.index(side).store(gl.where(o_row + o_column * 0 == side - 1, 1.0, 0.0).to(element))
    first_row = first_q.to(gl.int32)
    batch_index = batch.to(gl.int32)
    # the first tile has none before it: its products with zeros add nothing
    tile_of(q_buf, STAGES - 1, BLOCK_M, HEAD_DIM).store(gl.zeros([BLOCK_M, HEAD_DIM], element, load_layout))
    ds_buf.index((first_block + 1) & 1).store(gl.zeros([BLOCK_N, BLOCK_M], element, load_layout))
    fence_async_shared()
    gl.thread_barrier()
    issue_tile(
        q_desc, do_desc, q_buf, do_buf, row_buf, bars, p_rows, batch_index,
        first_row + first_block * BLOCK_M, h, first_tile + first_block * heads, 0, BLOCK_M, HIDDEN, num_warps,
    )  # fmt: skip
    mbarrier.wait(bars.index(0), 0)
    async_copy.wait_group(0)
    fence_async_shared()
    gl.thread_barrier()

    b_dk = gl.zeros([BLOCK_N, HEAD_DIM], gl.float32, kv_layout)
    b_dv = gl.zeros([BLOCK_N, HEAD_DIM], gl.float32, kv_layout)
    b_zero = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, score_layout)
    b_dq_zero = gl.zeros([HEAD_DIM, BLOCK_M], gl.float32, dq_layout)
    b_far = gl.zeros([BLOCK_N, 8], gl.float32, far_layout)

    b_ds16 = gl.zeros([BLOCK_N, BLOCK_M], element, ds_layout)
    side = n0 * 0
    IN_FLIGHT: gl.constexpr = 2 + (0 if LATE_DP else 1) + (1 if FAR_PRODUCT else 0)
    near_n0 = n0 // NEAR * NEAR - q_offset
    slot = n0 * 0  # of this tile's queries, and the phase of their barrier
    phase = n0 * 0
    is_near, b_bias = near_bias(
        p_line, h, line_size, reach, span, n0 - first_block * BLOCK_M - q_offset, left, right, len_k - n0,
        BLOCK_M, BLOCK_N, BIAS, CAUSAL, score_layout,
    )  # fmt: skip
    for block in range(first_block, end_block):
        zero = hidden_zero()
        m0 = block * BLOCK_M
        tile = first_tile + (block + (zero if HIDDEN_TILE else 0)) * heads
        offset = n0 - m0 - q_offset
        last_slot = gl.where(slot == 0, STAGES - 1, slot - 1)
        next_slot = gl.where(slot == STAGES - 1, 0, slot + 1)
        next_phase = phase ^ gl.where(next_slot == 0, 1, 0)
        issue_tile(
            q_desc, do_desc, q_buf, do_buf, row_buf, bars, p_rows, batch_index, first_row + m0 + BLOCK_M, h,
            tile + heads, next_slot, BLOCK_M, HIDDEN, num_warps,
        )  # fmt: skip
        q_tile = tile_of(q_buf, slot, BLOCK_M, HEAD_DIM)
        do_tile = tile_of(do_buf, slot, BLOCK_M, HEAD_DIM)
        k_tile, v_tile = k_buf.index(zero if HIDDEN_KV else 0), v_buf.index(zero if HIDDEN_KV else 0)
        # the products of this tile's scores, and the last two of the tile before, whose dS lies in shared memory
        b_s = warpgroup_mma(k_tile, q_tile.permute([1, 0]), b_bias, use_acc=is_near, is_async=True)
        if not LATE_DP:
            b_dp = warpgroup_mma(v_tile, do_tile.permute([1, 0]), b_zero, use_acc=False, is_async=True)
        b_dk = warpgroup_mma(b_ds16, tile_of(q_buf, last_slot, BLOCK_M, HEAD_DIM), b_dk, is_async=True)
        if FAR_PRODUCT:
            b_far = warpgroup_mma(
                gl.convert_layout(b_ds16, far_ds_layout), far_buf.index(side).permute([1, 0]), b_far, is_async=True
            )
        b_dq = warpgroup_mma(
            k_tile.permute([1, 0]), ds_buf.index((block + 1) & 1), b_dq_zero, use_acc=False, is_async=True
        )
        b_lse = row_buf.index(slot).slice(0, BLOCK_M).load(gl.SliceLayout(0, score_layout))
        is_left = offset + (BLOCK_N - 1) <= -left
        if BIAS == 1:
            b_lse -= gl.where(is_near, 0.0, gl.where(is_left, far_left, far_right))
        b_scores = warpgroup_mma_wait(num_outstanding=IN_FLIGHT, deps=[b_s])
        b_p = gl.exp2(b_scores * scale_log2 - b_lse[None, :])
        b_p16 = b_p.to(element)
        if LATE_DP:
            b_dk, b_dq, b_far = warpgroup_mma_wait(num_outstanding=0, deps=[b_dk, b_dq, b_far])
            b_dp = warpgroup_mma(v_tile, do_tile.permute([1, 0]), b_zero, use_acc=False, is_async=True)
            b_dv = warpgroup_mma(gl.convert_layout(b_p16, ds_layout), do_tile, b_dv, is_async=True)
        else:
            b_dv = warpgroup_mma(gl.convert_layout(b_p16, ds_layout), do_tile, b_dv, is_async=True)
            b_dprob, b_dk, b_dq, b_far = warpgroup_mma_wait(num_outstanding=1, deps=[b_dp, b_dk, b_dq, b_far])
        if block > first_block:
            add_dq(p_dq_tiles, tile - heads, b_dq, HEAD_DIM, BLOCK_M, HIDDEN)
        b_delta = row_buf.index(slot).slice(BLOCK_M, BLOCK_M).load(gl.SliceLayout(0, score_layout))
        if LATE_DP:
            b_dprob = warpgroup_mma_wait(num_outstanding=1, deps=[b_dp])
        if HALF_P:
            b_p = b_p16.to(gl.float32)
        b_ds = b_p * (b_dprob - b_delta[None, :])
        side = gl.where(near_n0 - m0 + (NEAR - 1) <= -left, 1, gl.where(near_n0 - m0 - (BLOCK_M - 1) >= right, 2, 0))
        b_ds_half = b_ds.to(element)
        ds_buf.index(block & 1).store(b_ds_half)
        b_ds16 = gl.convert_layout(b_ds_half, ds_layout)
        if PLACES > 0:
            shift = n0 - m0 - first_near  # to the first near offset, a multiple of BLOCK_M
            if (shift < 0) | (shift >= near_count * BLOCK_M):
                # the last strip of the last of all near tiles is far
                b_side = thread_sums(b_ds) + gl.sum(b_carry, 3)
                b_carry = gl.zeros_like(b_carry)
                b_left += gl.where(shift < 0, b_side, 0.0)
                b_right += gl.where(shift < 0, 0.0, b_side)
            else:
                b_carry = store_strips(strips_buf.index(shift // BLOCK_M), b_ds, b_carry)
        b_dv = warpgroup_mma_wait(num_outstanding=0, deps=[b_dv])
        is_near, b_bias = near_bias(
            p_line, h, line_size, reach, span, offset - BLOCK_M, left, right, len_k - n0, BLOCK_M, BLOCK_N, BIAS,
            CAUSAL, score_layout,
        )  # fmt: skip
        mbarrier.wait(bars.index(next_slot), next_phase)
        async_copy.wait_group(0)
        fence_async_shared()
        gl.thread_barrier()
        slot, phase = next_slot, next_phase
    if end_block > first_block:
        last_slot = gl.where(slot == 0, STAGES - 1, slot - 1)
        b_dk = warpgroup_mma(b_ds16, tile_of(q_buf, last_slot, BLOCK_M, HEAD_DIM), b_dk, is_async=True)
        if FAR_PRODUCT:
            b_far = warpgroup_mma(
                gl.convert_layout(b_ds16, far_ds_layout), far_buf.index(side).permute([1, 0]), b_far, is_async=True
            )
        b_dq = warpgroup_mma(
            k_buf.index(0).permute([1, 0]), ds_buf.index((end_block + 1) & 1), b_dq_zero, use_acc=False, is_async=True
        )
        b_dk, b_dq, b_far = warpgroup_mma_wait(num_outstanding=0, deps=[b_dk, b_dq, b_far])
        add_dq(p_dq_tiles, first_tile + (end_block - 1) * heads, b_dq, HEAD_DIM, BLOCK_M, HIDDEN)

    if PLACES > 0:
        shift = n0 - (end_block - 1) * BLOCK_M - first_near  # of the last tile
        if (shift > 0) & (shift < near_count * BLOCK_M):
            store_carry(strips_buf.index(shift // BLOCK_M - 1), b_carry)
        else:
            b_left += gl.sum(b_carry, 3)
        near_block = s * gl.num_programs(0) + gl.program_id(0)
        if p_cu_q is not None:
            near_block = (first_k // BLOCK_N).to(gl.int32) + s + gl.program_id(0)
        p_near += (h * near_blocks + near_block).to(gl.int64) * (rows * 16)
        gl.thread_barrier()  # all warps have done with the tiles of dS
        b_left, b_right = store_diagonals(
            strips_buf, ds_buf.index(0).slice(0, 16), p_near, lowest_row, rows, n0 < end_k, b_left, b_right, PLACES,
            num_warps,
        )  # fmt: skip
        p_program = p_far + ((h * gl.num_programs(2) + s) * gl.num_programs(0) + gl.program_id(0)) * 2
        b_sides = gl.sum(gl.sum(gl.sum(gl.join(b_left, b_right), 2), 1), 0)
        gl.store(p_program + gl.arange(0, 2, b_sides.type.layout), b_sides)

    zero = hidden_zero()
    o_row = gl.arange(0, BLOCK_N, gl.SliceLayout(1, load_layout)) + zero
    n0 = (gl.program_id(0) + zero) * BLOCK_N
    h = gl.program_id(1) + zero
    s = gl.program_id(2) + zero
    batch = s.to(gl.int64)
    first_k = batch * 0
    end_k = max_k
    if p_cu_k is not None:
        batch = batch * 0
        first_k = gl.load(p_cu_k + s).to(gl.int64)
        end_k = (gl.load(p_cu_k + s + 1) - first_k).to(gl.int32)
    start_n = n0.to(gl.int64)
    m_row = (n0 + o_row < end_k)[:, None]
    p_dk += batch * stride_dkb + first_k * stride_dkl + h * stride_dkh + start_n * stride_dkl
    p_dv += batch * stride_dvb + first_k * stride_dvl + h * stride_dvh + start_n * stride_dvl
    gl.store(
        p_dk + (o_row[:, None] * stride_dkl + o_d[None, :]),
        gl.convert_layout((b_dk * scale).to(element), load_layout),
        mask=m_row,
    )
    gl.store(
        p_dv + (o_row[:, None] * stride_dvl + o_d[None, :]),
        gl.convert_layout(b_dv.to(element), load_layout),
        mask=m_row,
    )
    if FAR_PRODUCT:
        p_program = p_far + ((h * gl.num_programs(2) + s) * gl.num_programs(0) + gl.program_id(0)) * 2
        o_side = gl.arange(0, 8, gl.SliceLayout(0, far_layout))
        gl.store(p_program + o_side, gl.sum(b_far, 0), mask=o_side < 2)


@gluon.jit
def add_dq(p_dq_tiles, tile, b_dq, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, HIDDEN: gl.constexpr):
    """Add `[HEAD_DIM, BLOCK_M]` to a tile of dQ, where four registers of a thread, then a warp's lanes, lie side by
    side.
    """
    b = b_dq.reshape([HEAD_DIM // 16, 2, 8, BLOCK_M // 8, 4, 2])  # warp, half, row, column of 8, pair, element
    b_row = b.permute([3, 0, 2, 4, 1, 5]).reshape([HEAD_DIM * BLOCK_M])
    o_tile = gl.arange(0, HEAD_DIM * BLOCK_M, b_row.type.layout)
    gl.atomic_add(tile_pointer(p_dq_tiles, tile, HEAD_DIM * BLOCK_M, o_tile, HIDDEN), b_row, sem="relaxed")
