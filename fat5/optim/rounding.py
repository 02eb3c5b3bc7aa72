"""Add small updates to bf16 parameters without losing them.

bf16 has eight bits of precision: an update below 1/512 of its parameter is rounded away when it is added, every time.
"""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor


def add_kahan_(params: list[Tensor], updates: list[Tensor], compensations: list[Tensor]) -> None:
    """Add updates, keeping what rounding takes away for the next time.

    Kahan (1965), "Further remarks on reducing truncation errors"; for bf16 training: Zamirai et al. (2020), "Revisiting
    BFloat16 Training", algorithm 3. Parameter and compensation together have about sixteen bits of precision: what is
    still lost is below 2^-18 of the parameter.

    Args:
        params: bf16, changed in place.
        updates: fp32, used up.
        compensations: bf16, as the parameters: what they are short of. Changed in place.
    """
    torch._foreach_add_(updates, [c.to(u.dtype) for c, u in zip(compensations, updates, strict=True)])
    before = [p.to(u.dtype) for p, u in zip(params, updates, strict=True)]
    torch._foreach_copy_(params, torch._foreach_add(before, updates))
    # before + update - after, the first difference exact.
    torch._foreach_sub_(before, [p.to(u.dtype) for p, u in zip(params, updates, strict=True)])
    torch._foreach_add_(updates, before)
    torch._foreach_copy_(compensations, updates)


def add_stochastic_(params: list[Tensor], updates: list[Tensor], key: Sequence[int]) -> None:
    """Add updates, rounding up or down at random so that the expected result is the exact one.

    The sixteen bits of fp32 that bf16 lacks are added to sixteen random ones, and cut off: the carry rounds up with a
    probability that is the cut share of the last place.

    Args:
        params: bf16, changed in place.
        updates: fp32, used up.
        key: decides the random numbers.
    """
    generator = torch.Generator(params[0].device).manual_seed(zlib.crc32(repr(tuple(key)).encode()))
    torch._foreach_add_(updates, [p.to(u.dtype) for p, u in zip(params, updates, strict=True)])
    for p, exact in zip(params, updates, strict=True):
        bits = exact.view(torch.int32)
        noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=p.device, generator=generator)
        rounded = (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32)
        p.copy_(torch.where(exact.isfinite(), rounded, exact))
