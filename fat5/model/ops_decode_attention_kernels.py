"""The kernel of attention for one query a row, as in decoding, and its launcher."""
# mypy: allow-untyped-defs, disable-error-code="misc"

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:  # a guarded import is what the loader of remote code asks for
    raise ImportError("the kernel of decoding's attention needs Triton") from error

from .ops_device import multiprocessors
from .ops_early_launch import launch_options, wait_for_earlier

LOG2_E = tl.constexpr(1.4426950408889634)


PROGRAMS = 4
"""For each multiprocessor, as far as there are keys for so many: they wait for memory side by side."""
MAX_PARTS = 32


@triton.jit(do_not_specialize=["keys", "span"])
def decode_attention_kernel(
    p_q, p_k, p_v, p_bias, p_out, p_top, p_sum, scale, masked,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_bb, stride_bh,
    keys, span,
    H: tl.constexpr, D: tl.constexpr, BIAS: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (batch x heads, PARTS), each program for `span` keys. The query fills all rows of a tile, as products want.

    Scores are in log2 units. Of a single part the output is written, of several the sums, their scale and their total.
    """
    batch, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    start = tl.program_id(1) * span
    o_m, o_n, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_d = o_d < D
    wait_for_earlier(EARLY)
    o_q = batch * stride_qb + head * stride_qh + o_d[None, :] + 0 * o_m[:, None]
    b_q = tl.load(p_q + o_q, mask=m_d[None, :], other=0.0)
    p_k += batch * stride_kb + head * stride_kh
    p_v += batch * stride_vb + head * stride_vh
    if BIAS:
        p_bias += batch * stride_bb + head * stride_bh
    b_top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(start, min(start + span, keys), BLOCK_N):
        o_key = (first + o_n).to(tl.int64)
        m_key = first + o_n < keys
        b_k = tl.load(p_k + o_key[None, :] * stride_kn + o_d[:, None], mask=m_key[None, :] & m_d[:, None], other=0.0)
        b_v = tl.load(p_v + o_key[:, None] * stride_vn + o_d[None, :], mask=m_key[:, None] & m_d[None, :], other=0.0)
        b_score = tl.dot(b_q, b_k, input_precision="ieee") * (scale * LOG2_E)
        m_seen = m_key
        if BIAS:
            b_bias = tl.load(p_bias + o_key, mask=m_key, other=0.0).to(tl.float32)
            b_score += (b_bias * LOG2_E)[None, :]
            m_seen = m_key & (b_bias != masked)
        b_score = tl.where(m_seen[None, :], b_score, -float("inf"))
        b_new_top = tl.maximum(b_top, tl.max(b_score, axis=1))
        b_base = tl.where(b_new_top == -float("inf"), 0.0, b_new_top)
        b_shrink = tl.exp2(b_top - b_base)
        b_p = tl.exp2(b_score - b_base[:, None])
        b_sum = b_sum * b_shrink + tl.sum(b_p, axis=1)
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_shrink[:, None], input_precision="ieee")
        b_top = b_new_top
    place = tl.program_id(0).to(tl.int64) * PARTS + tl.program_id(1)
    if PARTS == 1:
        b_out /= tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    else:
        o_place = place + 0 * o_m
        tl.store(p_top + o_place, b_top, mask=o_m == 0)
        tl.store(p_sum + o_place, b_sum, mask=o_m == 0)
    o_out = place * D + o_d[None, :] + 0 * o_m[:, None]
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_d[None, :] & (o_m == 0)[:, None])


@triton.jit
def sum_parts_kernel(
    p_part, p_top, p_sum, p_out,
    D: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (batch x heads): the output of what the parts of the keys gave."""
    row = tl.program_id(0).to(tl.int64)
    o_s, o_d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    m_s, m_d = o_s < PARTS, o_d < D
    wait_for_earlier(EARLY)
    b_top = tl.load(p_top + row * PARTS + o_s, mask=m_s, other=-float("inf"))
    b_sum = tl.load(p_sum + row * PARTS + o_s, mask=m_s, other=0.0)
    o_part = (row * PARTS + o_s)[:, None] * D + o_d[None, :]
    b_part = tl.load(p_part + o_part, mask=m_s[:, None] & m_d[None, :], other=0.0)
    top = tl.max(b_top, axis=0)
    b_shrink = tl.exp2(b_top - tl.where(top == -float("inf"), 0.0, top))
    total = tl.sum(b_sum * b_shrink, axis=0)
    b_out = tl.sum(b_part * b_shrink[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(p_out + row * D + o_d, b_out.to(p_out.dtype.element_ty), mask=m_d)


def launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float, early: bool
) -> torch.Tensor:
    """Output `[B, 1, H, D]`.

    Args:
        q: `[B, H, 1, D]`; the last axis of this and of what follows has stride 1.
        k, v: `[B, H, Lk, D]`.
        bias: `[B|1, H|1, 1, Lk]` or None. The least finite number of its dtype hides a key.
        scale: factor on the scores.
        early: see `ops_early_launch`.
    """
    (batch, heads, _, width), keys = q.shape, k.shape[2]
    out = torch.empty((batch, 1, heads, width), dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    masked, strides = 0.0, [0, 0]
    if bias is not None:
        masked = torch.finfo(bias.dtype).min
        strides = [bias.stride(axis) if bias.shape[axis] > 1 else 0 for axis in (0, 1)]
    block_d = max(16, triton.next_power_of_2(width))
    block_n = min(128, max(16, (1 << 14) // (q.element_size() * block_d)))  # 16 KiB of keys, what registers hold
    blocks = triton.cdiv(keys, block_n)
    span = triton.cdiv(blocks, min(MAX_PARTS, max(1, PROGRAMS * multiprocessors(q) // (batch * heads))))
    parts = max(1, triton.cdiv(blocks, max(1, span)))
    part, top, total = out, None, None
    if parts > 1:
        part = torch.empty((batch * heads, parts, width), dtype=torch.float32, device=q.device)
        top, total = torch.empty((2, batch * heads, parts), dtype=torch.float32, device=q.device)
    decode_attention_kernel[(batch * heads, parts)](
        q, k, v, bias, part, top, total, scale, masked, *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *strides,
        keys, span * block_n, heads, width, bias is not None, parts, early, 16, block_n, block_d,
        num_warps=4 if block_d <= 128 else 8, num_stages=3, **launch_options(early),
    )  # fmt: skip
    if parts > 1:
        sum_parts_kernel[(batch * heads,)](
            part, top, total, out, width, parts, early, triton.next_power_of_2(parts), block_d,
            num_warps=4, **launch_options(early),
        )  # fmt: skip
    return out
