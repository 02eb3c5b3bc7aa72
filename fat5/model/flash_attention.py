"""Attention by the flash-attn package: `attn_implementation="flash_attention_2"`, for what has no bias, and ALiBi."""

from typing import Any

import torch

from .attention_layout import KernelLayout
from .configuration_flash_t5 import FlashT5Config
from .ops_attention_bias import AlibiBias, DenseBias, T5Bias

try:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    HAS_FLASH_ATTENTION = True
except ImportError:
    HAS_FLASH_ATTENTION = False

FLASH_ATTENTION = "flash_attention_2"
DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


def flash_serves(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether flash-attn takes such tensors; sdpa takes the others."""
    return HAS_FLASH_ATTENTION and device.type == "cuda" and dtype in DTYPES and head_dim <= MAX_HEAD_DIM


def why_not_flash(config: FlashT5Config) -> str | None:
    """What of a model flash-attn cannot compute, in words; None if it can."""
    kind = config.position_encoding_type
    if kind in ("t5", "FIRE"):
        return f"cannot add {'T5' if kind == 't5' else kind}'s position bias"
    if config.has_dense_bias:
        return "knows no asymmetric ALiBi"
    if kind == "ALiBi" and config.use_randomized_position_encoding:
        return "knows no ALiBi of random positions"
    return None if HAS_FLASH_ATTENTION else "needs the flash-attn package: pip install 'fat5[flash]'"


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: T5Bias | AlibiBias | DenseBias | None,
    layout: KernelLayout,
    causal: bool,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """Attention by flash-attn 2 (Dao 2023, arXiv:2307.08691), in memory linear in length.

    Args:
        query, key, value: `[B, H, Lq, Dk]`, `[B, H, Lk, Dk]`, `[B, H, Lk, Dk]`, bf16 or fp16; in a packed stack
            `[1, H, T, Dk]`.
        bias: ALiBi's slopes, or none.
        layout: without padding, or packed. The last query of a padded layout stands where the last key does.
        causal: no query sees a later key.
        scale: factor on QK^T.
        dropout: probability of dropping an attention weight; 0 outside training.

    Returns:
        Output of the queries' shape, zeros for queries that may attend to nothing.

    Raises:
        ValueError: if the bias is of another kind.
    """
    if isinstance(bias, (T5Bias, DenseBias)):
        raise ValueError(f"flash-attn cannot add a {type(bias).__name__}.")
    options: dict[str, Any] = {"dropout_p": dropout, "softmax_scale": scale, "causal": causal}
    options["alibi_slopes"] = None if bias is None else bias.slopes
    if layout.queries is None or layout.keys is None:
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        return flash_attn_func(query, key, value, **options).transpose(1, 2)
    query, key, value = layout.pack(query, key, value)
    output = flash_attn_varlen_func(
        query,
        key,
        value,
        layout.queries.cu_seqlens.to(query.device),
        layout.keys.cu_seqlens.to(query.device),
        layout.queries.longest,
        layout.keys.longest,
        **options,
    )
    return layout.unpack(output)
