"""A token added to a static cache against what the cache does itself."""

import pytest
import torch
from transformers import T5Config
from transformers.cache_utils import DynamicCache, StaticCache, StaticLayer

from fat5.model.ops_cache import append_serves, append_to_cache
from fat5.model.ops_graph import rehearsal

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
pytestmark = pytest.mark.skipif(
    not hasattr(StaticLayer(max_cache_len=1), "cumulative_length"),
    reason="the static caches of transformers 4 do not count their tokens",
)


def tokens(device, batch, heads, width, dtype, length=1):
    """Keys and values `[B, H, L, D]` as they come from one product."""
    joined = torch.randn(batch, length, 3 * heads * width, device=device).to(dtype).chunk(3, -1)
    return tuple(x.view(batch, length, heads, width).transpose(1, 2) for x in joined[1:])


def cache_of(layer):
    cache = StaticCache(config=T5Config(num_layers=1), max_cache_len=7)
    cache.layers[0] = layer
    return cache


def layers(device, batch, heads, width, dtype, length=7):
    """Two that hold the same two tokens."""
    first = tokens(device, batch, heads, width, dtype, length=2)
    pair = [StaticLayer(max_cache_len=length) for _ in range(2)]
    for layer in pair:
        layer.update(*first)
    return pair


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "heads", "width"), [(1, 1, 1), (3, 4, 8), (2, 3, 80), (65, 12, 64), (2, 1, 256)])
def test_tokens_come_to_their_places(device, batch, heads, width, dtype):
    own, expected = layers(device, batch, heads, width, dtype)
    for count in (2, 3, 4):
        token = tokens(device, batch, heads, width, dtype)
        with rehearsal():
            assert append_serves(cache_of(own), 0, *token)
        keys, values = append_to_cache(own, *token, own.get_seq_length().clone())
        expected.update(*token)
        assert torch.equal(keys, expected.keys)
        assert torch.equal(values, expected.values)
        assert own.get_seq_length() == expected.get_seq_length() == count + 1


@torch.no_grad()
def test_values_may_lie_otherwise_than_keys(device):
    own, expected = layers(device, 2, 3, 16, torch.float32)
    key, value = tokens(device, 2, 3, 16, torch.float32)
    value = value.contiguous().transpose(0, 1).contiguous().transpose(0, 1)
    own.values = own.values.transpose(1, 2).contiguous().transpose(1, 2)
    append_to_cache(own, key, value, own.get_seq_length().clone())
    expected.update(key, value)
    assert torch.equal(own.keys, expected.keys)
    assert torch.equal(own.values, expected.values)


@torch.no_grad()
def test_beyond_the_end_the_last_key_becomes_nan(device):
    own, _ = layers(device, 2, 3, 8, torch.float32, length=3)
    for is_full in (False, True):
        before = own.keys[:, :, :2].clone()
        append_to_cache(own, *tokens(device, 2, 3, 8, torch.float32), own.get_seq_length().clone())
        assert own.keys[:, :, 2].isnan().all() == is_full
        assert torch.equal(own.keys[:, :, :2], before)


@torch.no_grad()
def test_all_else_is_left_to_the_cache(device):
    own, _ = layers(device, 2, 3, 8, torch.bfloat16)
    cache, token = cache_of(own), tokens(device, 2, 3, 8, torch.bfloat16)
    assert not append_serves(cache, 0, *token)
    dynamic = DynamicCache()
    dynamic.update(*token, 0)
    offloaded = cache_of(own)
    offloaded.offloading = True
    turned = tuple(x.expand(2, 3, 8, 8).mT[:, :, :1] for x in token)
    with rehearsal():
        assert append_serves(cache, 0, *token)
        for other in (dynamic, offloaded, cache_of(StaticLayer(max_cache_len=7))):
            assert not append_serves(other, 0, *token)
        assert not append_serves(cache, 0, *tokens(device, 2, 3, 8, torch.bfloat16, length=2))
        assert not append_serves(cache, 0, *(x.float() for x in token))
        assert not append_serves(cache, 0, *turned)
        assert not append_serves(cache, 0, *(x.double() for x in token))
        with torch.enable_grad():
            assert not append_serves(cache, 0, *token)
