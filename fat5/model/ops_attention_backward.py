"""Launches the backward kernels of attention."""
# mypy: allow-untyped-defs

from typing import TYPE_CHECKING

import torch

try:
    import triton
except ImportError as error:  # a guarded import is what the loader of remote code asks for
    raise ImportError("the attention kernels need Triton") from error

from .ops_attention_backward_hopper_launch import (
    hopper_config,
    hopper_line_gradient,
    launch_hopper,
    line_gradient_of_diagonals,
    near_sums_of,
    readable_tiles,
)
from .ops_attention_backward_keys import backward_keys_kernel
from .ops_attention_backward_queries import backward_queries_kernel, delta_kernel, dq_store_kernel
from .ops_attention_bias_grad import dense_gradient_kernel, near_tiles_kernel
from .ops_attention_bias_line import line_gradient, near_offsets, padded_line, segment_of_blocks
from .ops_attention_configs import FEW_KEYS, backward_config
from .ops_attention_problem import addressable, check_segments
from .ops_device import compute_capability, multiprocessors

if TYPE_CHECKING:
    from .ops_attention_bias import BiasArgs
    from .ops_attention_problem import Problem

NONE, T5, ALIBI, DENSE = range(4)


def launch_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse2: torch.Tensor,
    bias: "BiasArgs",
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    lengths_k: torch.Tensor | None,
    problem: "Problem",
    seed: torch.Tensor | None = None,
    deterministic: bool = False,
    bias_gradient: bool = True,
    side_by_side: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of q, k, v and the bias.

    Args:
        do: gradient of the output, `[B, Lq, H, D]`.
        q: queries `[B, Lq, H, D]`; k, v: keys and values `[B, Lk, H, D]`; out: the forward's output.
        lse2: log-sum-exp of each row in log2 units, fp32 `[H, rows]`, +inf where no key is visible.
        bias: kind of bias and its tensors.
        cu_q: cumulative lengths of packed segments, int32 `[S + 1]`, with B = 1; cu_k likewise; None when padded.
        lengths_k: number of keys of each padded row, int32 `[B]`.
        problem: what the forward was called with.
        deterministic: dQ in a kernel of its own instead of by atomic additions (the bias gradient always is).
        bias_gradient: False to skip the gradient of the bias.
        side_by_side: where q, k, v, or k and v, are slices of one projection, so are their gradients of its gradient,
            which then needs no copy.

    Returns:
        dq, dk, dv in their inputs' shapes and dtypes, and the gradient of the line (fp32 `[H, left + right + 1]`) or of
        the dense bias (its shape and dtype), or None.
    """
    do, q, k, v, out = (addressable(x) for x in (do, q, k, v, out))
    batch, _, heads, head_dim = q.shape
    segments = batch if cu_q is None else cu_q.numel() - 1
    if q.numel() == 0 or k.numel() == 0:
        zeros = torch.zeros_like
        return zeros(q), zeros(k), zeros(v), _no_bias_gradient(bias) if bias_gradient else None
    check_segments(segments)
    block_d = max(16, triton.next_power_of_2(head_dim))
    capability = compute_capability(q)
    deterministic = deterministic or block_d > 128  # the fused kernel would spill most of its registers
    max_q, max_k = problem.max_seqlen_q, problem.max_seqlen_k
    rows_q = lse2.shape[1]
    dq, dk, dv = empty_gradients(q, k, v) if side_by_side else [torch.empty_like(x) for x in (q, k, v)]
    delta = torch.empty_like(lse2)
    dropout = problem.dropout_p > 0
    keys = backward_config("keys", block_d, q.element_size(), capability, dropout)
    queries = backward_config("queries", block_d, q.element_size(), capability, dropout)
    line_gradient = bias.kind == T5 and bias_gradient
    left, right = (bias.left, bias.right) if bias.kind == T5 else (0, 1)
    dense = bias.dense
    dense_strides = (0, 0, 0, 0) if dense is None else dense.stride()
    common = {"HEAD_DIM": head_dim, "BLOCK_D": block_d}
    variant = common | {"CAUSAL": problem.causal, "DROPOUT": dropout, "WHOLE_ROWS": max_k <= FEW_KEYS}

    def tiles_of(block_m: int) -> int:
        """Blocks of queries of all segments; in a pack each segment starts a block of its own."""
        return segments * triton.cdiv(max_q, block_m) if cu_q is None else rows_q // block_m + segments

    dq_tiles = None
    hopper = hopper_config(q, k, v, do, bias, problem, capability) if not deterministic else None
    row_tiles = diagonals = None
    if hopper is not None:
        keys = hopper.tiles
        if line_gradient:
            diagonals = near_sums_of(bias, problem, k, cu_k, keys.block_m, keys.block_n)
        rows = readable_tiles(tiles_of(keys.block_m), keys.block_m, max_k) * heads
        row_tiles = torch.empty((rows, 2, keys.block_m), dtype=torch.float32, device=q.device)
    if not deterministic:
        dq_tiles = torch.empty(
            tiles_of(keys.block_m) * heads * block_d * keys.block_m, dtype=torch.float32, device=q.device
        )
    grid_q = (triton.cdiv(max_q, keys.block_m), heads, segments)
    delta_kernel[grid_q](
        out, do, lse2, delta, dq_tiles, row_tiles, cu_q, *out.stride()[:3], *do.stride()[:3], rows_q,
        max_q, BLOCK_M=keys.block_m,
        FUSED=not deterministic, **common,
    )  # fmt: skip

    grid_k = (triton.cdiv(max_k, keys.block_n), heads, segments)
    far = torch.empty((heads, segments * grid_k[0], 2), dtype=torch.float32, device=q.device) if line_gradient else None
    if hopper is not None:
        launch_hopper(
            hopper,
            do,
            q,
            k,
            v,
            row_tiles,
            dq_tiles,
            dk,
            dv,
            far,
            diagonals,
            bias,
            cu_q,
            cu_k,
            lengths_k,
            problem,
            grid_k,
        )
    else:
        backward_keys_kernel[grid_k](
            q, k, v, do, lse2, delta, dq_tiles, dk, dv, far, padded_line(bias, keys.block_m + keys.block_n),
            bias.slopes,
            dense, cu_q, cu_k, lengths_k, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3],
            *dk.stride()[:3], *dv.stride()[:3], *dense_strides, rows_q, heads, max_q, max_k, problem.q_offset,
            problem.scale,
            left + right + 1 + 2 * (keys.block_m + keys.block_n), left, right, problem.dropout_p, seed,
            BLOCK_M=keys.block_m, BLOCK_N=keys.block_n, BIAS=bias.kind, FUSED=not deterministic,
            LINE_GRADIENT=line_gradient, num_warps=keys.num_warps, num_stages=keys.num_stages, **variant,
        )  # fmt: skip
    if deterministic:
        backward_queries_kernel[(triton.cdiv(max_q, queries.block_m), heads, segments)](
            q, k, v, do, lse2, delta, dq, padded_line(bias, queries.block_m + queries.block_n), bias.slopes, dense,
            cu_q,
            cu_k, lengths_k, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3], *dq.stride()[:3],
            *dense_strides, rows_q, heads, max_q, max_k, problem.q_offset, problem.scale,
            left + right + 1 + 2 * (queries.block_m + queries.block_n), left, right, problem.dropout_p, seed,
            BLOCK_M=queries.block_m, BLOCK_N=queries.block_n, BIAS=bias.kind, num_warps=queries.num_warps,
            num_stages=queries.num_stages, **variant,
        )  # fmt: skip
    else:
        dq_store_kernel[grid_q](
            dq_tiles,
            dq,
            cu_q,
            *dq.stride()[:3],
            max_q,
            problem.scale,
            BLOCK_M=keys.block_m,
            REGISTER_ORDER=hopper is not None,
            **common,
        )
        dq_tiles = None  # the bias gradient needs memory of its own

    dbias = None
    arguments = (q, k, v, do, lse2, delta)
    if line_gradient:
        if diagonals is not None:
            dbias = line_gradient_of_diagonals(diagonals, far, bias)
        elif hopper is not None:
            dbias = hopper_line_gradient(do, q, k, v, row_tiles, far, bias, cu_q, cu_k, lengths_k, problem)
        else:
            dbias = _line_gradient(*arguments, bias, far, cu_q, cu_k, lengths_k, problem, keys, variant, seed)
    elif dense is not None and bias_gradient:
        near = backward_config("near", block_d, q.element_size(), capability, dropout)
        dbias = torch.empty(_gradient_shape(dense), dtype=dense.dtype, device=q.device)
        check_segments(dbias.shape[0] * dbias.shape[1])
        grid = (triton.cdiv(max_q, near.block_m), triton.cdiv(max_k, near.block_n), dbias.shape[0] * dbias.shape[1])
        dense_gradient_kernel[grid](
            *arguments, dense, dbias, lengths_k, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3],
            *dense_strides, rows_q, batch, heads, dbias.shape[1], max_q, max_k, problem.q_offset, problem.scale,
            problem.dropout_p, seed, BLOCK_M=near.block_m, BLOCK_N=near.block_n, num_warps=near.num_warps,
            num_stages=near.num_stages, **variant,
        )  # fmt: skip
    return dq, dk, dv, dbias


def _gradient_shape(dense: torch.Tensor) -> list[int]:
    """That of a dense bias `[B, H, Lq, Lk]`, with 1 where it is broadcast."""
    shared = (1 if stride == 0 else size for size, stride in zip(dense.shape[:2], dense.stride()[:2], strict=True))
    return [*shared, *dense.shape[2:]]


def _no_bias_gradient(bias: "BiasArgs") -> torch.Tensor | None:
    """Zeros for a bias that was added to nothing."""
    if bias.dense is not None:
        return bias.dense.new_zeros(_gradient_shape(bias.dense))
    return None if bias.line is None else torch.zeros_like(bias.line)


def empty_gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """Room for the gradients of q, k, v `[B, L, H, D]`, side by side for those that are."""
    for alone in (0, 1):
        slices = (q, k, v)[alone:]
        batch, length, heads, head_dim = k.shape
        width = heads * head_dim
        pitch = len(slices) * width
        strides = (pitch * length, pitch, head_dim, 1)
        if all(
            x.shape == k.shape
            and x.stride()[batch == 1 :] == strides[batch == 1 :]  # that of a single row is anything
            and x.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
            and x.storage_offset() == slices[0].storage_offset() + index * width
            for index, x in enumerate(slices)
        ):
            memory = torch.empty((batch, length, len(slices), heads, head_dim), dtype=k.dtype, device=k.device)
            return [*(torch.empty_like(x) for x in (q,)[:alone]), *memory.unbind(2)]
    return [torch.empty_like(x) for x in (q, k, v)]


def _line_gradient(q, k, v, do, lse2, delta, bias, far, cu_q, cu_k, lengths_k, problem, config, variant, seed):
    """Near tiles at every tile offset, their diagonals, and the far sums that the fused kernel has measured."""
    block_m, block_n = config.block_m, config.block_n
    heads = q.shape[2]
    first, offsets = near_offsets(bias, problem, block_m, block_n)
    block = max(block_m, block_n)
    segments = q.shape[0] if cu_q is None else cu_q.numel() - 1
    by_query = block_m >= block_n
    if cu_q is None:
        blocks, block_segment = (
            segments * triton.cdiv(problem.max_seqlen_q if by_query else problem.max_seqlen_k, block),
            None,
        )
    else:
        blocks, block_segment = segment_of_blocks(cu_q if by_query else cu_k, (q if by_query else k).shape[1], block)
    splits = max(1, min(blocks, triton.cdiv(2 * multiprocessors(q), heads * offsets)))
    tiles = torch.empty((heads * offsets, splits, block_m, block_n), dtype=torch.float32, device=q.device)
    near_tiles_kernel[(offsets, splits, heads)](
        q, k, v, do, lse2, delta, padded_line(bias, block_m + block_n), tiles, cu_q, cu_k, lengths_k, block_segment,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3], lse2.shape[1], heads, problem.max_seqlen_q,
        problem.max_seqlen_k, problem.q_offset, problem.scale, bias.left + bias.right + 1 + 2 * (block_m + block_n),
        bias.left, bias.right, first, blocks, problem.dropout_p, seed, BLOCK_M=block_m, BLOCK_N=block_n,
        num_warps=config.num_warps, num_stages=config.num_stages, **variant,
    )  # fmt: skip
    return line_gradient(tiles, far, bias, first, min(block_m, block_n), heads, offsets, keys_first=False)
