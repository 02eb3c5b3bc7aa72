"""Dropout inside the attention operator: which weights it drops, and that they are dropped alike everywhere."""

import pytest
import torch
from attention_oracle import Inputs, assert_as_exact, gradients, plain_attention

from fat5.model.ops_attention import attention
from fat5.model.ops_attention_bias import BiasArgs, T5Bias
from fat5.model.ops_attention_problem import Problem
from fat5.model.ops_attention_reference import dropout_mask, reference_attention

P = 0.3


@pytest.fixture
def seed(device):
    return torch.tensor([0x1234_5678_9ABC], device=device)


def kept(device, seed, length, p=P, **options):
    """Which weights are kept, `[B, H, L, L]`, read off with one-hot values."""
    q = torch.zeros(2, 2, length, length, device=device)
    eye = torch.eye(length, device=device).expand(2, 2, -1, -1)
    return attention(q, q, eye, dropout_p=p, seed=seed, **options) > 0


def documented(seed, segments, heads, length, p=P):
    """What is kept, `[segments, heads, L, L]`."""
    places = torch.arange(length, device=seed.device)
    return dropout_mask(seed, p, torch.arange(segments, device=seed.device)[:, None, None, None], heads, places, places)


@pytest.mark.parametrize("length", [16, 96])
def test_mask_is_the_documented_philox_stream(device, seed, length):
    assert torch.equal(kept(device, seed, length), documented(seed, 2, 2, length))


def test_philox_matches_its_published_vectors():
    """Salmon et al. 2011, known-answer tests of Philox4x32-10, seen through the uniform it makes."""
    seed = torch.zeros(1, dtype=torch.int64)
    uniform = 0x6627E8D5 / 2**31  # first word for counter 0 and key 0, which is below 2**31
    assert documented(seed, 1, 1, 1, uniform * 0.9999).item()
    assert not documented(seed, 1, 1, 1, uniform * 1.0001).item()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("length", "d", "dtype"), [(70, 16, torch.float32), (130, 64, torch.bfloat16), (130, 128, torch.float16)]
)
def test_gradients_match_the_materialised_mask(device, seed, length, d, dtype, causal, deterministic):
    q, k, v = (torch.randn(2, 2, length, d, device=device, dtype=dtype) for _ in range(3))
    table = torch.randn(8, 2, device=device, dtype=dtype)
    x = Inputs(q, k, v, table, "t5", not causal, max_distance=20, causal=causal, scale=2 / d**0.5)
    keep = documented(seed, 2, 2, length)
    exact_leaves, plain_leaves, leaves = x.leaves(torch.float64), x.leaves(), x.leaves()
    exact = plain_attention(x, exact_leaves, keep, P)
    plain = plain_attention(x, plain_leaves, keep, P)
    out = attention(
        *leaves[:3], bias=T5Bias(leaves[3], not causal, 20), causal=causal, scale=x.scale, dropout_p=P, seed=seed,
        deterministic=deterministic,
    )  # fmt: skip
    assert_as_exact("output", out, exact, plain)
    grad = torch.randn_like(out)
    found = [gradients(*each, grad) for each in ((out, leaves), (exact, exact_leaves), (plain, plain_leaves))]
    for name, *three in zip(("dq", "dk", "dv", "dbias"), *found, strict=True):
        assert_as_exact(name, *three)


def test_packed_and_padded_drop_the_same_weights(device, seed):
    q, k, v = (torch.randn(2, 2, 40, 16, device=device) for _ in range(3))
    padded = attention(q, k, v, dropout_p=P, seed=seed)
    cu = torch.tensor([0, 40, 80], dtype=torch.int32, device=device)
    packed = attention(
        *(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)), cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=64,
        max_seqlen_k=77, dropout_p=P, seed=seed,
    )  # fmt: skip
    torch.testing.assert_close(packed.unflatten(0, (2, 40)).transpose(1, 2), padded, rtol=0, atol=1e-6)


def test_reference_drops_the_same_weights(device, seed):
    q, k, v = (torch.randn(2, 40, 2, 16, device=device) for _ in range(3))
    out = attention(*(x.transpose(1, 2) for x in (q, k, v)), dropout_p=P, seed=seed).transpose(1, 2)
    problem = Problem(False, 1.0, 0, P, 40, 40)
    torch.testing.assert_close(reference_attention(q, k, v, BiasArgs(), None, None, None, problem, seed), out)
    cu = torch.tensor([0, 10, 40], dtype=torch.int32, device=device)
    packed = [x[:1] for x in (q, k, v)]
    expected = reference_attention(*packed, BiasArgs(), cu, cu, None, problem, seed)[0]
    got = attention(*(x[0] for x in packed), cu_seqlens_q=cu, cu_seqlens_k=cu, dropout_p=P, seed=seed)
    torch.testing.assert_close(got, expected)


def test_share_of_kept_weights(device, seed):
    """Within five standard deviations overall, and no correlation between heads, rows, columns or neighbours."""
    mask = documented(seed, 4, 4, 128).double() - (1 - P)
    assert abs(mask.mean()) < 5 * (P * (1 - P) / mask.numel()) ** 0.5
    for axis in range(4):
        a, b = mask.narrow(axis, 0, mask.shape[axis] - 1), mask.narrow(axis, 1, mask.shape[axis] - 1)
        assert abs((a * b).mean()) < 5 * P * (1 - P) / a.numel() ** 0.5


def test_seeds(device, seed):
    assert not torch.equal(kept(device, seed, 16), kept(device, seed + 1, 16))
    torch.manual_seed(0)
    first = kept(device, None, 16)
    assert not torch.equal(kept(device, None, 16), first)
    torch.manual_seed(0)
    assert torch.equal(kept(device, None, 16), first)
