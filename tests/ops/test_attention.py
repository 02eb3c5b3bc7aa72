"""The attention operator against fp64: outputs and every gradient, over kinds of bias, layouts, lengths and dtypes."""

import pytest
import torch
from attention_oracle import Inputs, assert_as_exact, gradients, plain_attention

from fat5.model import ops_attention_backward, ops_attention_forward
from fat5.model.ops_attention import attention
from fat5.model.ops_attention_bias import AlibiBias, DenseBias, T5Bias
from fat5.model.ops_attention_configs import BackwardConfig, ForwardConfig


def bias_of(x: Inputs, leaf: torch.Tensor | None):
    if x.kind == "t5":
        return T5Bias(leaf, x.bidirectional, x.max_distance)
    return {"alibi": AlibiBias, "dense": DenseBias}[x.kind](leaf) if x.kind else None


def run(x: Inputs, leaves: list[torch.Tensor], **options) -> torch.Tensor:
    bias = bias_of(x, leaves[3] if len(leaves) > 3 else x.bias)
    return attention(
        *leaves[:3], bias=bias, causal=x.causal, scale=x.scale, cu_seqlens_q=x.cu_q, cu_seqlens_k=x.cu_k,
        key_lengths=x.key_lengths, q_offset=x.q_offset, **options,
    )  # fmt: skip


def check(x: Inputs, **options) -> None:
    """Output and gradients of `x` as accurate as they should be."""
    exact_leaves, plain_leaves, leaves = x.leaves(torch.float64), x.leaves(), x.leaves()
    exact = plain_attention(x, exact_leaves)
    plain = plain_attention(x, plain_leaves)
    grad = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(x.q)
    out = run(x, leaves, **options)
    assert_as_exact("output", out, exact, plain)
    names = ("dq", "dk", "dv", "dbias")[: len(leaves)]
    for name, *three in zip(
        names,
        gradients(out, leaves, grad),
        gradients(exact, exact_leaves, grad),
        gradients(plain, plain_leaves, grad),
        strict=True,
    ):
        assert_as_exact(name, *three)


def make(
    device, lq, lk=None, d=16, kind="t5", heads=2, batch=2, dtype=torch.float32, buckets=8, max_distance=20,
    dense=(2, 2), lengths=None, **options,
) -> Inputs:  # fmt: skip
    """Random inputs of a padded problem."""
    lk = lq if lk is None else lk
    q, k, v = (torch.randn(batch, heads, n, d, dtype=dtype, device=device) for n in (lq, lk, lk))
    bias = None
    if kind == "t5":
        bias = torch.randn(buckets, heads, dtype=dtype, device=device)
    elif kind == "alibi":
        bias = torch.rand(heads, device=device)
    elif kind == "dense":
        bias = torch.randn(*dense, lq, lk, dtype=dtype, device=device)
    if lengths is not None:
        options["key_lengths"] = torch.tensor(lengths, dtype=torch.int32, device=device)
    return Inputs(q, k, v, bias, kind, max_distance=max_distance, **options)


def make_packed(device, lengths_q, lengths_k=None, d=16, heads=2, dtype=torch.float32, kind="t5", **options) -> Inputs:
    """Random inputs of a packed problem."""
    lengths_k = lengths_q if lengths_k is None else lengths_k
    cu_q, cu_k = (
        torch.tensor([0, *n], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
        for n in (lengths_q, lengths_k)
    )
    q, k, v = (torch.randn(int(c[-1]), heads, d, dtype=dtype, device=device) for c in (cu_q, cu_k, cu_k))
    bias = torch.randn(8, heads, dtype=dtype, device=device) if kind == "t5" else torch.rand(heads, device=device)
    return Inputs(q, k, v, bias if kind else None, kind, max_distance=20, cu_q=cu_q, cu_k=cu_k, **options)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129])
def test_lengths(device, length, causal):
    check(make(device, length, batch=1, heads=1, causal=causal, bidirectional=not causal))


@pytest.mark.parametrize(("length", "causal"), [(511, False), (1023, True)])
def test_many_tiles(device, length, causal):
    check(make(device, length, batch=1, heads=1, dtype=torch.bfloat16, causal=causal, bidirectional=not causal))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_scale_of_t5(device, dtype, causal):
    """Wide heads whose scores nothing divides: rows with one heavy key."""
    check(make(device, 66, d=64, batch=1, dtype=dtype, causal=causal, bidirectional=not causal))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["t5", "dense", None])
