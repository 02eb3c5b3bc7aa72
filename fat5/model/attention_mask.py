"""Who may attend to whom, in the form that each implementation of attention needs."""

from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from .attention_layout import KernelLayout, PackedTokens, host_may_look, packed_layout, padded_layout
from .flash_attention import FLASH_ATTENTION, flash_serves
from .ops_attention import kernels_serve
from .ops_attention_checks import DTYPES, MAX_HEAD_DIM
from .position_rotary import RotaryTables


def kernels_take(implementation: str | None, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether attention of this kind goes through the kernels, ours or flash-attn's, if they can take its mask."""
    if implementation == FLASH_ATTENTION:
        return flash_serves(device, dtype, head_dim)
    return implementation == "fat5" and kernels_serve(device) and dtype in DTYPES and head_dim <= MAX_HEAD_DIM


@dataclass(eq=False)
class AttentionMask:
    """Who may attend to whom, described without a matrix. One per stack and kind of attention.

    Attributes:
        query_length, key_length: Lq and Lk. Keys include those of the cache.
        device: where masks and layouts are built.
        query_offset: position of the first query: the number of cached tokens, an int, or an int64 scalar tensor
            when the cache is static.
        causal: no query may attend to a later position.
        cross: the keys are another sequence's, and distances to them mean nothing.
        key_mask: bool `[B, Lk]`, True for real keys; None when all are real.
        query_segments, key_segments: ints `[B, Lq]` and `[B, Lk]`, 0 for padding; a query attends only to keys
            of its own segment. Both or neither.
        matrix: `[B|1, H|1, Lq|1, Lk]`, the user's own: bool, True where attention is allowed, or floats that are added
            to the scores. It stands in for causality and `key_mask`.
        drawn: int64 `[L]`, rising: positions that stand in for 0, 1, 2, ... in self-attention without cached tokens;
            None where there are none.
        rotary: what turns queries and keys of self-attention; None without RoPE.
        dense_bias: the kernels are given the position bias as a matrix, which no packed layout takes.
        rows: the tokens of a packed stack whose queries, keys and values are laid out in rows again for this attention,
            which is what the mask then describes; None where they come as they are attended to.
        implementation: of attention, that `prepare` was called for.
        layout: how the kernels see the batch; None where a matrix is needed. These are filled by `prepare`.
        allowed: bool `[B|1, H|1, Lq|1, Lk]`, True where attention is allowed; None when it is everywhere.
        visible: bool `[B|1, H|1, Lq|1, 1]`, False for queries that may attend to nothing; None when there are none.
            These two are for implementations that need a matrix, and are filled by `build_dense`.
    """

    query_length: int
    key_length: int
    device: torch.device
    query_offset: int | torch.Tensor = 0
    causal: bool = False
    cross: bool = False
    key_mask: torch.Tensor | None = None
    query_segments: torch.Tensor | None = None
    key_segments: torch.Tensor | None = None
    matrix: torch.Tensor | None = None
    drawn: torch.Tensor | None = None
    rotary: RotaryTables | None = None
    dense_bias: bool = False
    rows: PackedTokens | None = None
    implementation: str = field(default="sdpa", init=False)
    layout: KernelLayout | None = field(default=None, init=False)
    allowed: torch.Tensor | None = field(default=None, init=False)
    visible: torch.Tensor | None = field(default=None, init=False)

    @property
    def query_positions(self) -> torch.Tensor:
        """int64 `[Lq]`."""
        return torch.arange(self.query_length, device=self.device) + self.query_offset

    @property
    def key_positions(self) -> torch.Tensor:
        """int64 `[Lk]`."""
        return torch.arange(self.key_length, device=self.device)

    @property
    def is_last_row(self) -> bool:
        """Whether the only query is a decoder's latest token, and all others are keys."""
        if self.query_length > 1 or not self.causal or self.drawn is not None:
            return False
        return isinstance(self.query_offset, int) and self.query_offset == self.key_length - 1

    def encoded_positions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of queries and keys that their distances are measured by, int64 `[Lq]` and `[Lk]`."""
        if self.drawn is not None:
            return self.drawn, self.drawn
        return self.query_positions, self.key_positions

    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of queries and keys in self-attention, counted from where the sequence of each begins.

        int64 `[B|1, Lq]` and `[B|1, Lk]`, 0 for padding before it.
        """
        queries, keys = self.encoded_positions()
        if self.query_segments is not None:
            ids = self.query_segments.to(self.device)
            new = torch.cat([torch.ones_like(ids[:, :1], dtype=torch.bool), ids[:, 1:] != ids[:, :-1]], dim=1)
            starts = torch.where(new, self.key_positions, 0).cummax(1).values
            starts = keys[starts]  # [B, L]
            return queries - starts, keys - starts
        if self.key_mask is None or (self.layout is not None and self.layout.queries is None):
            return queries[None], keys[None]
        starts = keys[self.key_mask.to(self.device).int().argmax(1)][:, None]  # [B, 1]
        return (queries - starts).clamp(min=0), (keys - starts).clamp(min=0)

    def prepare(self, implementation: str | None, dtype: torch.dtype, head_dim: int) -> "AttentionMask":
        """Fill what `implementation` needs, and return the mask itself. Called once per stack, not by every layer.

        For "fat5" and flash-attn that is `layout`, if they have kernels for the device, dtype and head dimension that
        can take this mask; otherwise, and for the other implementations, it is what `build_dense` fills. So it is for
        a single query, as in decoding: its matrix is a row, and our kernels are long to launch.
        """
        self.implementation = implementation or "sdpa"
        if implementation == "fat5" and self.query_length == 1:
            return self.build_dense()
        if kernels_take(implementation, self.device, dtype, head_dim):
            self.layout = self._kernel_layout(key_lengths=implementation != FLASH_ATTENTION)
        return self.build_dense() if self.layout is None else self

    def _kernel_layout(self, key_lengths: bool) -> KernelLayout | None:
        """The layout in which the kernels compute what the matrix says; None if there is none.

        In packed layouts (padding not at the end, segments) queries that are padding give zeros.

        Args:
            key_lengths: padding at the end may stay, and is told by the lengths of the rows.
        """
        if isinstance(self.query_offset, torch.Tensor) or self.matrix is not None:
            return None
        if self.key_mask is None and self.key_segments is None:
            return KernelLayout()
        if not host_may_look(self.device):
            return None
        key_mask = None if self.key_mask is None else self.key_mask.to(self.device)
        if self.query_segments is None or self.key_segments is None:
            layout = None if key_mask is None else padded_layout(key_mask)
            if layout is not None and (key_lengths or layout.key_lengths is None):
                return layout
        if self.dense_bias:
            return None
        if self.query_length == 1:  # its matrix is a row
            return None
        if not self.cross and self.query_length != self.key_length:
            return None
        if self.query_segments is not None and self.key_segments is not None:
            queries, keys = self.query_segments.to(self.device).long(), self.key_segments.to(self.device).long()
            keys = keys if key_mask is None else keys * key_mask
        elif key_mask is not None:
            keys = key_mask.long()
            queries = torch.ones_like(keys[:, :1]).expand(-1, self.query_length)
        layout = packed_layout(queries if self.cross else keys, keys)
        changes = not self.cross and layout is not None and layout.keys is not None and not layout.keys.neighbours
        return None if changes else layout  # a position bias depends on the distances in the rows

    def build_dense(self) -> "AttentionMask":
        """Fill `allowed` and `visible`, and return the mask itself.

        Where it costs little to look (on a CPU, and in decoding, which waits for each token anyway), a mask that hides
        nothing is left out, and spares every layer its use.
        """
        looks = (self.device.type == "cpu" or self.query_length == 1) and host_may_look(self.device)
        allowed, key_mask = None, self.key_mask
        if looks and key_mask is not None and key_mask.all():
            key_mask = None
        static_offset = isinstance(self.query_offset, torch.Tensor)
        if self.matrix is not None:
            allowed = self.matrix.to(self.device) if self.matrix.dtype == torch.bool else None
        elif self.causal and (static_offset or self.key_length > self.query_offset + 1):
            allowed = (self.key_positions[None, :] <= self.query_positions[:, None])[None, None]
        if key_mask is not None:
            real = key_mask[:, None, None, :].to(self.device)
            allowed = real if allowed is None else allowed & real
        if self.query_segments is not None and self.key_segments is not None:
            queries = self.query_segments[:, None, :, None].to(self.device)
            keys = self.key_segments[:, None, None, :].to(self.device)
            same = (queries == keys) & (keys != 0)
            allowed = same if allowed is None else allowed & same
        self.allowed = allowed
        if allowed is not None and any(x is not None for x in (key_mask, self.query_segments, self.matrix)):
            visible = allowed.any(dim=-1, keepdim=True)
            self.visible = None if looks and visible.all() else visible
        return self

    def additive(self, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        """Dense bias with the mask written into it, `[B|1, H|1, Lq|1, Lk]` in `dtype`; None when there is neither.

        Masked entries hold the most negative finite value, so that a row without any key gives no NaN.

        Args:
            bias: dense bias `[1, H, Lq, Lk]`, or None.
            dtype: that of the queries.
        """
        bias = None if bias is None else bias.to(dtype)
        if self.matrix is not None and self.matrix.is_floating_point():
            added = self.matrix.to(self.device, dtype)
            bias = (added if bias is None else bias + added).clamp(min=torch.finfo(dtype).min)
        if self.allowed is not None:
            masked = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=self.device)
            bias = torch.where(self.allowed, torch.zeros_like(masked) if bias is None else bias, masked)
        if bias is None or not bias.is_cuda:
            return bias
        return begin_rows_at_16(bias)


def begin_rows_at_16(bias: torch.Tensor) -> torch.Tensor:
    """The same numbers, in rows that lie at multiples of 16 elements, as torch's kernels want them.

    Otherwise they would copy the matrix in every layer.
    """
    bias = bias.contiguous()
    length = bias.shape[-1]
    return bias if length % 16 == 0 else F.pad(bias, (0, 16 - length % 16))[..., :length]
