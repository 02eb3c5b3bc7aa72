"""Counter-based random bits in plain torch, the same as the kernels draw: what their dropout is tested against."""

import torch

MASK_32 = 0xFFFFFFFF
STEPS = 1 << 16
"""Elementwise dropout draws 16 bits an element, so that its probability moves in steps of 1 / STEPS."""


def philox(
    seed: torch.Tensor, c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c3: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four blocks of 32 random bits, in int64, for 32-bit counters of one shape and a seed of 64 bits, int64 `[1]`.

    Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
    """
    k0, k1 = seed & MASK_32, (seed >> 32) & MASK_32
    for _ in range(10):
        low_2, high_2 = _multiply(c2, 0xCD9E8D57)
        low_0, high_0 = _multiply(c0, 0xD2511F53)
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B9) & MASK_32, (k1 + 0xBB67AE85) & MASK_32
    return c0, c1, c2, c3


def dropped_steps(p: float) -> int:
    """Of the STEPS values that 16 bits may have, how many drop an element."""
    return min(round(p * STEPS), STEPS - 1)


def elementwise_dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """Dropout of `[..., D]` as the kernels of norm and activation do it. What is not finite is NaN if dropped.

    Element (row, column) draws 16 bits: of the four words of counter (column // 8, row) the word `column % 8 // 2`, its
    lower half for even columns.

    Args:
        x: any floating dtype.
        p: probability of dropping an element, in steps of 1 / STEPS.
        seed: int64 `[1]`.
    """
    rows, columns = x.numel() // max(x.shape[-1], 1), x.shape[-1]
    groups = torch.arange(-(-columns // 8), device=x.device)
    c1 = torch.arange(rows, device=x.device)[:, None].expand(rows, len(groups))
    zero = torch.zeros_like(c1)
    words = torch.stack(philox(seed, groups.expand_as(c1), c1, zero, zero), dim=-1)  # [rows, groups, 4]
    bits = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(1)[:, :columns]
    keep = (bits >= dropped_steps(p)).view(x.shape)
    return x * keep * keep_scale(p)


def keep_scale(p: float) -> float:
    """What kept elements are multiplied by."""
    return STEPS / (STEPS - dropped_steps(p))


def draw_seed(p: float, device: torch.device) -> torch.Tensor | None:
    """A seed of int64 `[1]` from torch's generator, without waiting for the device; None where nothing is dropped."""
    return torch.randint(1 << 62, (1,), device=device) if p > 0 else None


def _multiply(x: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Low and high 32 bits of the product of 32-bit numbers held in int64, which overflows neither way."""
    low, high = x & 0xFFFF, x >> 16
    partial = low * factor  # below 2**48
    upper = high * factor + (partial >> 16)
    return ((upper & 0xFFFF) << 16) | (partial & 0xFFFF), upper >> 16