@pytest.mark.parametrize(
    ("lq", "lk", "d", "causal"), [(2, 2, 64, True), (2, 2, 128, False), (3, 1, 64, False), (1, 3, 64, False)]
)
def test_few_keys_at_the_scale_of_t5(device, dtype, kind, lq, lk, d, causal):
    """Gradients that are small differences, of a sum over the row that has to be as exact as what it is taken from."""
    for seed in range(5):
        torch.manual_seed(seed)
        check(make(device, lq, lk, d=d, batch=1, heads=1, dtype=dtype, kind=kind, dense=(1, 1), causal=causal,
                   bidirectional=not causal), deterministic=seed % 2 == 1)  # fmt: skip


@pytest.mark.parametrize("kind", ["t5", "alibi", "dense", None])
@pytest.mark.parametrize(("lq", "lk", "causal"), [(40, 70, False), (70, 40, False), (33, 66, True), (66, 33, True)])
def test_kinds_of_bias_on_unequal_lengths(device, kind, lq, lk, causal):
    check(make(device, lq, lk, batch=1, kind=kind, dense=(1, 2), causal=causal, scale=0.5))


@pytest.mark.parametrize("dense", [(1, 1), (1, 2), (2, 1)])
def test_broadcast_dense_bias_gradient_is_summed(device, dense):
    check(make(device, 40, 36, kind="dense", dense=dense))


def test_expanded_dense_bias(device):
    x = make(device, 20, kind="dense", dense=(1, 2))
    leaf = x.bias.clone().requires_grad_()
    other = x.bias.clone().requires_grad_()
    grad = torch.randn_like(x.q)
    attention(x.q, x.k, x.v, bias=DenseBias(leaf.expand(2, 2, 20, 20))).backward(grad)
    attention(x.q, x.k, x.v, bias=DenseBias(other)).backward(grad)
    torch.testing.assert_close(leaf.grad, other.grad)


@pytest.mark.parametrize(
    ("buckets", "max_distance", "bidirectional"),
    [(8, 20, True), (8, 20, False), (32, 128, True), (32, 128, False), (64, 256, True), (32, 20, False)],
)
def test_bias_tables(device, buckets, max_distance, bidirectional):
    check(make(device, 260, batch=1, heads=1, buckets=buckets, max_distance=max_distance, bidirectional=bidirectional))


def test_buckets_of_minus_infinity_mask(device):
    """Queries that see keys in the last block alone, and such that see none."""
    x = make(device, 130, 70, batch=1, heads=1)
    x.bias[[3, 7]] = -torch.inf  # the farthest, before the query and after it
    check(x)
    assert not run(x, x.leaves())[:, :, 100:].any()


