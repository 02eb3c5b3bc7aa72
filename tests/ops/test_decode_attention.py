"""Attention of one query a row against its formula in fp64."""

import pytest
import torch
from attention_oracle import assert_as_exact
from layer_oracle import OPCHECKS, poison

from fat5.model import ops_decode_attention_kernels
from fat5.model.ops_decode_attention import MAX_KEYS, decode_attention, decode_attention_serves

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def make(device, batch, heads, keys, width, dtype, bias=None):
    shapes = [(batch, heads, 1, width), (batch, heads, keys, width), (batch, heads, keys, width)]
    q, k, v = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    return q, k, v, None if bias is None else torch.randn(*bias, 1, keys, device=device).to(dtype)


def formula(q, k, v, bias, scale, dtype):
    """In a dtype, softmax in fp32 or better; zeros where all is hidden."""
    wide = torch.promote_types(dtype, torch.float32)
    scores = (q.to(dtype) @ k.to(dtype).mT).to(wide) * scale
    if bias is not None:
        scores = torch.where(bias == torch.finfo(bias.dtype).min, -torch.inf, scores + bias.to(wide))
    return scores.softmax(-1).nan_to_num(0.0).to(dtype) @ v.to(dtype)


@torch.no_grad()
def check(q, k, v, bias, scale=1.0):
    got = decode_attention(q, k, v, bias, scale)
    assert got.shape == q.shape
    exact, plain = (formula(q, k, v, bias, scale, dtype) for dtype in (torch.float64, q.dtype))
    assert_as_exact("output", got, exact, plain)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("keys", "width"), [(1, 1), (2, 16), (63, 80), (129, 64), (200, 20), (256, 128), (40, 256)])
@pytest.mark.parametrize("bias", [None, (1, 1), (2, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("programs", [1, 100])
def test_sizes_and_biases(device, dtype, keys, width, bias, programs, monkeypatch):
    poison(monkeypatch)
    monkeypatch.setattr(ops_decode_attention_kernels, "PROGRAMS", programs)  # with many the keys are shared out
    check(*make(device, 2, 3, keys, width, dtype, bias), scale=width**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("programs", [1, 100])
def test_hidden_keys_and_rows_without_any(device, dtype, programs, monkeypatch):
    monkeypatch.setattr(ops_decode_attention_kernels, "PROGRAMS", programs)
    q, k, v, bias = make(device, 3, 2, 150, 16, dtype, (3, 2))
    least = torch.finfo(dtype).min
    bias[0, :, :, :130] = least  # a whole block at the beginning
    bias[1, :, :, 5:] = least
    bias[2] = least
    got = check(q, k, v, bias)
    assert not got[2].any()
    k[1, :, 5:], v[1, :, 5:] = 7.0, -7.0
    assert torch.equal(check(q, k, v, bias), got), "what is hidden must not count"


def test_strided_inputs(device):
    joined = torch.randn(2, 1, 3, 3, 16, device=device).bfloat16()
    q = joined[:, :, 0].transpose(1, 2)
    cache = torch.randn(2, 70, 3, 32, device=device).bfloat16().transpose(1, 2)
    bias = torch.randn(2, 3, 1, 140, device=device).bfloat16()[..., ::2]
    check(q, cache[..., :16], cache[..., ::2], bias)


@torch.no_grad()
def test_a_score_that_is_not_finite_stays_in_its_row(device):
    q, k, v, bias = make(device, 3, 2, 20, 16, torch.bfloat16, (1, 2))
    q[1, 0] = float("nan")
    got = decode_attention(q, k, v, bias, 1.0)
    assert got[1, 0].isnan().all()
    assert got[[0, 2]].isfinite().all()
    assert got[1, 1].isfinite().all()


def test_what_it_does_not_serve_is_left_to_torch(device):
    q, k, v, bias = make(device, 2, 3, 20, 16, torch.float32, (2, 3))
    bias[0] = torch.finfo(torch.float32).min
    assert not decode_attention_serves(q.requires_grad_(), k, bias)
    got = decode_attention(q, k, v, bias, 0.5)
    torch.testing.assert_close(got.double(), formula(q, k, v, bias, 0.5, torch.float64), rtol=1e-4, atol=1e-5)
    assert not got[0].any()
    with torch.no_grad():
        assert decode_attention_serves(q, k, bias) == (device.type == "cpu"), "on a GPU in graphs only"
        assert decode_attention_serves(q, k, None) == (device.type == "cpu")
        assert not decode_attention_serves(q, k.repeat(1, 1, 1 + MAX_KEYS // k[..., 0].numel(), 1), None)
        assert not decode_attention_serves(q.double(), k.double(), None)
        assert not decode_attention_serves(q, k.bfloat16(), bias)
        assert not decode_attention_serves(q, k, bias.bfloat16())
        assert not decode_attention_serves(q, k[:1], bias)


@torch.no_grad()
def test_operator_is_registered_rightly_and_compiles(device):
    q, k, v, bias = make(device, 2, 3, 20, 16, torch.float32, (1, 3))
    for given in (bias, None):
        torch.library.opcheck(torch.ops.fat5.decode_attention.default, (q, k, v, given, 0.3), test_utils=OPCHECKS)
        compiled = torch.compile(decode_attention, fullgraph=True, backend="aot_eager")
        exact, plain = (formula(q, k, v, given, 0.3, dtype) for dtype in (torch.float64, q.dtype))
        assert_as_exact("compiled", compiled(q, k, v, given, 0.3), exact, plain)


def test_bad_arguments_are_named(device):
    q, k, v, bias = make(device, 2, 3, 20, 16, torch.bfloat16, (2, 3))
    for arguments, message in (
        ((k, k, v, bias), "one query"),
        ((q, k[:, 1:], v, bias), "keys and values"),
        ((q, k, v[..., 1:], bias), "keys and values"),
        ((q, k, v, bias[..., 1:]), "the bias must be"),
        ((q, k, v, bias.repeat(2, 1, 1, 1)), "the bias must be"),
        ((q, k.float(), v, bias), "query's dtype"),
        ((q, k, v, bias.float()), "query's dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_attention(*arguments, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "keys", "width"),
    [(1, 12, 80, 64), (1, 12, 5000, 64), (16, 16, 256, 64), (4, 32, 512, 128), (64, 12, 33, 80), (3, 5, 700, 256)],
)
@torch.no_grad()
def test_real_sizes_in_a_graph(device, batch, heads, keys, width, dtype):
    q, k, v, bias = make(device, batch, heads, keys, width, dtype, (batch, heads))
    bias[:, :, :, keys - keys // 3 :] = torch.finfo(dtype).min
    torch.ops.fat5.decode_attention(q, k, v, bias, 1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = decode_attention(q, k, v, bias, 1.0)
    got.fill_(float("nan"))
    graph.replay()
    exact, plain = (formula(q, k, v, bias, 1.0, dtype) for dtype in (torch.float64, q.dtype))
    assert_as_exact("output", got, exact, plain)
