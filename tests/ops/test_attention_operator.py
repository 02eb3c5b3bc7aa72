"""The attention operator as torch sees it: registration, compilation, recomputation, what it refuses."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fat5.model import ops_attention_backward
from fat5.model.ops_attention import attention
from fat5.model.ops_attention_bias import AlibiBias, DenseBias, T5Bias
from fat5.model.ops_attention_configs import BACKWARD_SM90_FUSED
from fat5.model.position_alibi import alibi_slopes


@pytest.fixture
def leaves(device):
    q, k, v = (torch.randn(1, 2, 33, 16, device=device, requires_grad=True) for _ in range(3))
    return q, k, v, torch.randn(8, 2, device=device, requires_grad=True)


def operands(q, k, v, bias, kind, cu=None):
    """Arguments of the registered operator for `[B, H, L, D]` tensors."""
    q, k, v = (x.detach().transpose(1, 2).contiguous().requires_grad_(x.requires_grad) for x in (q, k, v))
    return (q, k, v, bias, cu, cu, None, None, kind, True, 20, False, 0.5, 0, 0.0, 33, 33, False)


@pytest.mark.parametrize("kind", ["t5", "dense", "none", "packed"])
def test_opcheck(leaves, kind):
    q, k, v, table = leaves
    cu = torch.tensor([0, 13, 33], dtype=torch.int32, device=q.device) if kind == "packed" else None
    bias = {"dense": torch.randn(1, 2, 33, 33, device=q.device, requires_grad=True), "none": None}.get(kind, table)
    torch.library.opcheck(
        torch.ops.fat5.attention_forward.default, operands(q, k, v, bias, {"dense": 3, "none": 0}.get(kind, 1), cu)
    )


def test_compiles_into_one_graph(leaves):
    def step(q, k, v, table):
        return attention(q * 2, k, v, bias=T5Bias(table, True, 20), causal=True).sin()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grad = torch.randn_like(leaves[0])
    expected, got = step(*leaves), compiled(*leaves)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_packed_with_given_lengths(leaves):
    q, k, v = (x[0].transpose(0, 1).detach() for x in leaves[:3])
    cu = torch.tensor([0, 13, 33], dtype=torch.int32, device=q.device)

    def step(q, k, v, cu):
        return attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=20, max_seqlen_k=20)

    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v, cu), step(q, k, v, cu))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_recomputation_gives_the_same_gradients(leaves, dropout_p):
    def step(q, k, v, table):
        return attention(q, k, v, bias=T5Bias(table, True, 20), dropout_p=dropout_p)

    torch.manual_seed(3)
    expected = torch.autograd.grad(step(*leaves).square().sum(), leaves)
    torch.manual_seed(3)
    got = torch.autograd.grad(checkpoint(step, *leaves, use_reentrant=False).square().sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_with_a_table_in_fp32(leaves):
    with torch.autocast(leaves[0].device.type, torch.bfloat16):
        q, k, v = (torch.nn.functional.linear(x, torch.eye(16, device=x.device)) for x in leaves[:3])
        out = attention(q, k, v, bias=T5Bias(leaves[3], True, 20))
    assert out.dtype == torch.bfloat16
    assert torch.autograd.grad(out.sum(), leaves[3])[0].dtype == torch.float32


def test_alibi_in_inference_mode_and_then_in_training(device):
    q = torch.randn(1, 5, 9, 16, device=device, requires_grad=True)  # 5 heads: slopes asked for nowhere else

    def step():
        return attention(q, q, q, bias=AlibiBias(alibi_slopes(5, q.device))).square().sum()

    with torch.inference_mode():
        step()
    step().backward()
    assert q.grad.any()


def test_second_derivatives_are_refused(leaves):
    q, k, v, _ = leaves
    (first,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


def test_function_transforms_are_refused(leaves):
    q, k, v = (x.detach() for x in leaves[:3])

    def loss(x):
        return attention(x, k, v).sum()

    for transformed in (
        lambda: torch.func.grad(loss)(q),
        lambda: torch.func.vmap(loss)(q[None]),
        lambda: torch.func.jvp(loss, (q,), (q,)),
        lambda: torch.autograd.functional.jacobian(lambda x: attention(x, k, v)[0, 0, 0], q, vectorize=True),
    ):
        with pytest.raises(NotImplementedError, match="reverse-mode autograd of one gradient only"):
            transformed()
    table = leaves[3].detach()
    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="reverse-mode"):
            loss(torch.autograd.forward_ad.make_dual(q, q))
        with pytest.raises(NotImplementedError, match="reverse-mode"):
            attention(q, k, v, bias=T5Bias(torch.autograd.forward_ad.make_dual(table, table), True, 20))


@pytest.mark.parametrize("kind", ["t5", "packed", "dense"])
def test_fresh_outputs_are_written_everywhere(device, kind, monkeypatch):
    """Memory that the launchers allocate starts as NaN, and none of it comes out."""
    dtype = torch.float32 if kind == "t5" else torch.bfloat16
    shape, cu = ((33, 2, 16), {}) if kind == "packed" else ((1, 2, 33, 16), {})
    if kind == "packed":
        ends = torch.tensor([0, 13, 13, 33], dtype=torch.int32, device=device)
        cu = {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
    leaves = [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]
    bias_shape = (1, 2, 33, 33) if kind == "dense" else (8, 2)
    leaves.append(torch.randn(bias_shape, dtype=dtype, device=device, requires_grad=True))
    bias = DenseBias(leaves[3]) if kind == "dense" else T5Bias(leaves[3], True, 20)
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(allocate):
        def allocate_poisoned(*args, **options):
            fresh = allocate(*args, **options)
            return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

        return allocate_poisoned

    def everything(**options):
        out = attention(*leaves[:3], bias=bias, **cu, **options)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    for options in ({"deterministic": True}, {"causal": True, "deterministic": True}, {}):
        expected = everything(**options)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", poisoned(empty))
            patch.setattr(torch, "empty_like", poisoned(empty_like))
            for a, b in zip(everything(**options), expected, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_dtype_is_not_that_of_statistics(device, monkeypatch, dtype):
    """What the fused kernel for sm_90 reads as fp32 is that, whatever `torch.set_default_dtype` says."""
    q = torch.randn(1, 1, 70, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
    out = attention(q, q, q).sum()
    seen = []
    monkeypatch.setattr(ops_attention_backward, "hopper_config", lambda *_: BACKWARD_SM90_FUSED[64])
    monkeypatch.setattr(ops_attention_backward, "launch_hopper", lambda *operands: seen.extend(operands[5:7]))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        out.backward()
    finally:
        torch.set_default_dtype(before)
    assert [x.dtype for x in seen] == [torch.float32] * 2
