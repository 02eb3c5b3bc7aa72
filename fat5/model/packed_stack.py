"""A whole stack without padding: from the first layer to the last on the real tokens alone, `[1, T, D]`."""

from dataclasses import dataclass

import torch

from .attention_layout import KernelLayout, PackedTokens, host_may_look, packed_layout
from .attention_mask import AttentionMask
from .packed_inputs import Segments


@dataclass(eq=False)
class Rows:
    """What one side of a model gets, beside the states.

    Attributes:
        shape: B and L.
        mask: bool `[B, L]`, False for padding; None where all is real.
        segments: the sequences packed in the rows; None where every row is one.
    """

    shape: tuple[int, int]
    mask: torch.Tensor | None = None
    segments: Segments | None = None

    @property
    def plain(self) -> bool:
        """Whether every row is one sequence without padding, as far as can be told without a look."""
        return self.mask is None and self.segments is None

    def ids(self, device: torch.device) -> torch.Tensor:
        """Int64 `[B, L]`: the segment of every token, 0 for padding."""
        if self.segments is None:
            ids = torch.ones(self.shape, dtype=torch.long, device=device)
        else:
            ids = self.segments.ids.to(device).long()
        return ids if self.mask is None else ids * self.mask.to(device)


@dataclass(eq=False)
class PackedStack:
    """Where the tokens of a packed stack come from.

    Attributes:
        queries: the stack's own tokens.
        keys: the tokens that cross-attention looks at, in as many segments; the stack's own without any.
    """

    queries: PackedTokens
    keys: PackedTokens

    def self_attention(self, causal: bool) -> AttentionMask:
        """The mask of the stack's tokens among themselves, ready for the kernels, which count distances in them."""
        return self._mask(self.queries, causal=causal)

    def cross_attention(self) -> AttentionMask:
        """The mask of the stack's tokens towards the encoder's, ready for the kernels."""
        return self._mask(self.keys, cross=True)

    def _mask(self, keys: PackedTokens, causal: bool = False, cross: bool = False) -> AttentionMask:
        device = keys.cu_seqlens.device
        mask = AttentionMask(self.queries.tokens, keys.tokens, device, causal=causal, cross=cross)
        mask.layout = KernelLayout(queries=self.queries, keys=keys, of_stack=True)
        return mask


def pack_stack(rows: Rows, encoder_rows: Rows | None, device: torch.device) -> PackedStack | None:
    """How a stack is packed; None where it has to stay as it is.

    That is where there is no padding to remove, where there is no real token on one side, and where the host may not
    look at masks. A stream needs no look.

    Args:
        rows: of the stack.
        encoder_rows: what its cross-attention looks at; None without any.
        device: of the states.
    """
    sides = [rows] if encoder_rows is None else [rows, encoder_rows]
    streams = [_stream(side.segments, device) for side in sides]
    if streams[0] is not None and streams[-1] is not None:
        return PackedStack(streams[0], streams[-1])
    if all(side.plain for side in sides) or not host_may_look(device):
        return None
    ids = [side.ids(device) for side in sides]
    layout = packed_layout(ids[0], ids[-1])
    if layout is None or layout.queries is None or layout.keys is None:
        return None
    return PackedStack(layout.queries, layout.keys)


def _stream(segments: Segments | None, device: torch.device) -> PackedTokens | None:
    """The tokens of a stream as they are; None for rows."""
    if segments is None or segments.cu_seqlens is None:
        return None
    return PackedTokens(segments.shape, None, segments.cu_seqlens.to(device), segments.longest)
