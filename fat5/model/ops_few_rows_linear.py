"""Linear layers on the few rows of a step of decoding, those with a common input in one kernel, without gradients.

A GPU reads the weights of such a layer sooner than a large product's kernel has begun and ended.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from .ops_attention import kernels_serve
from .ops_device import compute_capability
from .ops_operator import is_launch_bound, is_transformed, operator

try:
    import triton  # noqa: F401  (named here so that the loader of remote code sees a guarded import)

    from .ops_early_launch import launches_early
    from .ops_few_rows_linear_kernels import few_rows_config, launch
except ImportError:
    pass

MAX_ROWS = 64
MAX_WEIGHTS = 3


def few_rows_linear(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Linear layers of one width on the same rows, side by side. No gradient.

    Args:
        x: `[..., D]`, bf16 or fp16, for the kernel `MAX_ROWS` rows at most.
        weights: one to three, `[F, D]`, in the dtype of `x`.

    Returns:
        `[..., F times the number of weights]` in the dtype of `x`, sums in fp32.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or another number of weights.
    """
    if not 1 <= len(weights) <= MAX_WEIGHTS:
        raise ValueError(f"one to {MAX_WEIGHTS} weights can be joined: got {len(weights)}")
    shapes = [list(weight.shape) for weight in weights]
    if any(shape != shapes[0] or len(shape) != 2 or shape[1] != x.shape[-1] for shape in shapes):
        raise ValueError(f"x [..., D] {list(x.shape)} needs weights [F, D] of one shape: got {shapes}")
    dtypes = [weight.dtype for weight in weights]
    if any(dtype != x.dtype for dtype in dtypes):
        raise ValueError(f"x and the weights must have one dtype: got {x.dtype} and {dtypes}")
    if few_rows_linear_serves(x):
        return few_rows_linear_forward(x, *weights, *[None] * (MAX_WEIGHTS - len(weights)))
    return torch.cat([F.linear(x, weight) for weight in weights], -1)


def few_rows_linear_serves(x: torch.Tensor) -> bool:
    """Whether the kernel takes such states now and is worth its launch: without gradients, in a graph.

    Launched one by one, torch's products are sooner launched.
    """
    if torch.is_grad_enabled() or x.dtype not in (torch.bfloat16, torch.float16) or not kernels_serve(x.device):
        return False
    return x.shape[:-1].numel() <= MAX_ROWS and not is_launch_bound(x) and not is_transformed()


@operator("fat5::few_rows_linear")
def few_rows_linear_forward(
    x: torch.Tensor, first: torch.Tensor, second: torch.Tensor | None, third: torch.Tensor | None
) -> torch.Tensor:
    """See `few_rows_linear`."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    weights = [weight.contiguous() for weight in (first, second, third) if weight is not None]
    config = few_rows_config(rows.shape[0], rows.shape[1], compute_capability(x))
    out = launch(rows, weights, config, launches_early(x, rows.shape[0]))
    return out.view(*x.shape[:-1], out.shape[-1])


@few_rows_linear_forward.register_fake
def _shape(
    x: torch.Tensor, first: torch.Tensor, second: torch.Tensor | None, third: torch.Tensor | None
) -> torch.Tensor:
    weights = [weight for weight in (first, second, third) if weight is not None]
    return x.new_empty((*x.shape[:-1], len(weights) * first.shape[0]))
