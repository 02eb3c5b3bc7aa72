"""Position biases in the form the attention kernels take them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .constant_tensors import kept
from .position_encoding import relative_position_bucket

NO_BIAS, T5_BIAS, ALIBI_BIAS, DENSE_BIAS = range(4)


@dataclass(frozen=True)
class T5Bias:
    """T5's relative position bias, learned, one number per bucket of distances and head.

    Attributes:
        table: `[num_buckets, H]`, bf16, fp16 or fp32; receives a gradient. A bucket of `-inf` masks its distances.
        bidirectional: buckets tell keys before the query from keys after it (encoder); else later keys share bucket 0.
        max_distance: distance from which the bucket is the last one.
    """

    table: torch.Tensor
    bidirectional: bool = True
    max_distance: int = 128


@dataclass(frozen=True)
class AlibiBias:
    """Bias `-slopes[h] * |key position - query position|` (Press et al. 2022, arXiv:2108.12409); slopes fp32 `[H]`."""

    slopes: torch.Tensor


@dataclass(frozen=True)
class DenseBias:
    """Any bias `[1|B, 1|H, Lq, Lk]`, bf16, fp16 or fp32, padded layout only; receives a gradient.

    An entry of `-inf` masks one key from one query; a query whose every key is masked gives zeros.
    """

    bias: torch.Tensor


class BiasLine(NamedTuple):
    """T5's buckets as a function of the distance r = key position - query position.

    `buckets` (int64, `[left + right + 1]`, CPU) holds the bucket of every r from -left to right; below and above
    these the bucket is that of the ends.
    """

    buckets: torch.Tensor
    left: int
    right: int


@dataclass(frozen=True)
class BiasArgs:
    """One bias as the launchers take it; what a kind does not use is None.

    Attributes:
        kind: NO_BIAS, T5_BIAS, ALIBI_BIAS or DENSE_BIAS.
        line: fp32 `[H, left + right + 1]`, contiguous: bias of distance r at index `clamp(r, -left, right) + left`.
        left, right: the ends of the line.
        slopes: fp32 `[H]`.
        dense: `[B, H, Lq, Lk]`, stride 0 where it is broadcast.
        exact_dtype: a dtype that holds the line without rounding: that of the table it comes from.
    """

    kind: int = NO_BIAS
    line: torch.Tensor | None = None
    left: int = 0
    right: int = 0
    slopes: torch.Tensor | None = None
    dense: torch.Tensor | None = None
    exact_dtype: torch.dtype = torch.float32


@torch.compiler.assume_constant_result  # where torch traces, it cannot read the ends off
@kept
def bias_line(bidirectional: bool, num_buckets: int, max_distance: int) -> BiasLine:
    """The shortest line that holds all of T5's buckets: its ends are read off the buckets themselves."""
    reach = max(max_distance, num_buckets) + 1
    distances = torch.arange(-reach, reach + 1, device="cpu")
    buckets = relative_position_bucket(distances, bidirectional, num_buckets, max_distance)
    changes = (buckets[1:] != buckets[:-1]).nonzero().flatten()
    if changes.numel() == 0:
        left, right = 1, 1
    else:
        left, right = max(reach - int(changes[0]), 1), max(int(changes[-1]) + 1 - reach, 1)
    return BiasLine(buckets[reach - left : reach + right + 1].clone(), left, right)


@kept
def line_buckets(bidirectional: bool, num_buckets: int, max_distance: int, device: torch.device) -> torch.Tensor:
    """`bias_line`'s buckets on a device, copied there once: a CUDA graph could not."""
    return bias_line(bidirectional, num_buckets, max_distance).buckets.to(device)


def expand_table(table: torch.Tensor, buckets: torch.Tensor) -> torch.Tensor:
    """Bias line, fp32 or better, `[H, R]` of a table `[num_buckets, H]`, for the buckets `[R]` of its distances."""
    return table.to(torch.promote_types(table.dtype, torch.float32))[buckets].t().contiguous()
