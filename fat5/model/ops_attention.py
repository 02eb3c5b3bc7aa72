"""Attention with T5's position bias at the cost of attention without it: the public function and its operators."""

import functools
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from .ops_attention_bias import (
    ALIBI_BIAS,
    DENSE_BIAS,
    NO_BIAS,
    T5_BIAS,
    AlibiBias,
    BiasArgs,
    DenseBias,
    T5Bias,
    bias_line,
    expand_table,
    line_buckets,
)
from .ops_attention_checks import check_bias, check_devices, check_layout, check_numbers
from .ops_attention_problem import Problem, addressable
from .ops_attention_reference import reference_attention
from .ops_operator import INTERPRETED, is_transformed, is_watched, operator

try:
    import triton  # noqa: F401  (named here so that the loader of remote code sees a guarded import)

    from .ops_attention_backward import launch_backward
    from .ops_attention_forward import launch_forward
    from .ops_attention_table import line_of_table, table_gradient

    HAS_KERNELS = True
except ImportError as error:
    HAS_KERNELS = False
    if torch.version.cuda is not None and find_spec("triton") is not None:  # there is one, but of another release
        warnings.warn(
            "The kernels of FAT5 are off, and attention runs as SDPA: they need Triton 3.6, and with the one installed "
            f"an import fails ({error.__cause__ or error}).",
            stacklevel=2,
        )


REVERSE_MODE_ONLY = (
    "the attention kernels know reverse-mode autograd of one gradient only: for torch.func, forward mode and batched "
    "gradients use the eager implementation"
)


def kernels_serve(device: torch.device) -> bool:
    """Whether tensors on `device` go through the Triton kernels: an NVIDIA GPU from sm_80 on, or the interpreter."""
    return HAS_KERNELS and (INTERPRETED or (device.type == "cuda" and _is_supported(device)))


