"""Several sequences in one row, told apart by segment ids or, in a flat stream, by where each of them begins."""

from dataclasses import dataclass

import torch


@dataclass(eq=False)
class Segments:
    """Which tokens of a row belong together. One for each side of a model.

    Attributes:
        shape: B and L of the rows.
        row_ids: ints `[B, L]`, 0 for padding and 1..n for the segments of a row; None in a stream.
        cu_seqlens: int32 `[S + 1]`, where each segment of a stream begins and the last one ends; else None.
        longest: tokens of the longest segment of a stream, or more; 0 elsewhere.
    """

    shape: tuple[int, int]
    row_ids: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    longest: int = 0

    @property
    def ids(self) -> torch.Tensor:
        """Ints `[B, L]`, whichever form was given. The segments of a stream are numbered as they come."""
        if self.row_ids is not None:
            return self.row_ids
        assert self.cu_seqlens is not None
        places = torch.arange(self.shape[1], device=self.cu_seqlens.device, dtype=self.cu_seqlens.dtype)
        return torch.searchsorted(self.cu_seqlens, places, right=True)[None]


def read_segments(
    side: str,
    shape: torch.Size,
    mask: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_length: int | torch.Tensor | None,
) -> Segments | None:
    """The segments of one side, checked; None where rows are sequences.

    Args:
        side: "encoder" or "decoder", for messages.
        shape: that of ids or embeddings, `[B, L, ...]`.
        mask: the attention mask, which a stream does not have.
        segment_ids: ints `[B, L]`.
        cu_seqlens: ints `[S + 1]`, of a stream; its values are checked where that does not wait for a device.
        max_length: longest segment of the stream, or more. A tensor is read back, and without any it is counted, both
            of which wait for the device.

    Raises:
        ValueError: if they do not fit the rows or each other; the message says how.
    """
    batch, length = shape[:2]
    if cu_seqlens is None:
        if max_length is not None:
            raise ValueError(f"`{side}_max_length` goes with `{side}_cu_seqlens`, which is missing.")
        if segment_ids is None:
            return None
        if segment_ids.shape != (batch, length):
            raise ValueError(f"`{side}_segment_ids` must be [{batch}, {length}], got {list(segment_ids.shape)}.")
        return Segments((batch, length), row_ids=segment_ids)
    if segment_ids is not None:
        raise ValueError(f"Give `{side}_segment_ids` or `{side}_cu_seqlens`, not both.")
    if mask is not None:
        raise ValueError(f"A stream has no padding: leave the {side}'s attention mask out beside `{side}_cu_seqlens`.")
    if batch != 1 or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"`{side}_cu_seqlens` must be ints [segments + 1] beside a single row of tokens [1, T], got "
            f"{cu_seqlens.dtype} {list(cu_seqlens.shape)} beside [{batch}, {length}]."
        )
    cu_seqlens = cu_seqlens.int()
    if max_length is None:
        max_length = cu_seqlens.diff().amax()
    longest = int(max_length)
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        sizes = cu_seqlens.diff()
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != length or (sizes < 0).any() or (sizes > longest).any():
            raise ValueError(
                f"`{side}_cu_seqlens` must rise from 0 to the {length} tokens of the stream, by at most "
                f"`{side}_max_length` {longest} at a time."
            )
    return Segments((batch, length), cu_seqlens=cu_seqlens, longest=longest)


def require_a_pair(encoder: Segments | None, decoder: Segments | None) -> None:
    """Refuse segments of one side that have no counterpart on the other.

    Raises:
        ValueError: if only one side is packed, they are packed in different ways, or differ in number of segments.
    """
    if (encoder is None) != (decoder is None):
        raise ValueError(
            "Give segments of encoder and decoder (`encoder_segment_ids` and `decoder_segment_ids`, or `..._cu_seqlens`"
            " for a stream), or of neither."
        )
    if encoder is None or decoder is None:
        return
    if (encoder.cu_seqlens is None) != (decoder.cu_seqlens is None):
        raise ValueError("One side has segment ids and the other cu_seqlens: give both sides in the same form.")
    if encoder.cu_seqlens is not None and decoder.cu_seqlens is not None:
        counts = encoder.cu_seqlens.numel() - 1, decoder.cu_seqlens.numel() - 1
        if counts[0] != counts[1]:
            raise ValueError(f"The encoder's stream has {counts[0]} segments and the decoder's {counts[1]}.")


def shift_right(labels: torch.Tensor, segment_ids: torch.Tensor | None, start: int, pad: int) -> torch.Tensor:
    """Decoder inputs of labels `[B, L]`: shifted right, every row and every segment in it beginning with `start`.

    Args:
        labels: int64, -100 where nothing is to be predicted, for which `pad` stands in.
        segment_ids: ints `[B, L]`, or None.
        start: what the decoder begins with.
        pad: any id that the model has.
    """
    shifted = labels.roll(1, dims=-1)
    starts = torch.zeros_like(labels, dtype=torch.bool)
    starts[:, 0] = True
    if segment_ids is not None:
        starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return shifted.masked_fill(shifted == -100, pad).masked_fill(starts, start)


def until_last_label(labels: torch.Tensor) -> torch.Tensor:
    """Bool `[B, L]`, False behind the last label of a row: what comes there can change neither loss nor gradient."""
    return (labels != -100).flip(-1).cummax(-1).values.flip(-1)
