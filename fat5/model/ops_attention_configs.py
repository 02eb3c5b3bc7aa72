"""Tile sizes and launch options of the attention kernels, per part, element size and head width.

The portable ones take no more than 99 KiB of shared memory, so that they fit any part from sm_80 on; they are chosen
from what the compiler reports (registers, spills), not tuned on a device. Those for sm_90 were tuned on one H200 (torch
2.11, triton 3.6, bf16, 32k tokens, H x D = 768).
"""

from typing import NamedTuple


class ForwardConfig(NamedTuple):
    """How the forward kernel is launched.

    Attributes:
        block_m, block_n: queries and keys per tile.
        num_warps, num_stages: Triton's launch options.
        tma: keys and values come through the tensor memory accelerator (sm_90 and later).
        groups: warp groups of 64 queries in the kernel for sm_90 (2 or 3); 0 for the portable kernel.
        wide_bias: tiles of T5's bias in fp32 even where 16 bits hold them: more bytes, fewer instructions.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    groups: int = 0
    wide_bias: bool = False


class BackwardConfig(NamedTuple):
    """Queries and keys per tile, and Triton's launch options."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class FusedConfig(NamedTuple):
    """How the fused backward kernel for sm_90 is launched.

    Attributes:
        tiles: `num_stages` are buffers of queries.
        late_dp: dP's product waits for those of the tile before: fewer registers, less at a time.
        half_p: P is kept in 16 bits from its product on.
    """

    tiles: BackwardConfig
    late_dp: bool
    half_p: bool


FEW_KEYS = 16  # keys of the narrowest tile of any kernel: so many, and every tile holds whole rows

# (padded head width, bytes per element) -> configuration
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
# sm_90: any bias, dropout
FORWARD_SM90 = {
    (64, 2): ForwardConfig(64, 128, 4, 2, tma=True),
    (128, 2): ForwardConfig(64, 64, 4, 3, tma=True),
}
# sm_90: dropout, with which the tiles above spill
FORWARD_SM90_DROPOUT = {
    (64, 2): ForwardConfig(64, 64, 4, 3, tma=True),
    (128, 2): ForwardConfig(64, 64, 4, 3, tma=True),
}
# sm_90: no bias or T5's, no dropout, shapes and strides that the copy engine takes
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

# (kernel, bytes per element, padded head width up to) -> configuration; on sm_90, of these, 16 queries by 64 keys with
# heads of 128 address shared memory that is not theirs (Triton 3.6; the same kernel in sm_80's instructions does not)
BACKWARD_PORTABLE = {
    ("keys", 2, 64): BackwardConfig(32, 128, 8, 1),
    ("keys", 2, 128): BackwardConfig(16, 64, 4, 1),
    ("keys", 2, 256): BackwardConfig(32, 32, 8, 1),
    ("queries", 2, 64): BackwardConfig(64, 32, 4, 2),
    ("queries", 2, 128): BackwardConfig(64, 64, 8, 1),
    ("queries", 2, 256): BackwardConfig(32, 32, 8, 1),
    ("near", 2, 64): BackwardConfig(64, 32, 4, 1),
    ("near", 2, 128): BackwardConfig(32, 64, 4, 1),
    ("near", 2, 256): BackwardConfig(32, 16, 4, 1),
    ("keys", 4, 128): BackwardConfig(32, 32, 4, 1),
    ("queries", 4, 128): BackwardConfig(32, 32, 4, 1),
    ("near", 4, 128): BackwardConfig(32, 32, 4, 1),
    ("keys", 4, 256): BackwardConfig(16, 16, 4, 1),
    ("queries", 4, 256): BackwardConfig(16, 16, 4, 1),
    ("near", 4, 256): BackwardConfig(16, 16, 4, 1),
}
# sm_100 to sm_110, whose sums lie in a memory of their own and leave room for larger tiles; as the compiler reports
BACKWARD_SM100 = {
    ("keys", 2, 64): BackwardConfig(64, 64, 8, 2),
    ("keys", 2, 128): BackwardConfig(32, 64, 4, 1),
    ("queries", 2, 64): BackwardConfig(64, 64, 4, 1),
    ("near", 2, 64): BackwardConfig(64, 64, 4, 2),
}
# sm_90: another bias than T5's, determinism, strides that the copy engine does not take
BACKWARD_SM90 = {
    ("keys", 2, 64): BackwardConfig(64, 128, 8, 2),
    ("keys", 2, 128): BackwardConfig(64, 64, 8, 2),
    ("queries", 2, 64): BackwardConfig(128, 64, 4, 2),
    ("queries", 2, 128): BackwardConfig(64, 64, 8, 2),
    ("near", 2, 64): BackwardConfig(64, 64, 4, 2),
    ("near", 2, 128): BackwardConfig(64, 64, 8, 2),
}
# sm_90: dropout, with which the tiles above spill
BACKWARD_SM90_DROPOUT = {
    ("keys", 2, 64): BackwardConfig(32, 64, 4, 2),
    ("keys", 2, 128): BackwardConfig(16, 128, 8, 2),
    ("queries", 2, 128): BackwardConfig(128, 32, 8, 2),
}
# sm_90, none of these: head width -> configuration
BACKWARD_SM90_FUSED = {
    64: FusedConfig(BackwardConfig(64, 128, 8, 3), False, False),
    128: FusedConfig(BackwardConfig(64, 128, 8, 3), True, True),
}
# sm_90: the sums of dS near the diagonal, for the table's gradient
NEAR_IN_FUSED = 1024  # up to so many keys the fused kernel forms them as well, if heads are 64 wide
NEAR_SUMS_RING = {64: 3, 128: 2}  # beyond that a kernel of their own: head width -> blocks of keys in shared memory
NEAR_SUMS_GROUP = 3  # fp32 tiles that its registers hold
NEAR_SUMS_TILES = (64, 128)  # queries and keys


def forward_config(
    block_d: int,
    element_size: int,
    part: int,
    keys: int = 0,
    groups: bool = False,
    biased: bool = True,
    causal: bool = False,
    dropout: bool = False,
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
        dropout: weights are dropped.
    """
    key = (block_d, element_size)
    if part != 90 or key not in FORWARD_SM90:
        return FORWARD_PORTABLE[key]
    if dropout:
        return FORWARD_SM90_DROPOUT[key]
    if groups and causal:
        return FORWARD_SM90_CAUSAL[key]
    if groups and not (biased and block_d == 64):
        return FORWARD_SM90_GROUPS[key]
    return FORWARD_SM90_LONG if groups and keys > SHORT_SM90 else FORWARD_SM90[key]


def backward_config(
    kernel: str, block_d: int, element_size: int, capability: int, dropout: bool = False
) -> BackwardConfig:
    """Configuration of `kernel` (keys, queries, near) for a padded head width.

    Args:
        kernel: the fused or keys' part of the backward pass, whose tiles T5's near sums have as well; the queries'
            part; or the gradient of a dense bias.
        block_d: padded head width, a power of two from 16 to 256.
        element_size: bytes per element of q, k and v.
        capability: ten times the compute capability, 0 on the CPU.
        dropout: weights are dropped.
    """
    widest = 256 if block_d > 128 else 128 if block_d > 64 or element_size == 4 else 64
    key = (kernel, element_size, widest)
    if capability == 90:
        return (BACKWARD_SM90_DROPOUT if dropout else BACKWARD_SM90).get(key, BACKWARD_PORTABLE[key])
    return BACKWARD_SM100.get(key, BACKWARD_PORTABLE[key]) if 100 <= capability < 120 else BACKWARD_PORTABLE[key]
