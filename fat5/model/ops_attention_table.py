"""T5's table as the line of its biases over distances, and the table's gradient from the line's: one launch each."""
# mypy: allow-untyped-defs, disable-error-code="misc"

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:  # a guarded import is what the loader of remote code asks for
    raise ImportError("the attention kernels need Triton") from error

BLOCK = 256


@triton.jit
def expand_table_kernel(p_table, p_buckets, p_line, stride_b, stride_h, size, BLOCK: tl.constexpr):
    """Grid (heads, blocks of the line)."""
    h = tl.program_id(0)
    o_r = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_r = o_r < size
    b_bucket = tl.load(p_buckets + o_r, mask=m_r, other=0)
    b_line = tl.load(p_table + b_bucket * stride_b + h * stride_h, mask=m_r, other=0.0)
    tl.store(p_line + h * size + o_r, b_line.to(tl.float32), mask=m_r)


@triton.jit
def reduce_line_kernel(p_dline, p_buckets, p_dtable, size, BLOCK: tl.constexpr):
    """Grid (buckets, heads): the sum over a bucket's distances, always in the same order."""
    bucket = tl.program_id(0)
    h = tl.program_id(1)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, size, BLOCK):
        o_r = first + tl.arange(0, BLOCK)
        m_r = o_r < size
        m_r = m_r & (tl.load(p_buckets + o_r, mask=m_r, other=-1) == bucket)
        b_sum += tl.load(p_dline + h * size + o_r, mask=m_r, other=0.0)
    tl.store(p_dtable + bucket * tl.num_programs(1) + h, tl.sum(b_sum, axis=0).to(p_dtable.dtype.element_ty))


def line_of_table(table: torch.Tensor, buckets: torch.Tensor) -> torch.Tensor:
    """As `expand_table`: line fp32 `[H, R]` of a table `[num_buckets, H]` for the buckets int64 `[R]`."""
    heads, size = table.shape[1], buckets.numel()
    line = torch.empty((heads, size), dtype=torch.float32, device=table.device)
    expand_table_kernel[(heads, triton.cdiv(size, BLOCK))](table, buckets, line, *table.stride(), size, BLOCK=BLOCK)
    return line


def table_gradient(gradient: torch.Tensor, buckets: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Gradient of a table `[num_buckets, H]` in its dtype from that of its line, fp32 `[H, R]`, contiguous."""
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    reduce_line_kernel[tuple(like.shape)](gradient, buckets, out, buckets.numel(), BLOCK=BLOCK)
    return out