@torch.compiler.assume_constant_result  # a compiled model is compiled for one device
@functools.lru_cache
def _is_supported(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    bias: T5Bias | AlibiBias | DenseBias | None = None,
    causal: bool = False,
    scale: float = 1.0,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    key_lengths: torch.Tensor | None = None,
    q_offset: int = 0,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    deterministic: bool = False,
) -> torch.Tensor:
    """`softmax(scale * q @ k.T + bias) @ v`, head by head, in memory linear in length.

    Two layouts. Padded: q `[B, H, Lq, D]`, k and v `[B, H, Lk, D]`. Packed (with `cu_seqlens_*`): q `[Tq, H, D]`, k and
    v `[Tk, H, D]`, where segment s owns the tokens `cu_seqlens[s]` to `cu_seqlens[s + 1]` and sees nothing else; a
    segment may be empty. Any strides. A query that sees no key gives zeros, and zero gradients.

    On CUDA this is one Triton kernel (two or three more for the gradients), on a CPU plain torch, unless Triton
    interprets its kernels there (TRITON_INTERPRET=1).

    Args:
        q: queries, bf16, fp16 or fp32 (which is true fp32, never TF32); D from 1 to 256.
        k: keys, in q's dtype.
        v: values, in q's dtype.
        bias: added to the scores; -inf masks, and so does what is infinite in units of log2, as the least finite number
            of fp32 and bf16 is. T5's table and a dense bias receive gradients. Distances are between
            positions in the segment (plus `q_offset`). Dense: padded layout only.
        causal: key j is visible to query i only if `j <= i + q_offset`.
        scale: factor on the scores, positive. T5's is 1.
        cu_seqlens_q: cumulative segment lengths of the packed layout, int32 `[S + 1]`, from 0 to Tq. On a GPU their
            values are not looked at: tokens outside every segment would come back as they lie in memory, outputs and
            gradients alike.
        cu_seqlens_k: the same for the keys.
        max_seqlen_q: length of the longest segment, or more; on a GPU not looked at either. Left out, it is read back
            from the device, which neither `torch.compile` nor a CUDA graph can do.
        max_seqlen_k: the same for the keys.
        key_lengths: ints `[B]`, padded layout only: keys of row b from `key_lengths[b]` on are padding.
        q_offset: position of query 0 relative to key 0, not negative: the number of cached tokens. Padded layout only.
        dropout_p: probability of dropping an attention weight.
        seed: int64 `[1]` on q's device, seed of the dropout; drawn from torch's generator when left out. What is
            dropped depends on it, segment, head, query and key alone: not on layout, tile sizes or kernel.
        deterministic: the same bits on every run. Without it the gradient of q alone may differ in its last bits, and
            the backward pass is faster. `torch.use_deterministic_algorithms` sets it as well.

    Returns:
        Output in q's layout, shape and dtype. (A padded one is a view of `[B, Lq, H, D]`.)

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit together.
        NotImplementedError: inside a transform of `torch.func`, in forward-mode differentiation or of batched gradients
            (`is_grads_batched`), on the kernels. (Where `torch.compile` traces such a transform, the error is its own.)

    Sources: FlashAttention-2 (Dao 2023, arXiv:2307.08691) for the tiling, T5 (Raffel et al. 2020, arXiv:1910.10683)
    for the bias.
    """
    packed = cu_seqlens_q is not None
    check_numbers(q, k, v, scale, q_offset, dropout_p)
    check_layout(q, k, v, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, key_lengths, q_offset)
    check_bias(q, k, bias)
    check_devices(q, k, v, bias, cu_seqlens_q, cu_seqlens_k, key_lengths, seed)
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        q, k, v = q[None], k[None], v[None]
        cu_seqlens_q, cu_seqlens_k = _as_read(cu_seqlens_q, torch.int32), _as_read(cu_seqlens_k, torch.int32)
        max_seqlen_q = _longest(cu_seqlens_q) if max_seqlen_q is None else max_seqlen_q
        max_seqlen_k = _longest(cu_seqlens_k) if max_seqlen_k is None else max_seqlen_k
    else:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        max_seqlen_q, max_seqlen_k = q.shape[1], k.shape[1]
    if key_lengths is not None:
        key_lengths = _as_read(key_lengths, torch.int32)
    kind, bias_tensor, bidirectional, max_distance = _bias_operands(bias)
    if dropout_p > 0 and seed is None:
        seed = torch.randint(1 << 62, (1,), device=q.device)
    if kernels_serve(q.device):
        if is_transformed():
            raise NotImplementedError(REVERSE_MODE_ONLY)
        q, k, v = (addressable(x) for x in (q, k, v))
        deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
        out, _ = attention_forward(
            q, k, v, bias_tensor, cu_seqlens_q, cu_seqlens_k, key_lengths, seed, kind, bidirectional, max_distance,
            causal, scale, q_offset, dropout_p, max_seqlen_q, max_seqlen_k, deterministic,
        )  # fmt: skip
    elif q.device.type == "cuda":
        raise ValueError("attention on CUDA needs Triton: pip install 'fat5[gpu]', or use the sdpa implementation")
    else:
        problem = Problem(causal, scale, q_offset, dropout_p, max_seqlen_q, max_seqlen_k)
        args = _bias_args(kind, bias_tensor, bidirectional, max_distance, q.shape[0], q.shape[2], expand_table)
        out = reference_attention(q, k, v, args, cu_seqlens_q, cu_seqlens_k, key_lengths, problem, seed)
    return out.squeeze(0) if packed else out.transpose(1, 2)


