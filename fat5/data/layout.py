"""Lay denoised examples out as tensors: padded rows, rows of segments, or one flat stream.

All take the flat inputs and targets of `Mixture.corrupt` with the lengths of each example, and give model
inputs.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]

IGNORED = -100


def padded(inputs: Ints, input_lengths: Ints, labels: Ints, label_lengths: Ints, pad: int) -> dict[str, Tensor]:
    """Lay out one example a row.

    Returns:
        `input_ids` [B, Le], `attention_mask` [B, Le], `labels` [B, Ld] with -100 behind the targets; all
        int64, as wide as the longest.
    """
    input_ids, real = _rows(inputs, input_lengths, int(input_lengths.max(initial=0)), pad)
    label_rows, _ = _rows(labels, label_lengths, int(label_lengths.max(initial=0)), IGNORED)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(real.astype(np.int64)),
        "labels": torch.from_numpy(label_rows),
    }


def segments(
    inputs: Ints,
    input_lengths: Ints,
    labels: Ints,
    label_lengths: Ints,
    examples: Ints,
    most_input: int,
    most_labels: int,
    pad: int,
) -> dict[str, Tensor]:
    """Lay out several examples a row, side by side.

    Args:
        inputs: flat inputs, ordered by row.
        input_lengths: [N].
        labels: flat targets in the same order.
        label_lengths: [N].
        examples: [B] how many examples each row has.
        most_input: Le, encoder tokens of a row.
        most_labels: Ld, decoder tokens of a row.
        pad: fills the rest of `input_ids`.

    Returns:
        `input_ids` [B, Le], `labels` [B, Ld] (-100 behind the targets), and `encoder_segment_ids` [B, Le],
        `decoder_segment_ids` [B, Ld]: 1..n for the examples of a row, 0 for padding. All int64.
    """
    row = np.repeat(np.arange(len(examples)), examples)
    segment = np.arange(1, len(row) + 1) - np.repeat(np.cumsum(examples) - examples, examples)
    batch = {}
    for name, flat, lengths, most, fill in (
        ("input_ids", inputs, input_lengths, most_input, pad),
        ("labels", labels, label_lengths, most_labels, IGNORED),
    ):
        used = np.bincount(row, lengths, minlength=len(examples)).astype(np.int64)
        batch[name], real = _rows(flat, used, most, fill)
        ids = np.zeros(real.shape, dtype=np.int64)
        ids[real] = np.repeat(segment, lengths)
        batch["encoder_segment_ids" if name == "input_ids" else "decoder_segment_ids"] = ids
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def stream(inputs: Ints, input_lengths: Ints, labels: Ints, label_lengths: Ints) -> dict[str, Tensor | int]:
    """Lay all examples out one behind the other, without padding.

    Returns:
        `input_ids` [1, Te] and `labels` [1, Td] int64; `encoder_cu_seqlens` and `decoder_cu_seqlens` [N + 1]
        int32, where each example begins, and the total; `encoder_max_length`, `decoder_max_length`, the longest
        example, as plain ints, for which nobody has to wait when the tensors are on a device.
    """
    batch: dict[str, Tensor | int] = {
        "input_ids": torch.from_numpy(inputs[None]),
        "labels": torch.from_numpy(labels[None]),
    }
    for side, lengths in (("encoder", input_lengths), ("decoder", label_lengths)):
        edges = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        batch[f"{side}_cu_seqlens"] = torch.from_numpy(edges)
        batch[f"{side}_max_length"] = int(lengths.max(initial=0))
    return batch


def example_lengths(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Give the encoder's and the decoder's length of each example [N] of a batch, in any of the layouts.

    0 and 0 where a row of segments has fewer than others.
    """
    if "encoder_cu_seqlens" in batch:
        return batch["encoder_cu_seqlens"].long().diff(), batch["decoder_cu_seqlens"].long().diff()
    if "encoder_segment_ids" in batch:
        sides = batch["encoder_segment_ids"], batch["decoder_segment_ids"]
        most = int(max(side.max() for side in sides)) + 1
        rows = torch.arange(len(sides[0]))[:, None] * most
        first, second = ((rows + s).flatten().bincount(minlength=len(s) * most).view(-1, most)[:, 1:] for s in sides)
        return first.flatten(), second.flatten()
    return batch["attention_mask"].sum(1), (batch["labels"] != IGNORED).sum(1)


def flatten(batch: Mapping[str, Any]) -> tuple[Ints, Ints, Ints, Ints]:
    """Give what a batch, in any of the layouts, was laid out from: the arguments of `stream`."""
    lengths = [side.numpy() for side in example_lengths(batch)]
    used = lengths[0] + lengths[1] > 0  # rows of segments have places for more
    inputs, labels = batch["input_ids"], batch["labels"]
    if "encoder_segment_ids" in batch:
        inputs, labels = inputs[batch["encoder_segment_ids"] > 0], labels[batch["decoder_segment_ids"] > 0]
    elif "attention_mask" in batch:
        inputs, labels = inputs[batch["attention_mask"].bool()], labels[labels != IGNORED]
    return inputs.flatten().numpy(), lengths[0][used], labels.flatten().numpy(), lengths[1][used]


def _rows(flat: Ints, lengths: Ints, width: int, fill: int) -> tuple[Ints, NDArray[np.bool_]]:
    """Lay a flat ragged array out as rows [B, width] with `fill` behind each; also where the real entries
    are.
    """
    real = np.arange(width) < lengths[:, None]
    rows = np.full(real.shape, fill, dtype=np.int64)
    rows[real] = flat
    return rows, real
