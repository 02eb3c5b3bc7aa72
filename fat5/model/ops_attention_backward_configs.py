"""Tile sizes and launch options of the portable backward kernels, per part, element size and head width."""

from typing import NamedTuple


class BackwardConfig(NamedTuple):
    """Queries and keys per tile, and Triton's launch options."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (kernel, bytes per element, padded head width up to) -> configuration. No more than 99 KiB of shared memory: any part
# from sm_80 on. Chosen from what the compiler reports (registers, spills), not tuned on a device.
PORTABLE = {
    ("keys", 2, 64): BackwardConfig(64, 64, 8, 2),
    ("keys", 2, 128): BackwardConfig(32, 64, 4, 1),
    ("keys", 2, 256): BackwardConfig(32, 32, 8, 1),
    ("queries", 2, 64): BackwardConfig(64, 64, 4, 1),
    ("queries", 2, 128): BackwardConfig(64, 64, 8, 1),
    ("queries", 2, 256): BackwardConfig(32, 32, 8, 1),
    ("near", 2, 64): BackwardConfig(64, 64, 4, 2),
    ("near", 2, 128): BackwardConfig(32, 64, 4, 1),
    ("near", 2, 256): BackwardConfig(32, 16, 4, 1),
    ("keys", 4, 128): BackwardConfig(32, 32, 4, 1),
    ("queries", 4, 128): BackwardConfig(32, 32, 4, 1),
    ("near", 4, 128): BackwardConfig(32, 32, 4, 1),
    ("keys", 4, 256): BackwardConfig(16, 16, 4, 1),
    ("queries", 4, 256): BackwardConfig(16, 16, 4, 1),
    ("near", 4, 256): BackwardConfig(16, 16, 4, 1),
}
# sm_90, tuned on one H200 (torch 2.11, triton 3.6, bf16, 32k tokens, H x D = 768). The fused kernel for sm_90 has
# configurations of its own: `ops_attention_backward_hopper_launch`.
SM90 = {
    ("keys", 2, 64): BackwardConfig(64, 128, 8, 2),
    ("keys", 2, 128): BackwardConfig(64, 64, 8, 2),
    ("queries", 2, 64): BackwardConfig(128, 64, 4, 2),
    ("queries", 2, 128): BackwardConfig(64, 64, 8, 2),
    ("near", 2, 128): BackwardConfig(64, 64, 8, 2),
}


def backward_config(kernel: str, block_d: int, element_size: int, capability: int) -> BackwardConfig:
    """Configuration of `kernel` (keys, queries, near) for a padded head width.

    Args:
        kernel: the fused or keys' part of the backward pass, the queries' part, or the gradient of a dense bias.
        block_d: padded head width, a power of two from 16 to 256.
        element_size: bytes per element of q, k and v.
        capability: ten times the compute capability, 0 on the CPU.
    """
    widest = 256 if block_d > 128 else 128 if block_d > 64 or element_size == 4 else 64
    key = (kernel, element_size, widest)
    return SM90.get(key, PORTABLE[key]) if capability == 90 else PORTABLE[key]