def _as_read(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As the kernels read them: one after the other."""
    return numbers.to(dtype).contiguous()


def _longest(cu_seqlens: torch.Tensor) -> int:
    """Length of the longest segment, read back from the device."""
    return int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0


def _bias_operands(bias: T5Bias | AlibiBias | DenseBias | None) -> tuple[int, torch.Tensor | None, bool, int]:
    """Kind of bias, its tensor, and T5's two parameters (unused by the others)."""
    if isinstance(bias, T5Bias):
        return T5_BIAS, bias.table, bias.bidirectional, bias.max_distance
    if isinstance(bias, AlibiBias):
        return ALIBI_BIAS, _as_read(bias.slopes, torch.float32), True, 0
    if isinstance(bias, DenseBias):
        dense = bias.bias
        if dense.is_leaf and dense.requires_grad:  # each of its numbers has a gradient of its own
            dense = dense.contiguous()
        for axis in (0, 1):  # an expanded axis is one whose gradient is summed once, here
            if dense.stride(axis) == 0 and dense.shape[axis] > 1:
                dense = dense.narrow(axis, 0, 1)
        return DENSE_BIAS, dense, True, 0
    return NO_BIAS, None, True, 0


def _bias_args(
    kind: int,
    bias: torch.Tensor | None,
    bidirectional: bool,
    max_distance: int,
    batch: int,
    heads: int,
    expand: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> BiasArgs:
    """The bias as the launchers take it; `expand` makes T5's line of its table and buckets."""
    if kind == T5_BIAS and bias is not None:
        _, left, right = bias_line(bidirectional, bias.shape[0], max_distance)
        buckets = line_buckets(bidirectional, bias.shape[0], max_distance, bias.device)
        return BiasArgs(kind, expand(bias, buckets), left, right, exact_dtype=bias.dtype)
    if kind == ALIBI_BIAS:
        return BiasArgs(kind, slopes=bias)
    if kind == DENSE_BIAS and bias is not None:
        return BiasArgs(kind, dense=bias.expand(batch, heads, *bias.shape[2:]))
    return BiasArgs()


@operator("fat5::attention_forward")
def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    lengths_k: torch.Tensor | None,
    seed: torch.Tensor | None,
    kind: int,
    bidirectional: bool,
    max_distance: int,
    causal: bool,
    scale: float,
    q_offset: int,
    dropout_p: float,
    max_q: int,
    max_k: int,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[B, Lq, H, D]` and log-sum-exp fp32 `[H, B * Lq]` (log2 units) for q, k, v `[B, L, H, D]`."""
    args = _bias_args(kind, bias, bidirectional, max_distance, q.shape[0], q.shape[2], line_of_table)
    problem = Problem(causal, scale, q_offset, dropout_p, max_q, max_k)
    return launch_forward(q, k, v, args, cu_q, cu_k, lengths_k, problem, seed)


@attention_forward.register_fake
def _forward_shapes(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[2], q.shape[0] * q.shape[1]), dtype=torch.float32)


@operator("fat5::attention_backward")
def attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bias: torch.Tensor | None,
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    lengths_k: torch.Tensor | None,
    seed: torch.Tensor | None,
    kind: int,
    bidirectional: bool,
    max_distance: int,
    causal: bool,
    scale: float,
    q_offset: int,
    dropout_p: float,
    max_q: int,
    max_k: int,
    deterministic: bool,
    bias_gradient: bool,
    side_by_side: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and, if `bias_gradient`, of the bias (else an empty tensor).

    With `side_by_side`, which `torch.library` forbids its operators, gradients lie in one tensor where their inputs do.
    """
    args = _bias_args(kind, bias, bidirectional, max_distance, q.shape[0], q.shape[2], line_of_table)
    problem = Problem(causal, scale, q_offset, dropout_p, max_q, max_k)
    dq, dk, dv, dbias = launch_backward(
        grad, q, k, v, out, lse, args, cu_q, cu_k, lengths_k, problem, seed, deterministic, bias_gradient,
        side_by_side,
    )  # fmt: skip
    if dbias is None or bias is None:
        dbias = q.new_empty(0)
    elif kind == T5_BIAS:
        buckets = line_buckets(bidirectional, bias.shape[0], max_distance, bias.device)
        dbias = table_gradient(dbias, buckets, bias)
    return dq, dk, dv, dbias


@attention_backward.register_fake
def _backward_shapes(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bias: torch.Tensor | None,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dbias = bias.new_empty(bias.shape) if options[-2] and bias is not None else q.new_empty(0)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dbias


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:8], *output)
    ctx.options = inputs[8:]
    ctx.set_materialize_grads(False)  # the log-sum-exp is for backward alone


def _backward(ctx: Any, grad: torch.Tensor, _grad_lse: None) -> tuple[torch.Tensor | None, ...]:
    if not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad):
        raise NotImplementedError(REVERSE_MODE_ONLY)
    q, k, v, bias, cu_q, cu_k, lengths_k, seed, out, lse = ctx.saved_tensors
    dq, dk, dv, dbias = attention_backward(
        grad, q, k, v, out, lse, bias, cu_q, cu_k, lengths_k, seed, *ctx.options, ctx.needs_input_grad[3],
        not is_watched(),
    )  # fmt: skip
    return dq, dk, dv, dbias if ctx.needs_input_grad[3] else None, *[None] * (4 + len(ctx.options))


attention_forward.register_autograd(_backward, setup_context=_save_for_backward)
