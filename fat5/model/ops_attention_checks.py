"""What attention refuses: arguments of which the kernels would make something wrong without a word."""

from itertools import pairwise

import torch

from .ops_attention_bias import AlibiBias, DenseBias, T5Bias
from .ops_operator import INTERPRETED, is_watched

MAX_HEAD_DIM = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Bias = T5Bias | AlibiBias | DenseBias | None


def check_numbers(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, q_offset: int, dropout_p: float
) -> None:
    """Refuse dtypes, head widths and numbers that the kernels do not take."""
    if q.dtype != k.dtype or q.dtype != v.dtype or not _served(q):
        raise ValueError(f"q, k, v must share one dtype of bf16, fp16, fp32: got {q.dtype}, {k.dtype}, {v.dtype}")
    if not 1 <= q.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim is {q.shape[-1]}: 1 to {MAX_HEAD_DIM} are supported")
    if scale <= 0 or not 0 <= dropout_p < 1 or q_offset < 0:
        raise ValueError(f"need scale > 0, 0 <= dropout_p < 1, q_offset >= 0: got {scale}, {dropout_p}, {q_offset}")


def check_layout(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: Bias,
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    max_q: int | None,
    max_k: int | None,
    key_lengths: torch.Tensor | None,
    q_offset: int,
) -> None:
    """Refuse shapes that do not fit together, and what belongs to the other layout."""
    if (cu_q is None) != (cu_k is None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k go together: give both or neither")
    rank, layout = (4, "[B, H, L, D]") if cu_q is None else (3, "[T, H, D] with cu_seqlens")
    if q.dim() != rank or k.dim() != rank or v.shape != k.shape:
        raise ValueError(f"q, k, v must be {layout}: got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
    same = (0, 1, 3) if cu_q is None else (1, 2)
    if any(q.shape[axis] != k.shape[axis] for axis in same):
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} must agree in batch, heads and head_dim")
    if cu_q is not None and cu_k is not None:
        if key_lengths is not None or q_offset or isinstance(bias, DenseBias):
            raise ValueError(
                "key_lengths, q_offset and a dense bias are for the padded layout, cu_seqlens for the packed"
            )
        if cu_q.shape != cu_k.shape:
            raise ValueError(
                f"cu_seqlens of {cu_q.numel() - 1} query segments and {cu_k.numel() - 1} key segments differ"
            )
        _check_segments("q", cu_q, q.shape[0], max_q)
        _check_segments("k", cu_k, k.shape[0], max_k)
    if key_lengths is not None and (key_lengths.shape != q.shape[:1] or not _whole(key_lengths)):
        raise ValueError(
            f"key_lengths must be ints [{q.shape[0]}], one a row: got {key_lengths.dtype} {list(key_lengths.shape)}"
        )


def _check_segments(side: str, cu_seqlens: torch.Tensor, tokens: int, longest: int | None) -> None:
    """Refuse segments that are not all of the tokens, where looking does not wait for a device."""
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0 or not _whole(cu_seqlens):
        raise ValueError(f"cu_seqlens_{side} must be ints [S + 1]: got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    if cu_seqlens.device.type != "cpu" or is_watched():
        return
    ends = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(ends)]
    if ends[0] != 0 or ends[-1] != tokens or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens_{side} must rise from 0 to the {tokens} tokens there are: got {ends}")
    if longest is not None and max(lengths, default=0) > longest:
        raise ValueError(f"max_seqlen_{side} is {longest}, but the longest segment has {max(lengths)} tokens")


def check_bias(q: torch.Tensor, k: torch.Tensor, bias: Bias) -> None:
    """Refuse a bias whose shape or dtype is not that of a bias for `q` and `k`, which fit together."""
    heads = q.shape[1]
    if isinstance(bias, T5Bias):
        if bias.table.dim() != 2 or bias.table.shape[1] != heads:
            raise ValueError(f"the bias table must be [num_buckets, {heads}]: got {list(bias.table.shape)}")
        if not _served(bias.table):
            raise ValueError(f"the bias table must be bf16, fp16 or fp32: got {bias.table.dtype}")
    if isinstance(bias, AlibiBias) and (bias.slopes.shape != (heads,) or bias.slopes.requires_grad):
        raise ValueError(f"ALiBi slopes must be [{heads}] and constant: got {list(bias.slopes.shape)}")
    if isinstance(bias, DenseBias):
        want, got = (q.shape[0], heads, q.shape[2], k.shape[2]), tuple(bias.bias.shape)
        if len(got) != 4 or got[2:] != want[2:] or got[0] not in (1, want[0]) or got[1] not in (1, heads):
            raise ValueError(f"a dense bias must be broadcastable to {list(want)} in batch and heads: got {list(got)}")
        if not _served(bias.bias):
            raise ValueError(
                f"a dense bias is added, in bf16, fp16 or fp32, and where it is -inf it masks: got {bias.bias.dtype}"
            )


def check_devices(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: Bias,
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    seed: torch.Tensor | None,
) -> None:
    """Refuse tensors that are not where the queries are: a kernel would read their addresses as its own."""
    tensors = {"k": k, "v": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "key_lengths": key_lengths, "seed": seed}
    if isinstance(bias, T5Bias):
        tensors["bias"] = bias.table
    elif isinstance(bias, AlibiBias):
        tensors["bias"] = bias.slopes
    elif isinstance(bias, DenseBias):
        tensors["bias"] = bias.bias
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}: move it there")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(f"seed must be int64 [1]: got {seed.dtype} {list(seed.shape)}")


def _served(x: torch.Tensor) -> bool:
    """Whether the dtype is one of the kernels', or, where there are none, of plain torch."""
    return x.dtype in DTYPES or (x.is_floating_point() and x.device.type != "cuda" and not INTERPRETED)


def _whole(x: torch.Tensor) -> bool:
    """Whether the dtype holds whole numbers that count."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
