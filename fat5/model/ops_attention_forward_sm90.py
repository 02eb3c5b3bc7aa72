"""Forward kernel for sm_90 in Gluon: one warp fetches, two or three warp groups compute, each on 64 queries.

The same work as `forward_kernel` for no bias or T5's, without dropout, for 16-bit types and head widths 64 and 128.
While one group exponentiates, the matrix unit works for the others, and a tile's product P V runs beside the loads of
the bias of the next (producer and consumers as in FlashAttention-3, Shah et al. 2024, arXiv:2407.08608, written
anew).
The products of an iteration are waited for within it: one carried around the loop would make ptxas serialise them all.
"""
# mypy: allow-untyped-defs

from functools import lru_cache

import torch

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError as error:  # a guarded import is what the loader of remote code asks for
    raise ImportError("the attention kernels need Triton") from error

from .ops_attention_places_sm90 import band_of, block_of, hidden_zero, last_key, lengths_of

LOG2_E = gl.constexpr(1.4426950408889634)
INFINITY = gl.constexpr(float("inf"))
__all__ = ["TensorDescriptor", "forward_sm90_kernel", "shared_layout"]

ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@lru_cache
def shared_layout(rows: int, head_dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Order in shared memory of a tile `[rows, head_dim]` that the copy engine writes and the matrix unit reads."""
    return gl.NVMMASharedLayout.get_default_for([rows, head_dim], ELEMENTS[dtype])


@gluon.jit
def load_bias_start(p_strips, x, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """Counterpart of `load_bias_tile` for one warp group: fp32 `[64, BLOCK_N]`."""
    JJ: gl.constexpr = WIDTH // 64
    COLS: gl.constexpr = BLOCK_N // (8 * JJ)
    STRIPS: gl.constexpr = gl.BlockedLayout([1, 2 * JJ], [1, 32], [4, 1], [1, 0])
    o_r = gl.arange(0, COLS * 8, gl.SliceLayout(1, STRIPS))
    o_w = gl.arange(0, WIDTH, gl.SliceLayout(0, STRIPS))
    o_x = x + JJ * (o_r // 8) - 2 * (o_r % 4) - (o_r // 4) % 2
    b_strips = gl.load(p_strips + o_x[:, None] * WIDTH + o_w[None, :])
    b_strips = b_strips.reshape(COLS, 2, 4, 8, 4, JJ, 2).permute(2, 1, 3, 0, 5, 4, 6).reshape(64, BLOCK_N)
    return gl.convert_layout(b_strips.to(gl.float32), LAYOUT, assert_trivial=True)


@gluon.jit
def fetch(
    desc_q, desc_k, desc_v, q_smem, k_smem, v_smem, q_full, q_free, k_full, k_free, v_full, v_free, p_cu_q, p_cu_k,
    p_lengths_k, max_q, max_k, heads, blocks, tiles, bundle, q_offset, left, right, rows_qb, rows_qh, cols_qh,
    rows_kb, rows_kh,
    cols_kh, rows_vb, rows_vh, cols_vh, BLOCK_N: gl.constexpr, BIAS: gl.constexpr, CAUSAL: gl.constexpr,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, PACKED: gl.constexpr, LENGTHS: gl.constexpr,
):  # fmt: skip
    """The fetching warp."""
    BLOCK_M: gl.constexpr = 64 * GROUPS
    step = 0
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block, h, s = block_of(tile, blocks, heads, tiles, bundle, CAUSAL)
        m0 = block * BLOCK_M
        start_q, len_q, start_k, len_k = lengths_of(s, p_cu_q, p_cu_k, p_lengths_k, max_q, max_k, PACKED, LENGTHS)
        if m0 < len_q:
            first_q = (start_q if PACKED else s * rows_qb) + h * rows_qh
            row_k = (start_k if PACKED else s * rows_kb) + h * rows_kh
            row_v = (start_k if PACKED else s * rows_vb) + h * rows_vh
            last = last_key(m0, len_k, q_offset, BLOCK_M, CAUSAL)
            for g in gl.static_range(GROUPS):
                mbarrier.wait(q_free.index(g), (turn & 1) ^ 1)
                mbarrier.expect(q_full.index(g), desc_q.block_type.nbytes)
                row_q = first_q + m0 + 64 * g
                tma.async_copy_global_to_shared(desc_q, [row_q, h * cols_qh], q_full.index(g), q_smem.index(g))
            turn += 1
            for n0 in range(0, last, BLOCK_N):
                stage = step % STAGES
                phase = ((step // STAGES) & 1) ^ 1
                mbarrier.wait(k_free.index(stage), phase)
                mbarrier.expect(k_full.index(stage), desc_k.block_type.nbytes)
                at_k = [row_k + n0, h * cols_kh]
                tma.async_copy_global_to_shared(desc_k, at_k, k_full.index(stage), k_smem.index(stage))
                mbarrier.wait(v_free.index(stage), phase)
                mbarrier.expect(v_full.index(stage), desc_v.block_type.nbytes)
                at_v = [row_v + n0, h * cols_vh]
                tma.async_copy_global_to_shared(desc_v, at_v, v_full.index(stage), v_smem.index(stage))
                step += 1


@gluon.jit
def scores(
    q, k_smem, k_full, p_strips, step, n0, m0, near, far, len_k, q_offset, reach_left, reach_right,
    BLOCK_N: gl.constexpr, BIAS: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Starts QK^T plus bias of one tile of keys; the result has to be waited for."""
    b_start = gl.zeros([64, BLOCK_N], gl.float32, LAYOUT)
    bands = False
    if BIAS == 1:
        bands = (n0 >= near) & (n0 < far)
        if bands:
            x = (n0 - m0 - q_offset + (q_offset & 7)) // 8
            x = gl.minimum(gl.maximum(x, reach_left), reach_right)
            b_start = load_bias_start(p_strips, x, BLOCK_N, WIDTH, LAYOUT)
    stage = step % STAGES
    mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
    return warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), b_start, use_acc=bands, is_async=True)


