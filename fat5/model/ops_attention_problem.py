"""What one call of the attention kernels is asked to do, beside its tensors."""

from dataclasses import dataclass

import torch

MOST_SEGMENTS = 65535
"""Of the third dimension of a CUDA grid."""


@dataclass(frozen=True)
class Problem:
    """The numbers of one call.

    Attributes:
        causal: key j is visible to query i only if `j <= i + q_offset`.
        scale: factor on QK^T.
        q_offset: position of query 0 relative to key 0: the number of cached tokens when decoding.
        dropout_p: probability of dropping an attention weight.
        max_seqlen_q, max_seqlen_k: longest segment, or the padded lengths.
    """

    causal: bool
    scale: float
    q_offset: int
    dropout_p: float
    max_seqlen_q: int
    max_seqlen_k: int


def addressable(x: torch.Tensor) -> torch.Tensor:
    """`[B, L, H, D]` as it is, or copied where columns do not follow each other, or heads lie too far apart.

    The kernels multiply heads by their stride in 32 bits.
    """
    return x if x.stride(-1) == 1 and (x.shape[2] - 1) * x.stride(2) < 2**31 else x.contiguous()


def check_segments(segments: int) -> None:
    """Refuse more rows or segments than a grid takes."""
    if segments > MOST_SEGMENTS:
        raise ValueError(f"attention takes at most {MOST_SEGMENTS} rows or segments in one call, got {segments}: split")
