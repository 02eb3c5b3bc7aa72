"""RMSNorm of a residual sum, in one pass: the public function, its reference and its operator."""

from typing import Any

import torch
from torch.nn import functional as F

from .ops_attention import kernels_serve
from .ops_attention_checks import DTYPES
from .ops_operator import is_launch_bound, is_transformed, may_work_in_place, operator
from .ops_philox import draw_seed, elementwise_dropout

try:
    import triton  # noqa: F401  (named here so that the loader of remote code sees a guarded import)

    from .ops_early_launch import launches_early
    from .ops_rms_norm_kernels import MAX_WIDTH, launch_backward, launch_forward
except ImportError:
    MAX_WIDTH = 0


def add_rms_norm(
    hidden_states: torch.Tensor,
    branch: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    *,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`total = hidden_states + dropout(branch)`, and `total / rms(total) * weight`.

    Statistics are fp32, sums over a row are fp32. A total in fp16 is kept within fp16's range.

    Args:
        hidden_states: the residual stream, `[..., D]`, any strides.
        branch: what a sub-layer adds to it, `[..., D]`; None for the norm alone.
        weight: `[D]`.
        eps: added to the mean square.
        dropout_p: probability of dropping an element of `branch`.
        seed: of the dropout, int64 `[1]`; drawn from torch's generator when left out. What is dropped depends on it,
            row and column alone.
        out_dtype: of the normalised rows; None for the weight's.

    Returns:
        The normalised rows `[..., D]`, and the total `[..., D]` in the wider dtype of the two: the hidden states
        themselves where there is no branch.

    Raises:
        ValueError: shapes that do not fit together, or a probability outside [0, 1).

    Source: Zhang & Sennrich 2019 (arXiv:1910.07467).
    """
    out_dtype = weight.dtype if out_dtype is None else out_dtype
    if dropout_p == 0 and is_launch_bound(hidden_states):  # torch's operations look at shapes themselves
        return _add_rms_norm_of_few(hidden_states, branch, weight, eps, out_dtype)
    _check(hidden_states, branch, weight, dropout_p)
    if branch is None:
        dropout_p = 0.0
    if seed is None:
        seed = draw_seed(dropout_p, hidden_states.device)
    if not norm_kernels_serve(hidden_states, branch, weight, out_dtype):
        return reference_add_rms_norm(hidden_states, branch, weight, eps, dropout_p, seed, out_dtype)
    out, total, _ = rms_norm_forward(hidden_states, branch, weight, seed, eps, dropout_p, out_dtype)
    return out, hidden_states if branch is None else total


def norm_kernels_serve(
    hidden_states: torch.Tensor, branch: torch.Tensor | None, weight: torch.Tensor, out_dtype: torch.dtype
) -> bool:
    """Whether the kernels take such arguments of `add_rms_norm` now."""
    tensors = (hidden_states, weight) if branch is None else (hidden_states, branch, weight)
    served = weight.numel() <= MAX_WIDTH and out_dtype in DTYPES and all(x.dtype in DTYPES for x in tensors)
    return served and kernels_serve(hidden_states.device) and not is_transformed()


def reference_add_rms_norm(
    hidden_states: torch.Tensor,
    branch: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch, rounded where stock T5 rounds. Differentiable by autograd."""
    if branch is not None and dropout_p > 0 and seed is not None:
        branch = elementwise_dropout(branch, dropout_p, seed)
    hidden_states = _add(hidden_states, branch)
    normed = _normalise(hidden_states, eps)
    if out_dtype in (torch.float16, torch.bfloat16):
        normed = normed.to(out_dtype)
    weight = weight.to(normed.dtype)
    normed = normed.mul_(weight) if may_work_in_place(normed) else weight * normed
    return normed.to(out_dtype), hidden_states


def _add_rms_norm_of_few(
    hidden_states: torch.Tensor,
    branch: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in three launches of torch's own, rounded once, as the kernel does. Without gradients."""
    total = _add(hidden_states, branch)
    return torch.mul(_normalise(total, eps), weight, out=torch.empty_like(total, dtype=out_dtype)), total


def _add(hidden_states: torch.Tensor, branch: torch.Tensor | None) -> torch.Tensor:
    """The sum, within fp16's range if it is fp16."""
    if branch is None:
        return hidden_states
    hidden_states = hidden_states + branch
    if hidden_states.dtype == torch.float16:
        largest = torch.finfo(torch.float16).max
        hidden_states = hidden_states.clamp(min=-largest, max=largest)
    return hidden_states


def _normalise(hidden_states: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / rms(x)` in fp32 or wider."""
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    return F.rms_norm(hidden_states.to(wide), hidden_states.shape[-1:], eps=eps)


def _check(hidden: torch.Tensor, branch: torch.Tensor | None, weight: torch.Tensor, dropout_p: float) -> None:
    if hidden.dim() == 0 or weight.shape != hidden.shape[-1:] or hidden.shape[-1] == 0:
        raise ValueError(f"hidden states {list(hidden.shape)} need a weight [D] of their width: {list(weight.shape)}")
    if branch is not None and branch.shape != hidden.shape:
        raise ValueError(f"branch {list(branch.shape)} and hidden states {list(hidden.shape)} must agree in shape")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1: got {dropout_p}")


@operator("fat5::rms_norm_forward")
def rms_norm_forward(
    hidden: torch.Tensor,
    branch: torch.Tensor | None,
    weight: torch.Tensor,
    seed: torch.Tensor | None,
    eps: float,
    dropout_p: float,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised rows, their total (empty without a branch) and inverse root mean squares, fp32 `[rows]`."""
    branch = None if branch is None else branch.contiguous()
    early = launches_early(hidden, hidden.numel() // hidden.shape[-1])
    return launch_forward(hidden.contiguous(), branch, weight.contiguous(), eps, dropout_p, seed, out_dtype, early)


@rms_norm_forward.register_fake
def _forward_shapes(
    hidden: torch.Tensor,
    branch: torch.Tensor | None,
    weight: torch.Tensor,
    seed: torch.Tensor | None,
    eps: float,
    dropout_p: float,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total = hidden.new_empty(0)
    if branch is not None:
        total = hidden.new_empty(hidden.shape, dtype=torch.promote_types(hidden.dtype, branch.dtype))
    rows = hidden.numel() // hidden.shape[-1]
    return hidden.new_empty(hidden.shape, dtype=out_dtype), total, hidden.new_empty(rows, dtype=torch.float32)


@operator("fat5::rms_norm_backward")
def rms_norm_backward(
    dout: torch.Tensor,
    dtotal: torch.Tensor | None,
    total: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    hidden_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden states, branch (empty where it is the same) and weight; normalised rows of `out_dtype`."""
    dtotal = None if dtotal is None else dtotal.contiguous()
    return launch_backward(
        dout.contiguous(), dtotal, total.contiguous(), weight.contiguous(), rstd, dropout_p, seed, hidden_dtype,
        branch_dtype, out_dtype,
    )  # fmt: skip


@rms_norm_backward.register_fake
def _backward_shapes(
    dout: torch.Tensor,
    dtotal: torch.Tensor | None,
    total: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    hidden_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, ...]:
    dhidden = total.new_empty(total.shape, dtype=hidden_dtype)
    same = branch_dtype is None or (branch_dtype == hidden_dtype and dropout_p == 0)
    dbranch = total.new_empty(0 if same else total.shape, dtype=hidden_dtype if same else branch_dtype)
    out = total.new_empty(0 if out_dtype is None else total.shape, dtype=out_dtype or weight.dtype)
    return dhidden, dbranch, weight.new_empty(weight.shape), out


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, branch, weight, seed, _, ctx.dropout_p, _ = inputs
    _, total, rstd = output
    ctx.dtypes = hidden.dtype, None if branch is None else branch.dtype
    ctx.save_for_backward(hidden if branch is None else total, weight, rstd, seed)
    ctx.set_materialize_grads(False)  # of a total that nothing else uses there is no gradient to read


def _backward(
    ctx: Any, dout: torch.Tensor, dtotal: torch.Tensor | None, _drstd: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    total, weight, rstd, seed = ctx.saved_tensors
    *gradients, _ = gradients_of_norm(dout, dtotal, total, weight, rstd, seed, ctx.dropout_p, ctx.dtypes)
    return *gradients, None, None, None, None


def gradients_of_norm(
    dout: torch.Tensor | None,
    dtotal: torch.Tensor | None,
    total: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    dtypes: tuple[torch.dtype, torch.dtype | None],
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Gradients of hidden states, branch and weight, and, of `out_dtype`, the normalised rows once more (or nothing).

    Args:
        dout, dtotal: gradients of the normalised rows and of the sum; None for zeros.
        total: the sum, or the hidden states where there is no branch.
        weight, rstd, seed, dropout_p: of forward.
        dtypes: of the hidden states and of the branch, None without one.
        out_dtype: None to leave the normalised rows out.
    """
    hidden_dtype, branch_dtype = dtypes
    if dout is None:
        dout = torch.zeros_like(total)
    if branch_dtype is None:
        dtotal = None
    dhidden, dbranch, dweight, out = rms_norm_backward(
        dout, dtotal, total, weight, rstd, seed, dropout_p, hidden_dtype, branch_dtype, out_dtype
    )
    if branch_dtype is None:
        return dhidden, None, dweight, out
    return dhidden, dhidden if dbranch.numel() == 0 else dbranch, dweight, out


rms_norm_forward.register_autograd(_backward, setup_context=_save_for_backward)
