"""Attention by the fused kernels: `attn_implementation="fat5"`."""

from typing import Any, NoReturn

import torch
from transformers import AttentionInterface

from .attention_mask import AttentionMask
from .ops_attention import attention
from .ops_attention_bias import AlibiBias, DenseBias, T5Bias


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: T5Bias | AlibiBias | DenseBias | None,
    mask: AttentionMask,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """Attention by the kernels, in memory linear in length.

    Args:
        query, key, value: `[B, H, Lq, Dk]`, `[B, H, Lk, Dk]`, `[B, H, Lk, Dk]`, one of bf16, fp16, fp32; in a packed
            stack `[1, H, Tq, Dk]`, `[1, H, Tk, Dk]`, `[1, H, Tk, Dk]`.
        bias: position bias; a dense one only with a mask prepared for that.
        mask: prepared for "fat5", with a layout.
        scale: factor on QK^T.
        dropout: probability of dropping an attention weight; 0 outside training.

    Returns:
        Output of the queries' shape, zeros for queries that may attend to nothing.

    Raises:
        ValueError: if the mask has no layout, which means that the kernels cannot take it.
    """
    layout, offset = mask.layout, mask.query_offset
    if layout is None or isinstance(offset, torch.Tensor):
        raise ValueError("This mask is not prepared for the kernels: use the sdpa implementation with it.")
    options: dict[str, Any] = {"bias": bias, "causal": mask.causal, "scale": scale, "dropout_p": dropout}
    if layout.queries is None or layout.keys is None:
        lengths = None if layout.key_lengths is None else layout.key_lengths.to(query.device)
        return attention(query, key, value, key_lengths=lengths, q_offset=offset, **options)
    query, key, value = layout.pack(query, key, value)
    packed = attention(
        query,
        key,
        value,
        cu_seqlens_q=layout.queries.cu_seqlens.to(query.device),
        cu_seqlens_k=layout.keys.cu_seqlens.to(query.device),
        max_seqlen_q=layout.queries.longest,
        max_seqlen_k=layout.keys.longest,
        **options,
    )
    return layout.unpack(packed)


def refuse_other_models(module: torch.nn.Module, *_: Any, **__: Any) -> NoReturn:
    """What "fat5" means to a model that builds its own biases and masks.

    FlashT5 never calls it: it stands in the registry of transformers so that the name is known there.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f'{type(module).__name__} cannot run on attn_implementation="fat5" as it is. For a T5, mT5 or umT5 call '
        "`fat5.enable(model)`, which exchanges its attention; other models keep 'sdpa'."
    )


AttentionInterface.register("fat5", refuse_other_models)
