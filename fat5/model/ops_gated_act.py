"""Activation, gate and dropout of the feed-forward layer in one pass, recomputed in backward."""

import math
from typing import Any

import torch
from torch.nn import functional as F

from .ops_attention import kernels_serve
from .ops_attention_checks import DTYPES
from .ops_operator import is_launch_bound, is_transformed, may_work_in_place, operator
from .ops_philox import draw_seed, elementwise_dropout

try:
    import triton  # noqa: F401  (named here so that the loader of remote code sees a guarded import)

    from .ops_gated_act_kernels import launch_backward, launch_forward
except ImportError:
    pass

ACTIVATIONS = {"gelu_new": 0, "gelu_pytorch_tanh": 0, "gelu": 1, "relu": 2, "silu": 3, "swish": 3}
"""Activations of the kernels, by their names in `transformers.activations.ACT2FN`."""


def gated_act(
    x: torch.Tensor,
    act: str,
    *,
    up: torch.Tensor | None = None,
    gated: bool = True,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """`dropout(act(x) * up)`, with nothing kept for backward but the inputs.

    Args:
        x: `[..., F]`, one of bf16, fp16, fp32 for the kernels; with `gated` and no `up`, `[..., 2 F]`: the argument
            of the activation and then the factor `up`, as one matrix product gives them.
        act: one of `ACTIVATIONS`.
        up: `[..., F]`.
        gated: there is a factor `up`, here or in the second half of `x`.
        dropout_p: probability of dropping an element of the product.
        seed: of the dropout, int64 `[1]`; drawn from torch's generator when left out.

    Returns:
        `[..., F]` in the dtype of `x`.

    Raises:
        ValueError: an unknown activation, shapes that do not fit together, or a probability outside [0, 1).

    Sources: Shazeer 2020 (arXiv:2002.05202); Hendrycks & Gimpel 2016 (arXiv:1606.08415) for GELU and its tanh form.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}: got {act!r}")
    if gated and up is None and x.shape[-1] % 2:
        raise ValueError(
            f"x holds the activation's argument and the factor `up`, so its width is even: got {x.shape[-1]}"
        )
    if up is not None and (up.shape != x.shape or up.dtype != x.dtype or not gated):
        raise ValueError(f"up {list(up.shape)} ({up.dtype}) must be like x {list(x.shape)} ({x.dtype}), and gated")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1: got {dropout_p}")
    if seed is None:
        seed = draw_seed(dropout_p, x.device)
    if dropout_p == 0 and is_launch_bound(x):
        return _gated_act_of_few(x, up, ACTIVATIONS[act], gated)
    if x.dtype in DTYPES and kernels_serve(x.device) and not is_transformed():
        return gated_act_forward(x, up, seed, ACTIVATIONS[act], gated, dropout_p)
    return reference_gated_act(x, up, ACTIVATIONS[act], gated, dropout_p, seed)


def reference_gated_act(
    x: torch.Tensor, up: torch.Tensor | None, act: int, gated: bool, dropout_p: float, seed: torch.Tensor | None
) -> torch.Tensor:
    """The same in plain torch. Differentiable by autograd."""
    if gated and up is None:
        x, up = x.chunk(2, dim=-1)
    y = _activate(x, act)
    if up is not None:
        y = y.mul_(up) if may_work_in_place(y) else y * up
    return elementwise_dropout(y, dropout_p, seed) if seed is not None and dropout_p > 0 else y


def _gated_act_of_few(x: torch.Tensor, up: torch.Tensor | None, act: int, gated: bool) -> torch.Tensor:
    """The same in one or two launches of torch's own. Without gradients."""
    if gated and up is None:
        x, up = x.chunk(2, dim=-1)
    y = F.gelu(x, approximate="tanh") if act == 0 else _activate(x, act)
    return y if up is None else y * up


def _activate(x: torch.Tensor, act: int) -> torch.Tensor:
    if act == 0:  # step by step as `gelu_new` of transformers, so that T5 rounds as stock T5 does
        if not may_work_in_place(x):
            return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))
        inner = torch.pow(x, 3.0).mul_(0.044715).add_(x)
        return (0.5 * x).mul_(inner.mul_(math.sqrt(2.0 / math.pi)).tanh_().add_(1.0))
    if act == 1:
        return F.gelu(x)
    return F.relu(x) if act == 2 else F.silu(x)


def _halves(x: torch.Tensor, up: torch.Tensor | None, gated: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Argument of the activation and up as `[rows, F]`, with consecutive columns."""
    x = x.reshape(-1, x.shape[-1])
    if up is not None:
        up = up.reshape(-1, up.shape[-1])
    elif gated:
        x, up = x.chunk(2, dim=-1)
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, up if up is None or up.stride(-1) == 1 else up.contiguous()


@operator("fat5::gated_act_forward")
def gated_act_forward(
    x: torch.Tensor, up: torch.Tensor | None, seed: torch.Tensor | None, act: int, gated: bool, dropout_p: float
) -> torch.Tensor:
    """`dropout(act(x) * up)`, contiguous; the factor `up` may be the second half of x."""
    first, second = _halves(x, up, gated)
    return launch_forward(first, second, act, dropout_p, seed).view(*x.shape[:-1], first.shape[-1])


@gated_act_forward.register_fake
def _forward_shape(
    x: torch.Tensor, up: torch.Tensor | None, seed: Any, act: int, gated: bool, dropout_p: float
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // (2 if gated and up is None else 1)))


@operator("fat5::gated_act_backward")
def gated_act_backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    up: torch.Tensor | None,
    seed: torch.Tensor | None,
    act: int,
    gated: bool,
    dropout_p: float,
    recompute: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x and of the factor `up` (empty if it is part of x), and the output once more (or nothing)."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dup = torch.empty(0 if up is None else x.shape, dtype=x.dtype, device=x.device)
    first, second = _halves(x, up, gated)
    dfirst, dsecond = _halves(dx, None if up is None else dup, gated)
    dout = dout.reshape(-1, dout.shape[-1])
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    out = torch.empty(first.shape if recompute else 0, dtype=x.dtype, device=x.device)
    launch_backward(dout, first, second, dfirst, dsecond, act, dropout_p, seed, out if recompute else None)
    return dx, dup, out.view(*x.shape[:-1], first.shape[-1]) if recompute else out


@gated_act_backward.register_fake
def _backward_shapes(
    dout: torch.Tensor,
    x: torch.Tensor,
    up: torch.Tensor | None,
    seed: Any,
    act: int,
    gated: bool,
    dropout_p: float,
    recompute: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if up is None else x.shape), x.new_empty(dout.shape if recompute else 0)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, up, seed = ctx.saved_tensors
    dx, dup, _ = gated_act_backward(dout, x, up, seed, *ctx.options)
    return dx, None if up is None else dup, None, None, None, None


gated_act_forward.register_autograd(_backward, setup_context=_save_for_backward)
