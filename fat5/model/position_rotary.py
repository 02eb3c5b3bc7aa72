"""Rotary positions (RoPE): queries and keys turn by angles that grow with their position; xPos scales them as well."""

from dataclasses import dataclass

import torch


@dataclass(eq=False)
class RotaryTables:
    """What turns the queries and keys of a stack. Values are not turned.

    Attributes:
        cos, sin: fp32 `[B|1, 1, L, R / 2]`, for the first R of a head's dimensions.
        scale: xPos' factor on queries, by which keys are divided, shaped likewise; None without.
        interleaved: pairs are neighbours (0, 1), (2, 3), ..., as in the paper; otherwise halves (0, R / 2), ...
    """

    cos: torch.Tensor
    sin: torch.Tensor
    scale: torch.Tensor | None
    interleaved: bool

    def rotate_query(self, states: torch.Tensor) -> torch.Tensor:
        """`[B, H, L, Dk]`, turned in fp32 and returned in its own dtype."""
        return self._rotate(states, self.scale)

    def rotate_key(self, states: torch.Tensor) -> torch.Tensor:
        """`[B, H, L, Dk]`, turned in fp32 and returned in its own dtype."""
        return self._rotate(states, None if self.scale is None else 1 / self.scale)

    def _rotate(self, states: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        size = 2 * self.cos.shape[-1]
        turned, rest = states[..., :size].float(), states[..., size:]
        cos, sin = self.cos.to(states.device), self.sin.to(states.device)
        if self.interleaved:
            first, second = turned[..., ::2], turned[..., 1::2]
        else:
            first, second = turned.chunk(2, dim=-1)
        pair = [first * cos - second * sin, second * cos + first * sin]
        if scale is not None:
            pair = [x * scale.to(states.device) for x in pair]
        turned = torch.stack(pair, dim=-1).flatten(-2) if self.interleaved else torch.cat(pair, dim=-1)
        return torch.cat([turned.to(states.dtype), rest], dim=-1)


def rotary_tables(
    positions: torch.Tensor,
    size: int,
    base: float,
    interleaved: bool,
    scale_base: float | None,
    center: int,
) -> RotaryTables:
    """Tables for positions int64 `[B|1, L]`.

    Sources: Su et al. 2021 (arXiv:2104.09864), equation 34; xPos: Sun et al. 2022 (arXiv:2212.10554), section 2.3.

    Args:
        positions: positions counted from where each sequence begins.
        size: R, how many of a head's dimensions turn; even.
        base: the wavelengths are `2 pi base**(2 i / R)` tokens.
        interleaved: see `RotaryTables`.
        scale_base: xPos' length over which a factor applies once; None for RoPE alone.
        center: position at which xPos' factors are 1. It cancels between queries and keys.
    """
    even = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32)
    places = positions.float()[:, None, :, None]  # [B|1, 1, L, 1]
    angles = places * base ** (-even / size)
    scale = None
    if scale_base is not None:
        scale = ((even + 0.4 * size) / (1.4 * size)) ** ((places - center) / scale_base)
    return RotaryTables(angles.cos(), angles.sin(), scale, interleaved)
