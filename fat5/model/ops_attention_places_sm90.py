"""Which queries and keys a program of the kernels for sm_90 works on, in Gluon."""
# mypy: allow-untyped-defs

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
except ImportError as error:  # a guarded import is what the loader of remote code asks for
    raise ImportError("the attention kernels need Triton") from error


@gluon.jit
def hidden_zero():
    """Zero, as an int32 that the compiler cannot see through: it computes what depends on it where that is needed,
    instead of keeping it in registers, or in memory for want of them, from before a loop on.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def hidden_pointer(p):
    """The same pointer, as `hidden_zero` is zero: what differs between threads is added to it where that is needed, and
    not kept from before a loop on.
    """
    p_same = gl.inline_asm_elementwise("mov.b64 $0, $1;", "=l,l", [p.to(gl.int64)], gl.int64, is_pure=False, pack=1)
    return p_same.to(p.dtype)


@gluon.jit
def block_of(tile, blocks, heads, tiles, bundle, CAUSAL: gl.constexpr):
    """Block of queries, head and segment of one tile of work."""
    if CAUSAL:
        # the longest rows first, for as many heads at a time as have keys and values that fit in the L2 cache
        first = tile // (bundle * blocks) * bundle
        width = gl.minimum(bundle, tiles // blocks - first)
        within = tile - first * blocks
        block = blocks - 1 - within // width
        row = first + within % width
    else:
        block = tile % blocks
        row = tile // blocks
    return block, row % heads, row // heads


@gluon.jit
def lengths_of(s, p_cu_q, p_cu_k, p_lengths_k, max_q, max_k, PACKED: gl.constexpr, LENGTHS: gl.constexpr):
    """First query, number of queries, first key and number of keys of segment `s`."""
    if PACKED:
        start_q = gl.load(p_cu_q + s)
        start_k = gl.load(p_cu_k + s)
        len_q = gl.load(p_cu_q + s + 1) - start_q
        len_k = gl.load(p_cu_k + s + 1) - start_k
    else:
        start_q = s * max_q
        start_k = s * max_k
        len_q = max_q
        len_k = max_k
    if LENGTHS:
        len_k = gl.minimum(len_k, gl.load(p_lengths_k + s))
    return start_q, len_q, start_k, len_k


@gluon.jit
def last_key(m0, len_k, q_offset, BLOCK_M: gl.constexpr, CAUSAL: gl.constexpr):
    """End of the keys that a block of queries sees."""
    last = len_k
    if CAUSAL:
        last = gl.maximum(gl.minimum(len_k, m0 + q_offset + BLOCK_M), 0)
    return last


@gluon.jit
def band_of(m0, q_offset, left, right, BLOCK_N: gl.constexpr):
    """First and end of the blocks of keys, multiples of BLOCK_N, for which the bias of 64 queries is not one number."""
    near = gl.maximum(m0 + q_offset - left + 1, 0) // BLOCK_N * BLOCK_N
    far = gl.maximum(m0 + q_offset + 63 + right + BLOCK_N - 1, 0) // BLOCK_N * BLOCK_N
    return near, far
