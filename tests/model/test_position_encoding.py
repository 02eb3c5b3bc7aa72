"""Position buckets are those of stock T5, bit for bit, and the bias is the table's row for each bucket."""

import math
from fractions import Fraction

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from fat5.model.position_encoding import RelativePositionBias, relative_position_bucket


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (64, 128), (32, 20), (16, 1000), (33, 127)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_those_of_stock(num_buckets, max_distance, bidirectional):
    distances = torch.arange(-5000, 5001)
    ours = relative_position_bucket(distances, bidirectional, num_buckets, max_distance)
    stock = T5Attention._relative_position_bucket(distances, bidirectional, num_buckets, max_distance)
    assert torch.equal(ours, stock)
    assert ours.dtype == torch.int64


def test_buckets_follow_the_published_formula():
    """Away from the edges, where rounding decides, the bucket is that of exact arithmetic."""
    for distance in range(0, 300):
        ours = relative_position_bucket(torch.tensor([-distance]), False, 32, 128).item()
        if distance < 16:
            assert ours == distance
            continue
        exact = 16 + math.log(Fraction(distance, 16)) / math.log(8) * 16
        if abs(exact - round(exact)) > 1e-4:
            assert ours == min(31, int(exact))


def test_bias_is_the_row_of_the_bucket():
    bias = RelativePositionBias(num_buckets=8, max_distance=12, num_heads=3, bidirectional=True)
    queries, keys = torch.arange(4, 9), torch.arange(30)
    dense = bias(queries, keys)
    assert dense.shape == (1, 3, 5, 30)
    for i, query in enumerate(queries.tolist()):
        for key in keys.tolist():
            bucket = relative_position_bucket(torch.tensor(key - query), True, 8, 12)
            assert torch.equal(dense[0, :, i, key], bias.relative_attention_bias.weight[bucket])
