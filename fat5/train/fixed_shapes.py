"""Batches as flat streams of few different sizes, so that a pass over one can be captured and used for others."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fat5.data.layout import IGNORED
from fat5.model.ops_attention_problem import MOST_SEGMENTS
from fat5.train.flops import example_lengths

Ints = NDArray[np.int64]

# A side's tokens are rounded up to a multiple of this part of what it holds at most, and of 64, as kernels like it.
_PARTS, _TILE = 16, 64
_SHORT = 128  # examples are told apart by their longest from here on


@dataclass(frozen=True)
class FixedShapes:
    """Lays a batch of any form of `fat5.data.layout` out as a stream, and fills it up to one of a few sizes.

    What fills it are examples of their own behind the real ones, which nobody sees and whose labels are ignored: loss
    and gradients are those of the batch. The number of examples and the length of the longest are rounded up to powers
    of two.

    Attributes:
        inputs: encoder tokens of a batch, at most.
        labels: decoder tokens of a batch, at most.
        longest_input: encoder tokens of an example, at most.
        longest_label: decoder tokens of an example, at most.
        pad: the id that fills the inputs.
    """

    inputs: int
    labels: int
    longest_input: int
    longest_label: int
    pad: int

    def stream(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Give the batch as `fat5.data.layout.stream` does, filled; what is not model input is carried over."""
        given = [lengths.numpy() for lengths in example_lengths(batch)]
        used = given[0] + given[1] > 0  # rows of segments have places for more
        lengths = [side[used] for side in given]
        tokens = [_real(batch["input_ids"], batch, "encoder"), _real(batch["labels"], batch, "decoder")]
        limits = self.longest_input, self.longest_label
        longest = [_longest(side, limit) for side, limit in zip(lengths, limits, strict=True)]
        missing = [_rounded(len(t), most) - len(t) for t, most in zip(tokens, (self.inputs, self.labels), strict=True)]
        fillers = max(-(-tokens // most) for tokens, most in zip(missing, longest, strict=True))
        examples = len(lengths[0]) + fillers
        fillers += max(examples, min(1 << (examples - 1).bit_length(), MOST_SEGMENTS)) - examples
        laid_out = {k: v for k, v in batch.items() if k not in _MODEL_INPUTS}
        for side, name, pad, real, own, gap, most in zip(
            ("encoder", "decoder"), ("input_ids", "labels"), (self.pad, IGNORED), tokens, lengths, missing, longest,
            strict=True,
        ):  # fmt: skip
            filling = np.clip(gap - np.arange(fillers) * most, 0, most)
            ends = np.cumsum(np.concatenate([[0], own, filling]), dtype=np.int32)
            laid_out[name] = torch.cat([real, real.new_full((gap,), pad)])[None]
            laid_out[f"{side}_cu_seqlens"] = torch.from_numpy(ends)
            laid_out[f"{side}_max_length"] = most
        return laid_out


_MODEL_INPUTS = {
    "input_ids", "attention_mask", "labels", "encoder_segment_ids", "decoder_segment_ids", "encoder_cu_seqlens",
    "decoder_cu_seqlens", "encoder_max_length", "decoder_max_length",
}  # fmt: skip


def _real(tokens: Tensor, batch: Mapping[str, Any], side: str) -> Tensor:
    """Give the real ones of tokens [B, L], one example behind the other, [T]."""
    if f"{side}_cu_seqlens" in batch:
        return tokens[0]
    if f"{side}_segment_ids" in batch:
        return tokens[batch[f"{side}_segment_ids"] > 0]
    return tokens[batch["attention_mask"].bool() if side == "encoder" else tokens != IGNORED]


def _longest(lengths: Ints, limit: int) -> int:
    """Tokens of an example at most: what the kernels' grids are made for, so no more than there are, roughly."""
    return min(limit, max(_SHORT, 1 << int(lengths.max() - 1).bit_length()))


def _rounded(tokens: int, most: int) -> int:
    step = -(-most // (_PARTS * _TILE)) * _TILE
    return -(-tokens // step) * step
