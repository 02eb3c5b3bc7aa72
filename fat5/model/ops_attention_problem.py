"""What one call of the attention kernels is asked to do, beside its tensors."""

from dataclasses import dataclass


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