@gluon.jit
def softmax_step(
    b_s, b_max, b_sum, n0, m0, near, far, len_k, q_offset, far_left, far_right, scale_log2,
    BLOCK_N: gl.constexpr, BIAS: gl.constexpr, CAUSAL: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Probabilities of one tile, new running maximum and sum, and the factor that older results take."""
    tail = n0 + BLOCK_N > len_k
    if CAUSAL:
        tail = tail | (n0 + BLOCK_N - 1 > m0 + q_offset)
    if tail:
        o_m = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))[:, None]
        o_n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))[None, :]
        # a thread's columns differ from its lane's first by constants, which the instructions hold
        o_lane, o_rest = o_n & 6, o_n & -7
        m_visible = ((n0 - len_k + o_lane) + o_rest < 0) & (o_m >= 0)
        if CAUSAL:
            m_visible = m_visible & ((n0 - m0 - q_offset + o_lane - o_m) + o_rest <= 0)
        b_s = gl.where(m_visible, b_s, -INFINITY)
    shift = 0.0
    if BIAS == 1:
        shift = gl.where(n0 < near, far_left, gl.where(n0 < far, 0.0, far_right))
    b_new = gl.maximum(b_max, gl.max(b_s, 1) * scale_log2 + shift)
    b_base = gl.where(b_new == -INFINITY, 0.0, b_new)
    b_p = gl.exp2(b_s * scale_log2 - (b_base - shift)[:, None])
    b_rescale = gl.exp2(b_max - b_base)
    return b_p, b_new, b_sum * b_rescale + gl.sum(b_p, 1), b_rescale


@gluon.jit
def wait_values(v_smem, v_full, step, rows, STAGES: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr):
    """Waits for one tile of values, of which the first `rows` rows are the segment's; what lies beyond becomes zero."""
    stage = step % STAGES
    mbarrier.wait(v_full.index(stage), (step // STAGES) & 1)
    if rows < BLOCK_N:
        ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
        o_row = gl.arange(0, BLOCK_N, gl.SliceLayout(1, ROWS))[:, None]
        m_rows = ((o_row & (1024 // D - 1)) - rows) + (o_row & -(1024 // D)) < 0  # as columns in `softmax_step`
        b_v = v_smem.index(stage).load(ROWS)
        v_smem.index(stage).store(gl.where(m_rows, b_v, 0.0))
        fence_async_shared()
        gl.thread_barrier()


@gluon.jit
def attend(
    p_out, p_lse, p_line, p_strips, q_smem, k_smem, v_smem, q_full, q_free, k_full, k_free, v_full, v_free, p_cu_q,
    p_cu_k,
    p_lengths_k, max_q, max_k, rows_q, heads, blocks, tiles, bundle, q_offset, left, right, strip_origin, strips,
    scale, stride_ob, stride_ol, stride_oh,
    G: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, BIAS: gl.constexpr, CAUSAL: gl.constexpr,
    WIDTH: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, PACKED: gl.constexpr, LENGTHS: gl.constexpr,
):  # fmt: skip
    """One warp group."""
    BLOCK_M: gl.constexpr = 64 * GROUPS
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = p_out.dtype.element_ty
    scale_log2 = scale * LOG2_E
    reach_left = -((left + BLOCK_N) // 8) - 1
    reach_right = (right + 64) // 8 + 2
    q = q_smem.index(G)
    step = 0
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block, h, s = block_of(tile, blocks, heads, tiles, bundle, CAUSAL)
        start_q, len_q, _start_k, len_k = lengths_of(s, p_cu_q, p_cu_k, p_lengths_k, max_q, max_k, PACKED, LENGTHS)
        zero = hidden_zero()
        len_k += zero
        if block * BLOCK_M < len_q:
            m0 = block * BLOCK_M + 64 * G
            last = last_key(block * BLOCK_M, len_k, q_offset, BLOCK_M, CAUSAL)
            near, far = band_of(m0, q_offset, left, right, BLOCK_N)
            far_left = 0.0
            far_right = 0.0
            p_bias = p_strips
            if BIAS == 1:
                far_left = gl.load(p_line + h * (left + right + 1)) * LOG2_E
                far_right = gl.load(p_line + h * (left + right + 1) + left + right) * LOG2_E
                p_bias = p_strips + (h * strips + strip_origin) * WIDTH
            b_out = gl.zeros([64, D], gl.float32, O_LAYOUT)
            b_max = gl.full([64], -INFINITY, gl.float32, gl.SliceLayout(1, S_LAYOUT))
            b_sum = gl.zeros([64], gl.float32, gl.SliceLayout(1, S_LAYOUT))
            mbarrier.wait(q_full.index(G), turn & 1)
            turn += 1
            if last > 0:
                b_s = scores(
                    q, k_smem, k_full, p_bias, step, 0, m0, near, far, len_k, q_offset, reach_left, reach_right,
                    BLOCK_N, BIAS, WIDTH, STAGES, S_LAYOUT,
                )  # fmt: skip
                b_s = warpgroup_mma_wait(0, [b_s])
                mbarrier.arrive(k_free.index(step % STAGES), count=1)
                b_p, b_max, b_sum, b_rescale = softmax_step(
                    b_s, b_max, b_sum, 0, m0, near, far, len_k, q_offset, far_left, far_right, scale_log2,
                    BLOCK_N, BIAS, CAUSAL, S_LAYOUT,
                )  # fmt: skip
                b_p = gl.convert_layout(b_p.to(dtype), P_LAYOUT)
                for n0 in range(BLOCK_N, last, BLOCK_N):
                    mbarrier.wait(v_full.index(step % STAGES), (step // STAGES) & 1)
                    b_pv = warpgroup_mma(b_p, v_smem.index(step % STAGES), b_out, is_async=True)
                    b_s = scores(
                        q, k_smem, k_full, p_bias, step + 1, n0, m0, near, far, len_k, q_offset, reach_left,
                        reach_right,
                        BLOCK_N, BIAS, WIDTH, STAGES, S_LAYOUT,
                    )  # fmt: skip
                    b_out = warpgroup_mma_wait(1, [b_pv])
                    b_s = warpgroup_mma_wait(0, [b_s])
                    mbarrier.arrive(v_free.index(step % STAGES), count=1)
                    mbarrier.arrive(k_free.index((step + 1) % STAGES), count=1)
                    b_next, b_max, b_sum, b_rescale = softmax_step(
                        b_s, b_max, b_sum, n0, m0, near, far, len_k, q_offset, far_left, far_right, scale_log2,
                        BLOCK_N, BIAS, CAUSAL, S_LAYOUT,
                    )  # fmt: skip
                    b_out = b_out * gl.convert_layout(b_rescale, gl.SliceLayout(1, O_LAYOUT))[:, None]
                    b_p = gl.convert_layout(b_next.to(dtype), P_LAYOUT)
                    step += 1
                mbarrier.arrive(q_free.index(G), count=1)
                wait_values(v_smem, v_full, step, len_k - (last - 1) // BLOCK_N * BLOCK_N, STAGES, BLOCK_N, D)
                b_pv = warpgroup_mma(b_p, v_smem.index(step % STAGES), b_out, is_async=True)
                b_out = warpgroup_mma_wait(0, [b_pv])
                mbarrier.arrive(v_free.index(step % STAGES), count=1)
                step += 1
            else:
                mbarrier.arrive(q_free.index(G), count=1)
            b_scale = gl.convert_layout(1.0 / gl.where(b_sum == 0.0, 1.0, b_sum), gl.SliceLayout(1, O_LAYOUT))
            b_out = gl.convert_layout((b_out * b_scale[:, None]).to(dtype), STORE)
            # found again, for want of registers to keep it in
            block, h, s = block_of(tile + hidden_zero(), blocks, heads, tiles, bundle, CAUSAL)
            start_q, len_q, _start_k, _len_k = lengths_of(s, p_cu_q, p_cu_k, p_lengths_k, max_q, max_k, PACKED, LENGTHS)
            m0 = block * BLOCK_M + 64 * G
            # a thread's rows, like its columns above, differ by constants
            o_row = gl.arange(0, 64, gl.SliceLayout(1, STORE))[:, None]
            o_lane, o_rest = m0 + (o_row & (1024 // D - 1)), o_row & -(1024 // D)
            o_d = gl.arange(0, D, gl.SliceLayout(0, STORE))[None, :]
            p_rows = p_out + h * stride_oh
            if PACKED:
                p_rows += start_q.to(gl.int64) * stride_ol
            else:
                p_rows += s.to(gl.int64) * stride_ob
            p_lane = p_rows + (o_lane.to(gl.int64) * stride_ol + o_d)
            gl.store(p_lane + o_rest.to(gl.int64) * stride_ol, b_out, mask=(o_lane + o_rest < len_q) & (o_d < D))
            b_lse = gl.where(b_sum == 0.0, INFINITY, b_max + gl.log2(b_sum))
            o_r = m0 + gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT))
            gl.store(p_lse + h.to(gl.int64) * rows_q + start_q + o_r, b_lse, mask=o_r < len_q)


@gluon.jit(
    do_not_specialize=[
        "rows_qb", "rows_qh", "cols_qh", "rows_kb", "rows_kh", "cols_kh", "rows_vb", "rows_vh", "cols_vh", "rows_q",
        "heads", "blocks", "tiles", "bundle", "max_q", "max_k", "q_offset", "left", "right", "strip_origin", "strips",
    ]
)  # fmt: skip
def forward_sm90_kernel(
    desc_q, desc_k, desc_v, p_out, p_lse, p_line, p_strips, p_cu_q, p_cu_k, p_lengths_k, stride_ob, stride_ol,
    stride_oh,
    rows_qb, rows_qh, cols_qh, rows_kb, rows_kh, cols_kh, rows_vb, rows_vh, cols_vh, rows_q, heads, blocks, tiles,
    bundle, max_q,
    max_k, q_offset, scale, left, right, strip_origin, strips,
    D: gl.constexpr, BLOCK_N: gl.constexpr, BIAS: gl.constexpr, CAUSAL: gl.constexpr, WIDTH: gl.constexpr,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, PACKED: gl.constexpr, LENGTHS: gl.constexpr,
):  # fmt: skip
    """Grid: as many programs as fit; program i does the tiles of work i, i + programs, ..."""
    dtype: gl.constexpr = p_out.dtype.element_ty
    q_smem = gl.allocate_shared_memory(dtype, [GROUPS, 64, D], desc_q.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], desc_k.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], desc_v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for g in gl.static_range(GROUPS):
        mbarrier.init(q_full.index(g), count=1)
        mbarrier.init(q_free.index(g), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=GROUPS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=GROUPS)
    fence_async_shared()
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (attend, (
                    p_out, p_lse, p_line, p_strips, q_smem, k_smem, v_smem, q_full, q_free, k_full, k_free, v_full,
                    v_free,
                    p_cu_q, p_cu_k, p_lengths_k, max_q, max_k, rows_q, heads, blocks, tiles, bundle, q_offset, left,
                    right,
                    strip_origin, strips, scale, stride_ob, stride_ol, stride_oh, 0, BLOCK_N, D, BIAS, CAUSAL, WIDTH,
                    GROUPS,
                    STAGES, PACKED, LENGTHS,
                )),
                (attend, (
                    p_out, p_lse, p_line, p_strips, q_smem, k_smem, v_smem, q_full, q_free, k_full, k_free, v_full,
                    v_free,
                    p_cu_q, p_cu_k, p_lengths_k, max_q, max_k, rows_q, heads, blocks, tiles, bundle, q_offset, left,
                    right,
                    strip_origin, strips, scale, stride_ob, stride_ol, stride_oh, 1, BLOCK_N, D, BIAS, CAUSAL, WIDTH,
                    GROUPS,
                    STAGES, PACKED, LENGTHS,
                )),
                (fetch, (
                    desc_q, desc_k, desc_v, q_smem, k_smem, v_smem, q_full, q_free, k_full, k_free, v_full, v_free,
                    p_cu_q,
                    p_cu_k, p_lengths_k, max_q, max_k, heads, blocks, tiles, bundle, q_offset, left, right, rows_qb,
                    rows_qh, cols_qh,
                    rows_kb, rows_kh, cols_kh, rows_vb, rows_vh, cols_vh, BLOCK_N, BIAS, CAUSAL, GROUPS, STAGES,
                    PACKED, LENGTHS,
                )),
            ],
            [4, 1], [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (attend, (
                    p_out, p_lse, p_line, p_strips, q_smem, k_smem, v_smem, q_full, q_free, k_full, k_free, v_full,
                    v_free,
                    p_cu_q, p_cu_k, p_lengths_k, max_q, max_k, rows_q, heads, blocks, tiles, bundle, q_offset, left,
                    right,
                    strip_origin, strips, scale, stride_ob, stride_ol, stride_oh, 0, BLOCK_N, D, BIAS, CAUSAL, WIDTH,
                    GROUPS,
                    STAGES, PACKED, LENGTHS,
                )),
                (attend, (
                    p_out, p_lse, p_line, p_strips, q_smem, k_smem, v_smem, q_full, q_free, k_full, k_free, v_full,
                    v_free,
                    p_cu_q, p_cu_k, p_lengths_k, max_q, max_k, rows_q, heads, blocks, tiles, bundle, q_offset, left,
                    right,
                    strip_origin, strips, scale, stride_ob, stride_ol, stride_oh, 1, BLOCK_N, D, BIAS, CAUSAL, WIDTH,
                    GROUPS,
                    STAGES, PACKED, LENGTHS,
                )),
                (attend, (
                    p_out, p_lse, p_line, p_strips, q_smem, k_smem, v_smem, q_full, q_free, k_full, k_free, v_full,
                    v_free,
                    p_cu_q, p_cu_k, p_lengths_k, max_q, max_k, rows_q, heads, blocks, tiles, bundle, q_offset, left,
                    right,
                    strip_origin, strips, scale, stride_ob, stride_ol, stride_oh, 2, BLOCK_N, D, BIAS, CAUSAL, WIDTH,
                    GROUPS,
                    STAGES, PACKED, LENGTHS,
                )),
                (fetch, (
                    desc_q, desc_k, desc_v, q_smem, k_smem, v_smem, q_full, q_free, k_full, k_free, v_full, v_free,
                    p_cu_q,
                    p_cu_k, p_lengths_k, max_q, max_k, heads, blocks, tiles, bundle, q_offset, left, right, rows_qb,
                    rows_qh, cols_qh,
                    rows_kb, rows_kh, cols_kh, rows_vb, rows_vh, cols_vh, BLOCK_N, BIAS, CAUSAL, GROUPS, STAGES,
                    PACKED, LENGTHS,
                )),
            ],
            [4, 4, 1], [160, 160, 24],
        )  # fmt: skip
