"""The attention kernels on a GPU: real sizes, long sums, captured graphs, repeated runs, memory around the outputs."""

import pytest
import torch
from attention_oracle import assert_as_exact, gradients, plain_attention
from test_attention import check, make, make_packed, run

from fat5.model.ops_attention import attention
from fat5.model.ops_attention_bias import T5Bias

pytestmark = pytest.mark.gpu
HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("d", [16, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_head_dims(device, dtype, d, causal):
    check(make(device, 511, d=d, dtype=dtype, causal=causal, buckets=32, max_distance=128, scale=d**-0.5))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", ["t5", "alibi", "dense", None])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_real_sizes(device, dtype, kind, causal, deterministic):
    x = make(
        device, 1023, 1100, d=64, heads=4, dtype=dtype, kind=kind, causal=causal, bidirectional=not causal, buckets=32,
        max_distance=128, scale=0.125, dense=(2, 4), lengths=[1100, 700],
    )  # fmt: skip
    check(x, deterministic=deterministic)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("kind", ["t5", "dense", None])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("length", [66, 1023])
def test_scale_of_t5(device, dtype, kind, causal, d, length):
    """Scores eight to eleven times as wide as after a division by the root of the width: rows with one heavy key."""
    check(
        make(device, length, d=d, heads=4, dtype=dtype, kind=kind, causal=causal, bidirectional=not causal, buckets=32,
             max_distance=128, dense=(1, 4))
    )  # fmt: skip


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("table", [(8, 20, True), (32, 128, True), (32, 128, False), (64, 128, True), (64, 256, True)])
@pytest.mark.parametrize(("lq", "lk", "q_offset"), [(300, 300, 0), (65, 700, 37), (700, 130, 0)])
def test_near_sums(device, d, table, lq, lk, q_offset):
    """What the fused kernel sums along diagonals, where tiles end early or start late, and lines too long for it."""
    buckets, max_distance, bidirectional = table
    check(
        make(device, lq, lk, d=d, heads=3, dtype=torch.bfloat16, buckets=buckets, max_distance=max_distance,
             bidirectional=bidirectional, causal=not bidirectional, q_offset=q_offset, scale=d**-0.5)
    )  # fmt: skip


@pytest.mark.parametrize("d", [64, 80, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_buckets_of_minus_infinity_mask(device, d, causal):
    x = make(device, 700, 300, d=d, dtype=torch.bfloat16, causal=causal, scale=d**-0.5)
    x.bias[[3, 7]] = -torch.inf
    check(x)
    assert not run(x, x.leaves())[:, :, 400:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
def test_packs_of_mixed_lengths(device, dtype, causal):
    check(
        make_packed(device, [512, 1, 0, 129, 1023, 64, 63, 300], d=64, heads=4, dtype=dtype, causal=causal, scale=0.125)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
def test_long_sums(device, dtype, causal):
    """At 8k the gradients of the far buckets are sums over tens of millions of scores."""
    check(
        make(device, 8192, d=64, heads=1, batch=1, dtype=dtype, causal=causal, bidirectional=not causal, buckets=32,
             max_distance=128, scale=0.125)
    )  # fmt: skip


def test_32k(device):
    """Rows here and there against fp64: the whole score matrix would not be quick."""
    x = make(device, 32768, d=64, heads=2, batch=1, dtype=torch.bfloat16, buckets=32, max_distance=128, scale=0.125)
    out = run(x, x.leaves())
    for first in (0, 12345, 32640):
        rows = type(x)(**(vars(x) | {"q": x.q[:, :, first : first + 128], "q_offset": first}))
        leaves = rows.leaves(torch.float64)
        assert_as_exact(
            f"rows {first}",
            out[:, :, first : first + 128],
            plain_attention(rows, leaves),
            plain_attention(rows, rows.leaves()),
        )


@pytest.mark.parametrize(("deterministic", "names"), [(True, "out dq dk dv dbias"), (False, "out dk dv dbias")])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("length", [700, 2048, "packed", "dense"])
@pytest.mark.parametrize("causal", [False, True])
def test_repeated_runs_give_the_same_bits(device, deterministic, names, d, length, causal):
    """Up to 1024 keys the fused kernel sums the near tiles as well, beyond that a kernel of its own."""
    if length == "packed":
        x = make_packed(device, [512, 1, 0, 129, 1023], d=d, heads=4, dtype=torch.bfloat16, causal=causal, scale=0.125)
    elif length == "dense":
        x = make(device, 700, d=d, heads=4, batch=4, dtype=torch.bfloat16, kind="dense", dense=(1, 4), causal=causal,
                 scale=0.125)  # fmt: skip
    else:
        x = make(device, length, d=d, heads=4, batch=4, dtype=torch.bfloat16, buckets=32, max_distance=128,
                 causal=causal, bidirectional=not causal, scale=0.125)  # fmt: skip
    grad = torch.randn_like(x.q)

    def everything():
        leaves = x.leaves()
        out = run(x, leaves, deterministic=deterministic)
        return dict(zip(("out", "dq", "dk", "dv", "dbias"), [out, *gradients(out, leaves, grad)], strict=True))

    first = everything()
    for _ in range(3):
        again = everything()
        differing = [name for name in names.split() if not torch.equal(first[name], again[name])]
        assert not differing


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_captured_in_a_graph(device, dropout_p):
    x = make(device, 300, d=64, dtype=torch.bfloat16, buckets=32, max_distance=128)
    leaves, grad = x.leaves(), torch.randn_like(x.q)

    def step():
        out = attention(*leaves[:3], bias=T5Bias(leaves[3]), dropout_p=dropout_p)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    first = [t.clone() for t in captured]
    graph.replay()
    assert torch.equal(captured[0], first[0]) == (dropout_p == 0), "a replay drops other weights"
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(0.5)
    graph.replay()
    assert all(torch.isfinite(t).all() for t in captured)
    if dropout_p == 0:
        torch.testing.assert_close(captured, step(), rtol=2e-2, atol=2e-2)  # the gradient of q is summed in any order
        assert torch.equal(captured[0], step()[0])


def test_compiled_by_inductor(device):
    x = make(device, 200, d=64, dtype=torch.bfloat16, buckets=32, max_distance=128)
    leaves, grad = x.leaves(), torch.randn_like(x.q)

    def step(q, k, v, table):
        return attention(q * 0.5, k, v, bias=T5Bias(table), causal=True) * 2

    compiled = torch.compile(step, fullgraph=True)
    for a, b in zip(gradients(compiled(*leaves), leaves, grad), gradients(step(*leaves), leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_memory_is_linear_in_length(device):
    def peak(length):
        x = make(device, length, d=64, heads=2, batch=1, dtype=torch.bfloat16, buckets=32, max_distance=128)
        leaves, grad = x.leaves(), torch.randn_like(x.q)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients(run(x, leaves), leaves, grad)
        return torch.cuda.max_memory_allocated() - before

    peak(1024)
    fixed, short, long = peak(1024), peak(16384), peak(32768)
    assert long - fixed < 2.2 * (short - fixed)
    assert long < 32768 * 2 * 64 * 2 * 16, "a few times the size of q"


@pytest.mark.parametrize("d", [64, 80, 128])
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_outside_the_outputs_is_written(device, monkeypatch, d, packed):
    """Every allocation of the launchers lies between guards of NaN."""
    if packed:
        x = make_packed(device, [333, 0, 1, 65], [257, 3, 0, 129], d=d, dtype=torch.bfloat16)
    else:
        x = make(device, 333, 257, d=d, dtype=torch.bfloat16, buckets=32, max_distance=128)
    leaves, grad = x.leaves(), torch.randn_like(x.q)
    guards = []
    empty = torch.empty

    def guarded(*size, dtype=torch.float32, device=None, **options):
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        count = torch.Size(shape).numel()
        if not dtype.is_floating_point:
            return empty(shape, dtype=dtype, device=device)
        memory = torch.full((count + 2048,), float("nan"), dtype=dtype, device=device)
        guards.append((memory[:1024], memory[1024 + count :]))
        return memory[1024 : 1024 + count].view(shape)

    monkeypatch.setattr(torch, "empty", guarded)
    monkeypatch.setattr(torch, "empty_like", lambda t, **options: guarded(t.shape, dtype=t.dtype, device=t.device))
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: guarded(*size, **options).zero_())
    results = gradients(run(x, leaves), leaves, grad)
    torch.cuda.synchronize()
    monkeypatch.undo()
    assert guards
    assert all(torch.isnan(g).all() for pair in guards for g in pair)
    assert all(torch.isfinite(r).all() for r in results)
