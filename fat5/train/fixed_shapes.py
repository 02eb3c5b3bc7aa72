"""Batches as flat streams of few different sizes, so that a pass over one can be captured and used for others."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fat5.data import layout
from fat5.model.ops_attention_problem import MOST_SEGMENTS

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
        """Give the batch as `fat5.data.layout.stream` does, filled; what is no part of a layout is carried over."""
        inputs, input_lengths, labels, label_lengths = layout.flatten(batch)
        longest = _longest(input_lengths, self.longest_input), _longest(label_lengths, self.longest_label)
        missing = _missing(len(inputs), self.inputs), _missing(len(labels), self.labels)
        fillers = max(-(-tokens // most) for tokens, most in zip(missing, longest, strict=True))
        examples = len(input_lengths) + fillers
        fillers += max(examples, min(1 << (examples - 1).bit_length(), MOST_SEGMENTS)) - examples
        filling = [
            np.clip(tokens - np.arange(fillers) * most, 0, most) for tokens, most in zip(missing, longest, strict=True)
        ]
        laid_out: dict[str, Any] = layout.stream(
            np.append(inputs, np.full(missing[0], self.pad)),
            np.append(input_lengths, filling[0]),
            np.append(labels, np.full(missing[1], layout.IGNORED)),
            np.append(label_lengths, filling[1]),
        )
        laid_out |= {"encoder_max_length": longest[0], "decoder_max_length": longest[1]}
        return laid_out | {name: batch[name] for name in ("denoiser", "state") if name in batch}


def _longest(lengths: Ints, limit: int) -> int:
    """Tokens of an example at most: what the kernels' grids are made for, so no more than there are, roughly."""
    return min(limit, max(_SHORT, 1 << int(lengths.max() - 1).bit_length()))


def _missing(tokens: int, most: int) -> int:
    """Tokens up to the next size."""
    return -tokens % (-(-most // (_PARTS * _TILE)) * _TILE)
