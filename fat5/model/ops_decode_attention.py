"""Attention for one query a row, as in decoding, without gradients."""

import torch
from torch.nn import functional as F

from .ops_attention import kernels_serve
from .ops_attention_checks import DTYPES, MAX_HEAD_DIM
from .ops_operator import is_launch_bound, is_transformed, operator

try:
    import triton  # noqa: F401  (named here so that the loader of remote code sees a guarded import)

    from .ops_decode_attention_kernels import launch
    from .ops_early_launch import launches_early
except ImportError:
    pass


MAX_KEYS = 1 << 16
"""Of all rows and heads. With more of them memory bounds torch's attention alike, which then ends sooner (H200)."""


def decode_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention of a single query a row over all keys. No gradient.

    Args:
        query: `[B, H, 1, D]`, bf16, fp16 or fp32.
        key, value: `[B, H, Lk, D]` in the query's dtype.
        bias: added to the scores, `[B|1, H|1, 1, Lk]`, in the query's dtype; its least finite number hides a key.
        scale: factor on QK^T.

    Returns:
        `[B, H, 1, D]`, zeros where all keys are hidden. Softmax and sums are in fp32.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    batch, heads, length, width = query.shape
    if length != 1 or key.shape != value.shape or key.shape != (batch, heads, key.shape[2], width):
        raise ValueError(
            f"one query [B, H, 1, D] needs keys and values [B, H, Lk, D]: got {list(query.shape)}, "
            f"{list(key.shape)}, {list(value.shape)}"
        )
    if bias is not None:
        axes = zip(bias.shape, (batch, heads, 1, key.shape[2]), strict=True)
        if any(size not in (1, whole) for size, whole in axes) or bias.shape[3] != key.shape[2]:
            raise ValueError(f"the bias must be [B|1, H|1, 1, Lk] for keys {list(key.shape)}: got {list(bias.shape)}")
    tensors = (key, value) if bias is None else (key, value, bias)
    if any(x.dtype != query.dtype for x in tensors):
        raise ValueError(f"all must have the query's dtype {query.dtype}: got {[x.dtype for x in tensors]}")
    if decode_attention_serves(query, key, bias):
        return decode_attention_forward(query, key, value, bias, scale).transpose(1, 2)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    if bias is None:
        return output
    hidden = (bias == torch.finfo(bias.dtype).min).all(dim=-1, keepdim=True)
    return torch.where(hidden, 0.0, output)


def decode_attention_serves(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the kernel takes such queries now and is worth its launch: a single one a row, few keys, no gradients,
    in a graph.

    Launched one by one, torch's attention is sooner launched. It also knows one row of keys for all queries, and other
    dtypes of keys and bias.
    """
    if torch.is_grad_enabled() or query.shape[2] != 1 or query.dtype not in DTYPES or query.shape[3] > MAX_HEAD_DIM:
        return False
    if not kernels_serve(query.device):  # asked first: an export elsewhere knows no sizes
        return False
    if key.dtype != query.dtype or (bias is not None and bias.dtype != query.dtype):
        return False
    if key.shape[:2] != query.shape[:2] or key.shape[:3].numel() > MAX_KEYS:
        return False
    return not is_launch_bound(query) and not is_transformed()


@operator("fat5::decode_attention")
def decode_attention_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Output `[B, 1, H, D]`; see `decode_attention`."""
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    if bias is not None and bias.stride(3) != 1:
        bias = bias.contiguous()
    return launch(query, key, value, bias, scale, launches_early(query, query.shape[0]))


@decode_attention_forward.register_fake
def _shape(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    batch, heads, _, width = query.shape
    return query.new_empty((batch, 1, heads, width))
