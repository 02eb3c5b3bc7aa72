"""Tile sizes and launch options of the attention kernels, per part, element size and head width."""

from typing import NamedTuple


class ForwardConfig(NamedTuple):
    """How the forward kernel is launched.

    Attributes:
        block_m, block_n: queries and keys per tile.
        num_warps, num_stages: Triton's launch options.
        tma: keys and values come through the tensor memory accelerator (sm_90 and later).
        q_registers: keep the queries in registers rather than in shared memory (sm_90).
        max_registers: limit per thread, so that more blocks fit on a multiprocessor.
        groups: warp groups of 64 queries in the kernel for sm_90 (2 or 3); 0 for the portable kernel.
        wide_bias: tiles of T5's bias in fp32 even where 16 bits hold them: more bytes, fewer instructions.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    q_registers: bool = False
    max_registers: int | None = None
    groups: int = 0
    wide_bias: bool = False


# (padded head width, bytes per element) -> configuration. No more than 99 KiB of shared memory: any part from sm_80 on.
# Chosen from what the compiler reports, not tuned on a device.
FORWARD_PORTABLE = {
    (16, 2): ForwardConfig(128, 64, 4, 3),
    (32, 2): ForwardConfig(128, 64, 4, 3),
    (64, 2): ForwardConfig(128, 64, 8, 3),
    (128, 2): ForwardConfig(128, 32, 8, 3),
    (256, 2): ForwardConfig(64, 32, 8, 2),
    (16, 4): ForwardConfig(64, 32, 4, 2),
    (32, 4): ForwardConfig(64, 32, 4, 2),
    (64, 4): ForwardConfig(64, 32, 4, 2),
    (128, 4): ForwardConfig(32, 32, 4, 2),
    (256, 4): ForwardConfig(32, 16, 4, 1),
}
# sm_90, tuned on one H200 (torch 2.11, triton 3.6, bf16, 32k tokens, H x D = 768): any bias, dropout
FORWARD_SM90 = {
    (64, 2): ForwardConfig(64, 128, 4, 2, tma=True),
    (128, 2): ForwardConfig(64, 64, 4, 3, tma=True),
}
# sm_90, no bias or T5's, no dropout, shapes and strides that the copy engine takes
FORWARD_SM90_GROUPS = {
    (64, 2): ForwardConfig(192, 128, 4, 2, groups=3),
    (128, 2): ForwardConfig(128, 128, 4, 2, groups=2, wide_bias=True),
}
FORWARD_SM90_CAUSAL = {
    (64, 2): ForwardConfig(128, 128, 4, 2, groups=2),
    (128, 2): ForwardConfig(128, 128, 4, 2, groups=2, wide_bias=True),
}
# T5's bias of 64 wide heads beyond SHORT_SM90: three groups have too few registers for it
FORWARD_SM90_LONG = ForwardConfig(128, 128, 4, 2, groups=2)
SHORT_SM90 = 4096  # up to so many keys, T5's bias of 64 wide heads is faster in the portable kernel


def forward_config(
    block_d: int,
    element_size: int,
    part: int,
    keys: int = 0,
    groups: bool = False,
    biased: bool = True,
    causal: bool = False,
) -> ForwardConfig:
    """Configuration of the forward kernel.

    Args:
        block_d: padded head width, a power of two from 16 to 256.
        element_size: bytes per element of q, k and v.
        part: ten times the compute capability.
        keys: longest number of keys.
        groups: the kernel for sm_90 can do it.
        biased: T5's bias is added.
        causal: with the causal mask.
    """
    key = (block_d, element_size)
    if part != 90 or key not in FORWARD_SM90:
        return FORWARD_PORTABLE[key]
    if groups and causal:
        return FORWARD_SM90_CAUSAL[key]
    if groups and not (biased and block_d == 64):
        return FORWARD_SM90_GROUPS[key]
    return FORWARD_SM90_LONG if groups and keys > SHORT_SM90 else FORWARD_SM90[key]
