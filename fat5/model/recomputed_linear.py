"""Linear layers whose input, the output of a norm or an activation, is computed again in backward instead of kept.

Backward of the norm and of the activation reads all that it takes to make that output, so that writing it once more is
part of a pass that runs anyway. Kept from forward it would be a quarter to a third of all that a layer keeps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .ops_gated_act import ACTIVATIONS, gated_act_backward, gated_act_forward
from .ops_philox import draw_seed
from .ops_rms_norm import gradients_of_norm, rms_norm_forward


def norm_linear(
    hidden_states: torch.Tensor,
    branch: torch.Tensor | None,
    norm_weight: torch.Tensor,
    eps: float,
    dropout_p: float,
    weights: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` by the kernels, and linear layers of the normalised rows side by side.

    Args:
        hidden_states, branch, eps, dropout_p: as `add_rms_norm` takes them.
        norm_weight: of the norm, `[D]`.
        weights: of the linear layers, `[N1, D]`, `[N2, D]`, ..., in one dtype, which is that of the normalised rows.

    Returns:
        Outputs of the layers `[..., N1 + N2 + ...]` and the sum that was normalised, `[..., D]`.
    """
    dropout_p = 0.0 if branch is None else dropout_p
    seed = draw_seed(dropout_p, hidden_states.device)
    output, total = NormLinear.apply(hidden_states, branch, norm_weight, seed, eps, dropout_p, *weights)
    return output, hidden_states if branch is None else total


def gated_act_linear(
    x: torch.Tensor, up: torch.Tensor | None, act: str, gated: bool, dropout_p: float, weight: torch.Tensor
) -> torch.Tensor:
    """`gated_act` by the kernels, and a linear layer of its output.

    Args:
        x, up, act, gated, dropout_p: as `gated_act` takes them.
        weight: `[D, F]`, in the dtype of `x`.

    Returns:
        `[..., D]`.
    """
    return GatedActLinear.apply(x, up, draw_seed(dropout_p, x.device), ACTIVATIONS[act], gated, dropout_p, weight)


def side_by_side(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The weight of one layer in place of several with a common input."""
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))


class NormLinear(torch.autograd.Function):
    """See `norm_linear`. The sum is empty without a branch."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        branch: torch.Tensor | None,
        norm_weight: torch.Tensor,
        seed: torch.Tensor | None,
        eps: float,
        dropout_p: float,
        *weights: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps the sum, not the normalised rows, and the weights as they are, not side by side."""
        dtype = weights[0].dtype
        normed, total, rstd = rms_norm_forward.function(hidden, branch, norm_weight, seed, eps, dropout_p, dtype)
        ctx.dropout_p, ctx.dtypes = dropout_p, (hidden.dtype, None if branch is None else branch.dtype)
        ctx.save_for_backward(hidden if branch is None else total, norm_weight, rstd, seed, *weights)
        ctx.set_materialize_grads(False)
        return F.linear(normed, side_by_side(weights)), total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, doutput: torch.Tensor | None, dtotal: torch.Tensor | None) -> tuple[Any, ...]:
        """The normalised rows are written again by the norm's backward, and used for the weights' gradients."""
        total, norm_weight, rstd, seed, *weights = ctx.saved_tensors
        wanted = doutput is not None and any(ctx.needs_input_grad[6:])
        doutput_2d = None if doutput is None else doutput.reshape(-1, doutput.shape[-1])
        dnormed = None if doutput_2d is None else (doutput_2d @ side_by_side(weights)).view(total.shape)
        *gradients, normed = gradients_of_norm(
            dnormed, dtotal, total, norm_weight, rstd, seed, ctx.dropout_p, ctx.dtypes,
            weights[0].dtype if wanted else None,
        )  # fmt: skip
        dweights: Sequence[torch.Tensor | None] = [None] * len(weights)
        if doutput_2d is not None and wanted:
            dweight = doutput_2d.T @ normed.view(-1, normed.shape[-1])
            dweights = dweight.split([weight.shape[0] for weight in weights])
        return *gradients, None, None, None, *dweights


class GatedActLinear(torch.autograd.Function):
    """See `gated_act_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        up: torch.Tensor | None,
        seed: torch.Tensor | None,
        act: int,
        gated: bool,
        dropout_p: float,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        """Keeps the inputs."""
        ctx.save_for_backward(x, up, seed, weight)
        ctx.options = act, gated, dropout_p
        return F.linear(gated_act_forward.function(x, up, seed, act, gated, dropout_p), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, doutput: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The activation's output is written again by its backward, and used for the weight's gradient."""
        x, up, seed, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[6]
        doutput_2d = doutput.reshape(-1, doutput.shape[-1])
        dinner = (doutput_2d @ weight).view(*x.shape[:-1], weight.shape[1])
        dx, dup, inner = gated_act_backward.function(dinner, x, up, seed, *ctx.options, wanted)
        dweight = doutput_2d.T @ inner.view(-1, inner.shape[-1]) if wanted else None
        return dx, None if up is None else dup, None, None, None, None, dweight
