"""ALiBi: a bias that falls linearly with distance, at a fixed slope for each head, looking both ways or one way."""

import math

import torch
from torch import nn

from .constant_tensors import kept


def slope_values(num_heads: int) -> list[float]:
    """Slopes of the heads: powers of `2**(-8 / num_heads)`.

    Where `num_heads` is no power of two, those of the power of two below it, then every other one of the power above.
    Source: Press et al. 2022 (arXiv:2108.12409), section 3, and footnote on other numbers of heads in their
    implementation (https://github.com/ofirpress/attention_with_linear_biases, MIT).
    """
    power = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    between = [2.0 ** (-4.0 * (head + 1) / power) for head in range(2 * power)]
    return slopes + between[::2][: num_heads - power]


@kept
def alibi_slopes(num_heads: int, device: torch.device) -> torch.Tensor:
    """Slopes fp32 `[H]` on a device, copied there once: a CUDA graph could not."""
    return torch.tensor(slope_values(num_heads), dtype=torch.float32, device=device)


class AlibiPositionBias(nn.Module):
    """ALiBi without parameters.

    Args:
        num_heads: H.
        symmetric: every head looks both ways (in a decoder, back). Otherwise the first half of the heads looks back
            only and the second half ahead only, with the slopes of H / 2 heads each, as in the published FAT5.
    """

    def __init__(self, num_heads: int, symmetric: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.symmetric = symmetric

    def forward(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """Dense bias fp32 `[1, H, Lq, Lk]` for int64 positions `[Lq]` and `[Lk]`; `-inf` where a head does not look."""
        distances = key_positions[None, :] - query_positions[:, None]  # [Lq, Lk]
        heads = self.num_heads if self.symmetric else self.num_heads // 2
        bias = -alibi_slopes(heads, distances.device)[:, None, None] * distances.abs()  # [heads, Lq, Lk]
        if not self.symmetric:
            back = bias.masked_fill(distances > 0, -torch.inf)
            ahead = bias.masked_fill(distances < 0, -torch.inf)
            bias = torch.cat([back, ahead])
        return bias[None]

    def slopes(self, device: torch.device) -> torch.Tensor:
        """Slopes fp32 `[H]` of symmetric heads. A view, as reentrant checkpointing marks what a layer returns."""
        return alibi_slopes(self.num_heads, device).detach()
