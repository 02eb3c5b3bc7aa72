"""What attention refuses, by name, and empty inputs."""

import pytest
import torch

from fat5.model.ops_attention import attention
from fat5.model.ops_attention_bias import AlibiBias, DenseBias, T5Bias


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(1, 2, 33, 8)}, "agree in batch, heads and head_dim"),
        ({"v": torch.randn(1, 2, 30, 16)}, "must be"),
        ({"q": torch.randn(2, 33, 16)}, "must be"),
        ({"k": torch.randn(1, 2, 33, 16).half()}, "one dtype"),
        ({"scale": 0.0}, "scale > 0"),
        ({"dropout_p": 1.0}, "dropout_p < 1"),
        ({"q_offset": -1}, "q_offset >= 0"),
        ({"cu_seqlens_q": torch.tensor([0, 3])}, "give both or neither"),
        ({"bias": T5Bias(torch.randn(8, 3))}, r"must be \[num_buckets, 2\]"),
        ({"bias": AlibiBias(torch.rand(2, requires_grad=True))}, "slopes"),
        ({"bias": DenseBias(torch.randn(1, 2, 33, 1))}, "broadcastable"),
        ({"bias": DenseBias(torch.ones(1, 1, 33, 33, dtype=torch.bool))}, "is added"),
        ({"bias": T5Bias(torch.ones(8, 2, dtype=torch.int64))}, "must be bf16"),
        ({"key_lengths": torch.tensor([7, 7])}, r"ints \[1\]"),
        ({"key_lengths": torch.tensor([[7]])}, r"ints \[1\]"),
        ({"key_lengths": torch.tensor([True])}, "ints"),
        ({"key_lengths": torch.tensor([7], device="meta")}, "key_lengths is on meta, q on cpu"),
        ({"bias": T5Bias(torch.empty(8, 2, device="meta"))}, "bias is on meta"),
        ({"seed": torch.zeros(1, dtype=torch.int64, device="meta")}, "seed is on meta"),
        ({"seed": torch.zeros(1)}, "seed must be int64"),
    ],
)
def test_bad_arguments_are_named(change, message):
    q, k, v = (torch.randn(1, 2, 33, 16) for _ in range(3))
    arguments = {"q": q, "k": k, "v": v} | change
    with pytest.raises(ValueError, match=message):
        attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def test_the_kernels_take_no_double_precision(device):
    x = torch.randn(1, 2, 33, 16, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match=r"bf16, fp16, fp32: got torch\.float64"):
        attention(x, x, x)


def test_head_dim_limit_and_packed_options():
    wide = torch.randn(1, 1, 2, 264)
    with pytest.raises(ValueError, match="head_dim is 264"):
        attention(wide, wide, wide)
    x, cu = torch.randn(4, 1, 16), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="padded layout"):
        attention(x, x, x, cu_seqlens_q=cu, cu_seqlens_k=cu, q_offset=2)
    with pytest.raises(ValueError, match="differ"):
        attention(x, x, x, cu_seqlens_q=cu, cu_seqlens_k=torch.tensor([0, 2, 4]))


@pytest.mark.parametrize(
    ("ends", "longest", "message"),
    [
        ([0, 3], 3, "rise from 0 to the 4 tokens"),
        ([0, 5], 5, "rise from 0"),
        ([1, 4], 3, "rise from 0"),
        ([0, 3, 2, 4], 4, "rise from 0"),
        ([0, 1, 4], 2, "longest segment has 3"),
        ([0.0, 4.0], 4, "must be ints"),
        ([], 4, "must be ints"),
    ],
)
def test_segments_are_all_of_the_tokens(ends, longest, message):
    x, ends = torch.randn(4, 1, 16), torch.tensor(ends)
    whole = torch.arange(len(ends)) * 4 // max(len(ends) - 1, 1)
    with pytest.raises(ValueError, match=r"(cu|max)_seqlens?_q") as raised:
        attention(x, x, x, cu_seqlens_q=ends, cu_seqlens_k=whole, max_seqlen_q=longest, max_seqlen_k=4)
    raised.match(message)


def test_no_segment_and_no_token(device):
    x, ends = torch.randn(0, 1, 16, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    assert attention(x, x, x, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=0, max_seqlen_k=0).shape == x.shape


def every_other(x):
    """The same numbers, with others between them."""
    return torch.stack([x, x + 1], dim=-1)[..., 0]


def test_lengths_and_slopes_may_lie_apart(device):
    q, k, v = (torch.randn(3, 2, 33, 16, device=device) for _ in range(3))
    lengths = torch.tensor([30, 7, 12], dtype=torch.int32, device=device)
    slopes = torch.rand(2, device=device)
    for given in (lengths, lengths[1:2].expand(3)):
        expected = attention(q, k, v, key_lengths=given.contiguous(), bias=AlibiBias(slopes))
        got = attention(q, k, v, key_lengths=every_other(given), bias=AlibiBias(every_other(slopes)))
        assert torch.equal(got, expected)
        assert torch.equal(attention(q, k, v, key_lengths=given, bias=AlibiBias(slopes)), expected)
    q, k, v = (torch.randn(33, 2, 16, device=device) for _ in range(3))
    ends = torch.tensor([0, 1, 13, 33], dtype=torch.int32, device=device)
    expected = attention(q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends)
    assert torch.equal(attention(q, k, v, cu_seqlens_q=every_other(ends), cu_seqlens_k=every_other(ends)), expected)


def test_every_number_of_a_leaf_has_its_gradient(device):
    q, k, v = (torch.randn(2, 3, 9, 16, device=device) for _ in range(3))
    leaf = torch.randn(1, 1, 9, 9, device=device).expand(2, 3, 9, 9).detach().requires_grad_()
    apart = leaf.detach().clone().requires_grad_()
    for bias in (leaf, apart):
        attention(q, k, v, bias=DenseBias(bias)).square().sum().backward()
    torch.testing.assert_close(leaf.grad, apart.grad)


def test_the_least_finite_number_masks(device):
    q, k, v = (torch.randn(1, 2, 5, 16, device=device) for _ in range(3))
    bias = torch.zeros(1, 1, 5, 5, device=device)
    bias[..., 3:] = torch.finfo(bias.dtype).min
    expected = attention(q, k[:, :, :3], v[:, :, :3])
    torch.testing.assert_close(attention(q, k, v, bias=DenseBias(bias)), expected)
    bias[:, :, 1] = torch.finfo(bias.dtype).min
    assert not attention(q, k, v, bias=DenseBias(bias))[:, :, 1].any()


def test_no_segment_at_all(device):
    x, ends = torch.randn(0, 2, 16, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    assert attention(x, x, x, cu_seqlens_q=ends, cu_seqlens_k=ends).shape == (0, 2, 16)
