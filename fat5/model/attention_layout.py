"""How a masked batch is laid out for the attention kernels, which take lengths and packed tokens, not matrices."""

from dataclasses import dataclass

import torch

from .ops_graph import is_captured


@dataclass(eq=False)
class PackedTokens:
    """The real tokens of a batch `[B, L]`, segment after segment.

    Attributes:
        shape: B and L.
        order: int64 `[T]`, index in the flattened batch of each packed token; None where that is every token in turn.
        cu_seqlens: int32 `[S + 1]`, where each segment begins and the last one ends; segments may be empty.
        longest: length of the longest segment.
        neighbours: the tokens of every segment are neighbours in their row, so that distances stay what they were.
    """

    shape: tuple[int, int]
    order: torch.Tensor | None
    cu_seqlens: torch.Tensor
    longest: int
    neighbours: bool = True

    @property
    def tokens(self) -> int:
        """T."""
        return self.shape[0] * self.shape[1] if self.order is None else self.order.numel()

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """`[B, L, D]` to `[1, T, D]`."""
        flat = states.flatten(0, 1)
        return (flat if self.order is None else flat.index_select(0, self.order.to(flat.device)))[None]

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """`[1, T, D]` to `[B, L, D]`, zeros where there is no real token."""
        if self.order is None:
            return packed.squeeze(0).unflatten(0, self.shape)
        flat = packed.new_zeros(self.shape[0] * self.shape[1], packed.shape[2])
        return flat.index_copy(0, self.order.to(packed.device), packed.squeeze(0)).unflatten(0, self.shape)

    def gather(self, states: torch.Tensor) -> torch.Tensor:
        """`[B, H, L, D]` to `[T, H, D]`."""
        return self.pack(states.transpose(1, 2).flatten(2)).squeeze(0).unflatten(1, (states.shape[1], states.shape[3]))

    def scatter(self, packed: torch.Tensor) -> torch.Tensor:
        """`[T, H, D]` to `[B, H, L, D]`, zeros where there is no real token."""
        return self.unpack(packed.flatten(1)[None]).unflatten(2, packed.shape[1:]).transpose(1, 2)


@dataclass(eq=False)
class KernelLayout:
    """What the kernels need to know of a mask, beside causality and offset.

    Attributes:
        key_lengths: int32 `[B]`, padded layout with keys to ignore at the end of the rows; None without.
        queries, keys: packed layout; None in the padded one. In self-attention they are the same.
        of_stack: the whole stack is packed, so that queries, keys and values come as `[1, H, T, Dk]`; otherwise as
            `[B, H, L, Dk]`, whatever the layout.
    """

    key_lengths: torch.Tensor | None = None
    queries: PackedTokens | None = None
    keys: PackedTokens | None = None
    of_stack: bool = False

    def pack(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values `[T, H, Dk]` of a packed layout."""
        assert self.queries is not None
        assert self.keys is not None
        if self.of_stack:
            # not [0], whose backward fills a new tensor and copies into it
            query, key, value = query.squeeze(0), key.squeeze(0), value.squeeze(0)
            return query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        return self.queries.gather(query), self.keys.gather(key), self.keys.gather(value)

    def unpack(self, output: torch.Tensor) -> torch.Tensor:
        """Output `[T, H, Dk]` in the shape in which the queries came."""
        assert self.queries is not None
        return output.transpose(0, 1)[None] if self.of_stack else self.queries.scatter(output)


def host_may_look(device: torch.device) -> bool:
    """Whether values may be read back from `device`: not while a graph is compiled, traced or captured."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not is_captured(device)


def padded_layout(key_mask: torch.Tensor) -> KernelLayout | None:
    """The layout of bool `[B, L]` where padding is at the end of the rows or nowhere; None elsewhere."""
    lengths = key_mask.sum(1)
    positions = torch.arange(key_mask.shape[1], device=key_mask.device)
    at_the_end = (key_mask == (positions < lengths[:, None])).all()
    right_padded, complete = torch.stack([at_the_end, key_mask.all()]).tolist()
    if complete:
        return KernelLayout()
    return KernelLayout(key_lengths=lengths.int()) if right_padded else None


def packed_layout(query_segments: torch.Tensor, key_segments: torch.Tensor) -> KernelLayout | None:
    """The layout that packs every segment of every row.

    Args:
        query_segments: ints `[B, Lq]`, 1..n for the segments of a row, 0 for padding.
        key_segments: the same `[B, Lk]`; the very same tensor in self-attention.

    Returns:
        None where there is nothing to pack, and where segments are not numbered 1..n.
    """
    sides = [query_segments] if query_segments is key_segments else [query_segments, key_segments]
    batch, longest_row = key_segments.shape[0], max(side.shape[1] for side in sides)
    highest = torch.stack([side.amax() for side in sides]).amax()
    lowest = torch.stack([side.amin() for side in sides]).amin()
    sorts = [_sort_segments(side, highest) for side in sides]
    facts = torch.stack([highest, lowest, *(fact for sort in sorts for fact in sort[2:])]).tolist()  # the only look
    count, smallest, *by_side = facts
    tokens = by_side[::3]
    if smallest < 0 or count > longest_row or not all(tokens):
        return None
    starts = torch.arange(batch * count + 1, device=key_segments.device)
    packed = []
    for side, (numbers, order, *_), real, longest, neighbours in zip(
        sides, sorts, tokens, by_side[1::3], by_side[2::3], strict=True
    ):
        complete = count == 1 and real == side.numel()
        cu_seqlens = torch.searchsorted(numbers, starts, out_int32=True)
        its_order, shape = None if complete else order[:real], (batch, side.shape[1])
        packed.append(PackedTokens(shape, its_order, cu_seqlens, longest, bool(neighbours)))
    return KernelLayout(queries=packed[0], keys=packed[-1])


def _sort_segments(segments: torch.Tensor, highest: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Numbers of the segments counted through the batch, sorted, padding last; the order; and three facts.

    Returns:
        Numbers `[B * L]`; order `[B * L]`; how many tokens are real; the length of the longest segment; whether the
        tokens of every segment are neighbours. All int64, the last three scalars.
    """
    batch, length = segments.shape
    rows = torch.arange(batch, device=segments.device)[:, None]
    padding = batch * highest
    numbers = torch.where(segments > 0, rows * highest + segments - 1, padding).flatten()
    numbers, order = numbers.sort(stable=True)
    real = numbers < padding
    place = torch.arange(batch * length, device=segments.device) - torch.searchsorted(numbers, numbers)
    follows = (numbers[1:] == numbers[:-1]) & real[1:]
    neighbours = (~follows | (order[1:] - order[:-1] == 1)).all()
    return numbers, order, real.sum(), torch.where(real, place + 1, 0).amax(), neighbours.long()
