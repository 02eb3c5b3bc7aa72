"""Dropout inside a kernel: the mask of a row, recomputed wherever it is needed from seed, row and column."""
# mypy: allow-untyped-defs

try:
    import triton
    import triton.language as tl
except ImportError as error:  # a guarded import is what the loader of remote code asks for
    raise ImportError("the kernels need Triton") from error


@triton.jit
def keep_tile(p_seed, row, first_column, dropped, BLOCK: tl.constexpr):
    """Bool `[BLOCK]`: which elements of `row` are kept, from `first_column` (a multiple of 8) on.

    One Philox call serves 8 neighbours, which the same thread holds: see `elementwise_dropout` for the definition.
    """
    seed = tl.load(p_seed)
    o_group = first_column // 8 + tl.arange(0, BLOCK // 8)
    zero = o_group * 0
    r0, r1, r2, r3 = tl.philox(seed, o_group, zero + row, zero, zero)
    words = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (BLOCK // 2,))
    halves = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK,))
    return halves >= dropped
