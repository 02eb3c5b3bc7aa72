"""FIRE: a learned function of the distance between two positions, as a fraction of how far the query has come."""

import torch
from torch import nn


class FirePositionBias(nn.Module):
    """Bias `mlp(psi(i - j) / psi(max(i, L)))`, psi(x) = sign(x) log(|c x| + 1), of query i and key j.

    Li et al. 2024 (arXiv:2310.04418), equation 3. As in the published FAT5 the distance has a sign, so that the bias
    tells keys before the query from keys after it, and L is a multiplier, learned, of a fixed length.

    Args:
        num_heads: H.
        mlp_width: width of the hidden layer.
        length: the fixed length, and c is 0.1 at first.
    """

    eps = 1e-6

    def __init__(self, num_heads: int, mlp_width: int, length: int) -> None:
        super().__init__()
        self.length = float(length)
        first, last = nn.Linear(1, mlp_width), nn.Linear(mlp_width, num_heads)
        self.mlp = nn.Sequential(first, nn.ReLU(), last)
        for layer, inputs in ((first, 1), (last, mlp_width)):
            layer.init_std = (3 * inputs) ** -0.5
        self.c = nn.Parameter(torch.empty(()))
        self.init_L = nn.Parameter(torch.empty(()), requires_grad=False)
        self.L_multiplier = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set what is not the MLP's."""
        for parameter, value in ((self.c, 0.1), (self.init_L, self.length), (self.L_multiplier, 1.0)):
            nn.init.constant_(parameter, value)

    def forward(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """Dense bias `[B, H, Lq, Lk]` in the parameters' dtype.

        Args:
            query_positions: int64 `[B, Lq]`, counted from where each query's sequence begins.
            key_positions: int64 `[B, Lk]`, likewise.
        """
        c, length = self.c.float(), (self.L_multiplier.float() * self.init_L.float()).abs()
        distances = (query_positions[:, :, None] - key_positions[:, None, :]).float()  # [B, Lq, Lk]
        reach = torch.maximum(query_positions.float(), length)[:, :, None]  # [B, Lq, 1]
        distances = distances.sign() * ((c * distances).abs() + 1).log()
        fractions = distances / (((c * reach).abs() + 1).log() + self.eps)
        return self.mlp(fractions.unsqueeze(-1).to(self.c.dtype)).permute(0, 3, 1, 2)