@pytest.mark.parametrize("d", [24, 32, 64, 80, 128, 256, 1])
def test_head_dims(device, d):
    check(make(device, 34, d=d, heads=1, scale=d**-0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_half_precision(device, dtype, causal):
    check(make(device, 130, batch=1, dtype=dtype, causal=causal, scale=0.25))


def test_scale_is_not_rounded_into_a_bf16_bias(device):
    check(make(device, 66, dtype=torch.bfloat16, scale=0.3))


@pytest.mark.parametrize("kind", ["t5", None, "alibi"])
@pytest.mark.parametrize("causal", [False, True])
def test_packed(device, kind, causal):
    check(make_packed(device, [5, 0, 64, 1, 70], kind=kind, causal=causal))


def test_packed_cross_attention_with_empty_segments(device):
    check(make_packed(device, [5, 7, 0, 40, 3], [33, 0, 9, 65, 1]))


def test_packed_equals_padded(device):
    x = make_packed(device, [30, 30])
    padded = [t.unflatten(0, (2, 30)).transpose(1, 2) for t in (x.q, x.k, x.v)]
    bias = T5Bias(x.bias, True, 20)
    out = attention(*padded, bias=bias)
    packed = attention(x.q, x.k, x.v, bias=bias, cu_seqlens_q=x.cu_q, cu_seqlens_k=x.cu_k)
    torch.testing.assert_close(packed.unflatten(0, (2, 30)).transpose(1, 2), out, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["t5", "dense"])
def test_key_lengths_and_fully_masked_rows(device, kind):
    x = make(device, 40, 70, kind=kind, batch=3, dense=(3, 2), lengths=[70, 0, 33])
    check(x)
    assert not run(x, x.leaves())[1].any()


def test_rows_before_the_first_key_give_zeros(device):
    x = make(device, 20, kind="dense", causal=True)
    x.bias[:, :, 3] = -torch.inf
    leaves = x.leaves()
    out = run(x, leaves)
    assert not out[:, :, 3].any()
    dq = gradients(out, leaves, torch.randn_like(out))[0]
    assert torch.isfinite(dq).all()
    assert not dq[:, :, 3].any()


@pytest.mark.parametrize("offset", [1, 8, 37])
def test_decoding_with_a_cache(device, offset):
    """The rows of a step are those of the whole sequence."""
    x = make(device, 40, causal=True, bidirectional=False)
    whole = run(x, x.leaves())
    steps = Inputs(**(vars(x) | {"q": x.q[:, :, offset:], "q_offset": offset}))
    check(steps)
    torch.testing.assert_close(run(steps, steps.leaves()), whole[:, :, offset:], rtol=0, atol=2e-6)


@pytest.mark.parametrize("layout", ["blhd", "lbhd", "bhdl", "sliced"])
def test_strided_inputs(device, layout):
    def strided(t):
        if layout == "sliced":  # one third of a fused projection
            wide = torch.randn(t.shape[0], t.shape[2], 3, *t.shape[1::2], dtype=t.dtype, device=device)
            wide[:, :, 1] = t.transpose(1, 2)
            return wide[:, :, 1].transpose(1, 2)
        order = {"blhd": (0, 2, 1, 3), "lbhd": (2, 0, 1, 3), "bhdl": (0, 1, 3, 2)}[layout]
        back = [order.index(axis) for axis in range(4)]
        return t.permute(order).contiguous().permute(back)

    x = make(device, 40, d=32, kind=None)
    x.q, x.k, x.v = strided(x.q), strided(x.k), strided(x.v)
    assert [leaf.stride() for leaf in x.leaves()] == [t.stride() for t in (x.q, x.k, x.v)]
    check(x)


@pytest.mark.parametrize("kind", ["t5", "dense", None])
def test_deterministic_mode(device, kind):
    x = make(device, 70, 90, kind=kind)
    check(x, deterministic=True)


def test_bias_gradient_can_be_left_out(device):
    x = make(device, 40)
    leaves = x.leaves()
    leaves[3] = leaves[3].detach()
    wanted = x.leaves()
    grad = torch.randn_like(x.q)
    for a, b in zip(
        gradients(run(x, leaves), leaves[:3], grad), gradients(run(x, wanted), wanted[:3], grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["t5", "dense"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_no_kernel_runs_for_a_bias_that_does_not_learn(device, monkeypatch, kind, deterministic):
    x = make(device, 20, kind=kind, heads=1, batch=1, dense=(1, 1))
    for name in ("_line_gradient", "dense_gradient_kernel", "hopper_line_gradient", "near_sums_of"):
        monkeypatch.delattr(ops_attention_backward, name)
    leaves = x.leaves()
    out = run(x, [*leaves[:3], leaves[3].detach()], deterministic=deterministic)
    gradients(out, leaves[:3], torch.randn_like(x.q))
    with pytest.raises(NameError):
        gradients(run(x, leaves, deterministic=deterministic), leaves, torch.randn_like(x.q))


@pytest.mark.parametrize(("block_m", "block_n"), [(16, 64), (64, 16), (64, 32)])
def test_tile_shapes(device, monkeypatch, block_m, block_n):
    """The tables of configurations may name tiles of any shape."""
    monkeypatch.setattr(ops_attention_forward, "forward_config", lambda *_: ForwardConfig(block_m, block_n, 4, 1))
    monkeypatch.setattr(ops_attention_backward, "backward_config", lambda *_: BackwardConfig(block_m, block_n, 4, 1))
    for causal in (False, True):
        check(make(device, 90, 70, batch=1, heads=1, causal=causal))
