"""Launches the forward kernel of attention."""
# mypy: disable-error-code="misc"

import torch

try:
    import triton
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as error:  # a guarded import is what the loader of remote code asks for
    raise ImportError("the attention kernels need Triton") from error

from .ops_attention_bias import NO_BIAS, T5_BIAS, BiasArgs
from .ops_attention_configs import ForwardConfig, forward_config
from .ops_attention_forward_kernel import forward_kernel
from .ops_attention_forward_sm90 import TensorDescriptor as GluonDescriptor
from .ops_attention_forward_sm90 import forward_sm90_kernel, shared_layout
from .ops_attention_problem import Problem, addressable, check_segments
from .ops_attention_strips import expand_strips, strip_origin
from .ops_device import compute_capability, multiprocessors

L2_BYTES = 24 << 20  # keys and values that may be in use at a time


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: BiasArgs,
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    lengths_k: torch.Tensor | None,
    problem: Problem,
    seed: torch.Tensor | None = None,
    config: ForwardConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q over k and v.

    Args:
        q: queries `[B, Lq, H, D]`; k, v: keys and values `[B, Lk, H, D]`, one dtype.
        bias: kind of bias and its tensors.
        cu_q: cumulative lengths of packed segments, int32 `[S + 1]`, with B = 1; cu_k likewise; None when padded.
        lengths_k: number of keys of each padded row, int32 `[B]`.
        problem: the numbers of the call.
        seed: of the dropout, int64 `[1]`.
        config: overrides the table of configurations.

    Returns:
        The output `[B, Lq, H, D]` and each row's log-sum-exp in log2 units, fp32 `[H, B * Lq]`, +inf where no key is
        visible.
    """
    q, k, v = (addressable(x) for x in (q, k, v))
    batch, length_q, heads, head_dim = q.shape
    segments = batch if cu_q is None else cu_q.numel() - 1
    block_d = max(16, triton.next_power_of_2(head_dim))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse2 = torch.empty((heads, batch * length_q), dtype=torch.float32, device=q.device)
    if length_q == 0 or segments == 0:
        return out, lse2
    plain = bias.kind in (NO_BIAS, T5_BIAS) and problem.dropout_p == 0.0
    matrices = [head_rows(x) for x in (q, k, v)] if head_dim == block_d else [None]
    tma = all(matrix is not None for matrix in matrices)
    config = config or forward_config(
        block_d, q.element_size(), compute_capability(q), problem.max_seqlen_k, plain and tma, bias.kind == T5_BIAS,
        problem.causal, problem.dropout_p > 0,
    )  # fmt: skip
    strips, origin, width = None, 0, 0
    if bias.line is not None:
        reach = config.block_m + config.block_n
        exact = problem.scale == 1.0 and bias.exact_dtype == q.dtype and q.element_size() == 2
        dtype = q.dtype if exact and not config.wide_bias else torch.float32
        strips = expand_strips(bias.line, bias.left, bias.right, problem.q_offset & 7, reach, problem.scale, dtype)
        origin, width = strip_origin(bias.left, reach), strips[0, 0].numel()
    if config.groups:
        (shape_q, *steps_q), (shape_k, *steps_k), (shape_v, *steps_v) = matrices
        desc_q = gluon_descriptor(q, shape_q, 64)
        desc_k, desc_v = gluon_descriptor(k, shape_k, config.block_n), gluon_descriptor(v, shape_v, config.block_n)
        blocks = triton.cdiv(problem.max_seqlen_q, 64 * config.groups)
        tiles = blocks * heads * segments
        bundle = max(1, L2_BYTES // (problem.max_seqlen_k * head_dim * q.element_size() * 2))
        unused = lse2  # where a pointer is not read
        programs = min(tiles, multiprocessors(q))
        forward_sm90_kernel[(programs,)](
            desc_q, desc_k, desc_v, out, lse2, *(unused if x is None else x for x in (bias.line, strips, cu_q, cu_k,
            lengths_k)),
            *out.stride()[:3], *steps_q, *steps_k, *steps_v, lse2.shape[1], heads, blocks, tiles, bundle,
            problem.max_seqlen_q,
            problem.max_seqlen_k, problem.q_offset, problem.scale, bias.left, bias.right, origin,
            0 if strips is None else strips.shape[1], D=head_dim, BLOCK_N=config.block_n, BIAS=bias.kind,
            CAUSAL=problem.causal, WIDTH=width, GROUPS=config.groups, STAGES=config.num_stages, PACKED=cu_q is not None,
            LENGTHS=lengths_k is not None, num_warps=4,
        )  # fmt: skip
        return out, lse2
    check_segments(segments)
    (shape_k, *steps_k), (shape_v, *steps_v) = matrices[1:] if tma else [(None, 0, 0, 0)] * 2
    tma = tma and config.tma
    desc_k, desc_v = (
        TensorDescriptor(x, shape, [x.stride(1), 1], [config.block_n, head_dim]) if tma else None
        for x, shape in ((k, shape_k), (v, shape_v))
    )
    dense_strides = (0, 0, 0, 0) if bias.dense is None else bias.dense.stride()
    forward_kernel[(triton.cdiv(problem.max_seqlen_q, config.block_m), heads, segments)](
        q, k, v, out, lse2, desc_k, desc_v, bias.line, strips, bias.slopes, bias.dense, cu_q, cu_k, lengths_k, seed,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *dense_strides, *steps_k, *steps_v,
        lse2.shape[1], heads, problem.max_seqlen_q, problem.max_seqlen_k, problem.q_offset, problem.scale, bias.left,
        bias.right, origin, 0 if strips is None else strips.shape[1], problem.dropout_p,
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BIAS=bias.kind,
        CAUSAL=problem.causal, DROPOUT=problem.dropout_p > 0, TMA=tma, WIDTH=width,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse2


def head_rows(x: torch.Tensor) -> tuple[list[int], int, int, int] | None:
    """`[B, L, H, D]` as one matrix of which the copy engine fetches rows of one head.

    Returns:
        The matrix's shape, and the steps that lead from one batch row to the next (in its rows), from one head to the
        next (in rows) and (in columns). None if the strides do not allow it.
    """
    batch, length, heads, head_dim = x.shape
    step_b, step_l, step_h, _ = x.stride()
    if length == 0 or step_l < head_dim or step_b % step_l:
        return None
    if step_l * x.element_size() % 16 or x.data_ptr() % 16:
        return None
    if step_h % step_l == 0 and step_h >= step_l:
        rows_h, cols_h = step_h // step_l, 0
    elif step_h * (heads - 1) + head_dim <= step_l and step_h * x.element_size() % 16 == 0:
        rows_h, cols_h = 0, step_h
    else:
        return None
    rows = (batch - 1) * (step_b // step_l) + (heads - 1) * rows_h + length
    return [rows, (heads - 1) * cols_h + head_dim], step_b // step_l, rows_h, cols_h


def gluon_descriptor(x: torch.Tensor, shape: list[int], block: int) -> GluonDescriptor:
    """Descriptor of the matrix `head_rows(x)` for the kernel for sm_90."""
    layout = shared_layout(block, x.shape[-1], x.dtype)
    return GluonDescriptor(x, shape, [x.stride(1), 1], [block, x.shape[-1]], layout)
