"""T5's relative position bias: distances fall into buckets, and each head learns one bias per bucket."""

import math
from functools import lru_cache

import torch
from torch import nn


def relative_position_bucket(
    relative_position: torch.Tensor, bidirectional: bool, num_buckets: int, max_distance: int
) -> torch.Tensor:
    """Bucket of each distance.

    Half of the buckets hold one distance each; the others grow logarithmically up to `max_distance`, beyond which
    all distances share the last. When bidirectional, the two signs have half of the buckets each; otherwise keys
    after the query share the bucket of distance zero.

    Formula of Mesh TensorFlow's `_relative_position_bucket` (`mesh_tensorflow/transformer/transformer_layers.py`,
    Apache-2.0), in the order of operations of `transformers`, so that the rounding at bucket edges is the same.

    Args:
        relative_position: key position minus query position, int64, any shape.
        bidirectional: True in an encoder, False in a causal decoder.
        num_buckets: rows of the bias table.
        max_distance: distance from which on the last bucket is used.

    Returns:
        int64 tensor of the same shape, values in `[0, num_buckets)`.
    """
    if bidirectional:
        num_buckets //= 2
        first = (relative_position > 0).long() * num_buckets
        distance = relative_position.abs()
    else:
        first = torch.zeros_like(relative_position)
        distance = (-relative_position).clamp(min=0)
    exact = num_buckets // 2
    logarithmic = torch.log(distance.float() / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    far = (exact + logarithmic.long()).clamp(max=num_buckets - 1)
    return first + torch.where(distance < exact, distance, far)


@lru_cache(maxsize=64)
def buckets_behind(length: int, num_buckets: int, max_distance: int, device: torch.device) -> torch.Tensor:
    """Buckets int64 `[length]` of the distances `1 - length` to 0, in a causal decoder."""
    return relative_position_bucket(torch.arange(1 - length, 1, device=device), False, num_buckets, max_distance)


class RelativePositionBias(nn.Module):
    """The table of biases, one per bucket and head (`relative_attention_bias`, `[num_buckets, num_heads]`)."""

    def __init__(self, num_buckets: int, max_distance: int, num_heads: int, bidirectional: bool) -> None:
        super().__init__()
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        self.relative_attention_bias = nn.Embedding(num_buckets, num_heads)

    def forward(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """Dense bias `[1, num_heads, Lq, Lk]`, in the table's dtype, for int64 positions `[Lq]` and `[Lk]`."""
        distances = key_positions[None, :] - query_positions[:, None]  # [Lq, Lk]
        buckets = relative_position_bucket(distances, self.bidirectional, self.num_buckets, self.max_distance)
        return self.relative_attention_bias(buckets).permute(2, 0, 1).unsqueeze(0)

    def last_row(self, length: int, device: torch.device) -> torch.Tensor:
        """Dense bias `[1, num_heads, 1, length]` of the last of `length` positions of a causal decoder.

        Every step of decoding asks for one. The buckets of the longest so far, on `device`, hold those of the others.
        """
        longest = max(64, 1 << (length - 1).bit_length())
        buckets = buckets_behind(longest, self.num_buckets, self.max_distance, device)[longest - length :]
        return self.relative_attention_bias(buckets).t()[None, :, None]

    def table(self) -> torch.Tensor:
        """The table `[num_buckets, num_heads]`, looked up, as the embedding may be wrapped or offloaded."""
        embedding = self.relative_attention_bias
        device = embedding.weight.device if not embedding.weight.is_meta else "cpu"  # from where its hook takes them on
        return embedding(torch.arange(self.num_buckets, device=device))
