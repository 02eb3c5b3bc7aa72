"""The first half of the gated feed-forward in one kernel, where no gradient is recorded.

What is activated and its factor never leave the accumulators, and so are not rounded. In a model in 16 bits with an
fp32 residual stream their rounding would be the largest error left, and they would be the largest tensors.
"""

import torch
from torch.nn import functional as F

from .ops_attention import kernels_serve
from .ops_device import compute_capability
from .ops_gated_act import ACTIVATIONS, reference_gated_act
from .ops_operator import is_transformed, operator

try:
    import triton  # noqa: F401  (named here so that the loader of remote code sees a guarded import)

    from .ops_early_launch import launches_early
    from .ops_gated_linear_kernels import gated_linear_config, launch
except ImportError:
    pass


def gated_linear(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:
    """`act(x gate^T) * (x up^T)`, both factors in fp32 until their product is rounded. No gradient.

    Args:
        x: `[..., D]`, bf16 or fp16.
        gate, up: weights `[F, D]` in the dtype of `x`.
        act: one of `ACTIVATIONS`.

    Returns:
        `[..., F]` in the dtype of `x`.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or an unknown activation.

    Source: Shazeer 2020 (arXiv:2002.05202).
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}: got {act!r}")
    if gate.shape != up.shape or gate.ndim != 2 or x.shape[-1] != gate.shape[1]:
        raise ValueError(
            f"x [..., D] {list(x.shape)} needs weights [F, D]: got {list(gate.shape)} and {list(up.shape)}"
        )
    if not x.dtype == gate.dtype == up.dtype:
        raise ValueError(f"x and both weights must have one dtype: got {x.dtype}, {gate.dtype}, {up.dtype}")
    if gated_linear_serves(x):
        return gated_linear_forward(x, gate, up, ACTIVATIONS[act])
    return reference_gated_act(F.linear(x, gate), F.linear(x, up), ACTIVATIONS[act], True, 0.0, None)


def gated_linear_serves(x: torch.Tensor) -> bool:
    """Whether the kernel takes such states now: in 16 bits, and nothing records a gradient."""
    if torch.is_grad_enabled() or is_transformed():
        return False
    return x.dtype in (torch.bfloat16, torch.float16) and kernels_serve(x.device)


@operator("fat5::gated_linear")
def gated_linear_forward(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, act: int) -> torch.Tensor:
    """See `gated_linear`."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    config = gated_linear_config(rows.shape[0], compute_capability(x))
    early = launches_early(x, rows.shape[0])
    return launch(rows, gate.contiguous(), up.contiguous(), act, config, early).view(*x.shape[:-1], gate.shape[0])


@gated_linear_forward.register_fake
def _shape(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, act: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], gate.shape[0]))
