"""RMSNorm of the residual stream, and its output while it waits for the layers that use it."""

from collections.abc import Sequence

import torch
from torch import nn

from .ops_operator import is_watched
from .ops_rms_norm import add_rms_norm, norm_kernels_serve
from .recomputed_linear import norm_linear


class FlashT5LayerNorm(nn.Module):
    """RMSNorm: scale only, no mean and no bias, statistics in fp32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(
        self,
        hidden_states: torch.Tensor,
        branch: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The normalised sum `hidden_states + dropout(branch)` of `[..., D]`, and the sum.

        Args:
            hidden_states: the residual stream.
            branch: what the sub-layer before adds to it; None for nothing.
            dropout_p: probability of dropping an element of the branch.
            dtype: of the normalised states; None for the weight's.
        """
        return add_rms_norm(hidden_states, branch, self.weight, self.eps, dropout_p=dropout_p, out_dtype=dtype)


class NormedSum:
    """What a norm will make of a residual sum, so that the linear layers on it need not keep it for backward.

    Args:
        norm: of the sub-layer, or what stands in its place.
        hidden_states, branch, dropout_p, dtype: as the norm takes them.
    """

    def __init__(
        self,
        norm: FlashT5LayerNorm,
        hidden_states: torch.Tensor,
        branch: torch.Tensor | None,
        dropout_p: float,
        dtype: torch.dtype | None,
    ) -> None:
        self.norm = norm
        self.hidden_states, self.branch, self.dropout_p, self.dtype = hidden_states, branch, dropout_p, dtype
        self._states: torch.Tensor | None = None
        self._total: torch.Tensor | None = None

    def states(self) -> torch.Tensor:
        """The normalised states `[..., D]`, computed on the first call."""
        if self._states is None:
            assert self._total is None, "a sum that went into `linear` would be dropped from twice"
            self._states, self._total = self.norm(self.hidden_states, self.branch, self.dropout_p, self.dtype)
        return self._states

    def total(self) -> torch.Tensor:
        """The residual stream `[..., D]`, branch included."""
        if self._total is None:
            self.states()
        assert self._total is not None
        return self._total

    def may_wait(self, dtype: torch.dtype) -> bool:
        """Whether `linear` may be called with weights of a dtype, instead of `states`: once, by the only user."""
        if self._total is not None or not torch.is_grad_enabled() or is_watched():
            return False
        weight = self.norm.weight
        return dtype == (self.dtype or weight.dtype) and norm_kernels_serve(
            self.hidden_states, self.branch, weight, dtype
        )

    def linear(self, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """Linear layers of the states side by side, `[..., N1 + N2 + ...]`."""
        output, self._total = norm_linear(
            self.hidden_states, self.branch, self.norm.weight, self.norm.eps, self.dropout_p, weights
        )
        return output
