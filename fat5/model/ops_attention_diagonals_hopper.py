"""Sums of dS along the diagonals near the main one, inside the fused kernel for sm_90.

A warp holds 16 keys by 64 queries of a tile of dS, a thread two rows 8 keys apart and a pair of columns in every 8: of
its 16 pairs those that lie on the same diagonals are added in registers, and what is left goes to shared memory, in a
place of its own for each of the few distances of a tile from the diagonal. Two small products with matrices of zeros
and ones add all that up at the end, in an order that is always the same.
"""
# mypy: allow-untyped-defs

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
except ImportError as error:  # a guarded import is what the loader of remote code asks for
    raise ImportError("the attention kernels need Triton") from error

PLACES = 6  # distances of a tile from the diagonal that shared memory has room for
FOLDED = 16  # columns of a program's sums: 15 diagonals, and zero


@gluon.jit
def pairs_of(b_ds):
    """A tile `[128, 64]` as two tensors `[warp, 8, 4, 2, 8]`: of a warp's 16 keys the first 8 and the others; queries
    are `8 * last + 2 * third + fourth`.
    """
    return gl.split(b_ds.reshape([8, 2, 8, 8, 4, 2]).permute([0, 2, 4, 5, 3, 1]))


@gluon.jit
def eight_of(b):
    """The eight slices of the last axis of `[8, 8, 4, 2, 8]`."""
    even, odd = gl.split(b.reshape([8, 8, 4, 2, 4, 2]))
    b_04, b_26 = gl.split(even.reshape([8, 8, 4, 2, 2, 2]))
    b_15, b_37 = gl.split(odd.reshape([8, 8, 4, 2, 2, 2]))
    b_0, b_4 = gl.split(b_04)
    b_1, b_5 = gl.split(b_15)
    b_2, b_6 = gl.split(b_26)
    b_3, b_7 = gl.split(b_37)
    return b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7


@gluon.jit
def strips_of(b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7):
    """Eight tensors `[warp, 8, 4, 2]` as one, `[8 * 8, 64]`."""
    b_03 = gl.join(gl.join(b_0, b_1), gl.join(b_2, b_3))
    b_47 = gl.join(gl.join(b_4, b_5), gl.join(b_6, b_7))
    return gl.join(b_03, b_47).permute([6, 5, 4, 0, 1, 2, 3]).reshape([64, 64])


@gluon.jit
def thread_sums(b_ds):
    """Sum of what each thread holds of a tile, `[warp, 8, 4]`."""
    upper, lower = pairs_of(b_ds)
    b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7 = eight_of(upper + lower)
    return gl.sum(((b_0 + b_1) + (b_2 + b_3)) + ((b_4 + b_5) + (b_6 + b_7)), 3)


@gluon.jit
def no_carry(b_zero):
    """Zeros in the form of a tile's last strip."""
    upper, _ = pairs_of(b_zero)
    return eight_of(upper)[7]


@gluon.jit
def store_strips(strips, b_ds, b_carry):
    """Store a tile's strips in `strips`, `[8 * 8, 64]`, and return the last one, to which the next tile adds its first.

    Row `8 * c + w` and column `8 * i + j` hold the pairs whose key minus query is `8 * (1 - c) + 16 * w + i - j` more
    than the tile's first pair's.
    """
    upper, lower = pairs_of(b_ds)
    u_0, u_1, u_2, u_3, u_4, u_5, u_6, u_7 = eight_of(upper)
    l_0, l_1, l_2, l_3, l_4, l_5, l_6, l_7 = eight_of(lower)
    b_strips = strips_of(
        b_carry + l_0, u_0 + l_1, u_1 + l_2, u_2 + l_3, u_3 + l_4, u_4 + l_5, u_5 + l_6, u_6 + l_7
    )  # fmt: skip
    strips.store(b_strips.to(strips.dtype))
    return u_7


@gluon.jit
def store_carry(strips, b_carry):
    """As `store_strips`, where there is no further tile."""
    b_zero = gl.zeros_like(b_carry)
    b_strips = strips_of(b_carry, b_zero, b_zero, b_zero, b_zero, b_zero, b_zero, b_zero)
    strips.store(b_strips.to(strips.dtype))


@gluon.jit
def diagonal_products(strips_buf, fold, PLACES: gl.constexpr, num_warps: gl.constexpr):
    """Sums over all strips of one distance, then along their diagonals: fp32 `[128, 16]`.

    Column f of row y belongs to the distance `8 * (y - 6) + f - 7` from the first pair of place 0. `fold` is shared
    memory `[16, 64]` that is free.
    """
    element: gl.constexpr = strips_buf.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    fold_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, 16, 16])
    rows: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [num_warps, 1], [1, 0])
    o_f = gl.arange(0, 16, gl.SliceLayout(1, rows))[:, None]
    o_ij = gl.arange(0, 64, gl.SliceLayout(0, rows))[None, :]
    fold.store(gl.where(o_f == o_ij // 8 - o_ij % 8 + 7, 1.0, 0.0).to(element))
    fence_async_shared()
    gl.thread_barrier()
    o_y = gl.arange(0, 128, gl.SliceLayout(1, operand))[:, None]
    o_cw = gl.arange(0, 64, gl.SliceLayout(0, operand))[None, :]
    o_row = 7 - o_cw // 8 + 2 * (o_cw % 8)
    b_rows = gl.zeros([128, 64], gl.float32, layout)
    for place in gl.static_range(PLACES):
        b_pick = gl.where(o_y - 8 * place == o_row, 1.0, 0.0).to(element)
        b_rows = warpgroup_mma(b_pick, strips_buf.index(place), b_rows, is_async=True)
    b_rows = warpgroup_mma_wait(num_outstanding=0, deps=[b_rows])
    b_rows16 = gl.convert_layout(b_rows.to(element), gl.DotOperandLayout(0, fold_layout, 2))
    b_folded = gl.zeros([128, 16], gl.float32, fold_layout)
    b_folded = warpgroup_mma(b_rows16, fold.permute([1, 0]), b_folded, is_async=True)
    return warpgroup_mma_wait(num_outstanding=0, deps=[b_folded])


@gluon.jit
def store_diagonals(
    strips_buf, fold, p_near, lowest, rows, is_stored, b_left, b_right, PLACES: gl.constexpr, num_warps: gl.constexpr
):
    """Write `rows` rows of `diagonal_products` from row `lowest` on; those before and after are far, and join the sums
    of the two sides.
    """
    b_folded = diagonal_products(strips_buf, fold, PLACES, num_warps)
    o_y = gl.arange(0, 128, gl.SliceLayout(1, b_folded.type.layout))[:, None] - lowest
    o_f = gl.arange(0, 16, gl.SliceLayout(0, b_folded.type.layout))[None, :]
    m_rows = (o_y >= 0) & (o_y < rows) & is_stored
    gl.store(p_near + o_y * 16 + o_f, b_folded, mask=m_rows & (o_f < 16))
    b_left = add_per_thread(b_left, gl.where(o_y < 0, b_folded, 0.0))
    b_right = add_per_thread(b_right, gl.where(o_y >= rows, b_folded, 0.0))
    return b_left, b_right


@gluon.jit
def add_per_thread(b_sums, b):
    """Add what each thread holds of `[128, 16]` to what `thread_sums` has made."""
    b = gl.sum(gl.sum(gl.sum(b.reshape([8, 2, 8, 2, 4, 2]), 5), 3), 1)
    return b_sums + gl.convert_layout(b, b_sums.type.layout, assert_trivial=True)
