"""Where the attention launchers decline, copy or return early: strides, sizes of a grid, nothing to do."""

import random

import pytest
import torch

from fat5.model import ops_attention_backward
from fat5.model.ops_attention import attention
from fat5.model.ops_attention_backward_hopper_launch import hopper_config, readable_tiles
from fat5.model.ops_attention_bias import BiasArgs, DenseBias, T5Bias
from fat5.model.ops_attention_forward import head_rows
from fat5.model.ops_attention_problem import Problem, addressable


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("which", range(4))
def test_the_copy_engine_is_given_no_stride_of_zero(axis, which):
    tensors = [torch.zeros(2, 40, 3, 64, dtype=torch.bfloat16) for _ in range(4)]
    problem = Problem(False, 1.0, 0, 0.0, 40, 40)
    assert hopper_config(*tensors, BiasArgs(), problem, 90) is not None
    tensors[which] = tensors[which].narrow(axis, 0, 1).expand(2, 40, 3, 64)
    assert hopper_config(*tensors, BiasArgs(), problem, 90) is None
    if axis == 1:
        assert head_rows(tensors[which]) is None


@pytest.mark.gpu
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("which", range(4))
def test_expanded_inputs(device, axis, which):
    """Queries, keys, values or the output's gradient, the same in all batch rows, heads or places."""
    tensors = [torch.randn(2, 2, 17, 64, device=device).to(torch.bfloat16) for _ in range(4)]
    results = []
    for copy in (True, False):
        expanded = tensors[which].narrow(axis, 0, 1).expand_as(tensors[which])
        given = [*tensors[:which], expanded.contiguous() if copy else expanded, *tensors[which + 1 :]]
        q, k, v = (x.detach().requires_grad_() for x in given[:3])
        out = attention(q, k, v, scale=0.125)
        results.append([out, *torch.autograd.grad(out, (q, k, v), given[3])])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_heads_too_far_apart_are_copied():
    near, far = (torch.empty((1, 1, 3, 16), device="meta").as_strided((1, 1, 3, 16), (1, 16, n, 1)) for n in (1, 2**30))
    assert addressable(near) is near
    assert addressable(far).stride(2) == 16
    columns = torch.empty(1, 5, 3, 16, device="meta").transpose(1, 3)
    assert addressable(columns).stride(-1) == 1


@pytest.mark.parametrize(("lq", "lk"), [(0, 5), (5, 0)])
@pytest.mark.parametrize("dense", [False, True])
def test_nothing_to_attend_launches_nothing(device, monkeypatch, lq, lk, dense):
    q, k = (torch.randn(2, 2, n, 16, device=device, requires_grad=True) for n in (lq, lk))
    bias = torch.randn((1, 2, lq, lk) if dense else (8, 2), device=device, requires_grad=True)
    out = attention(q, k, k, bias=DenseBias(bias) if dense else T5Bias(bias, True, 20))
    assert not out.any()
    monkeypatch.delattr(ops_attention_backward, "delta_kernel")
    for gradient, leaf in zip(torch.autograd.grad(out.sum(), (q, k, bias)), (q, k, bias), strict=True):
        assert gradient.shape == leaf.shape
        assert not gradient.any()


def test_too_many_rows_for_a_grid_are_refused(device):
    x = torch.zeros(65536, 1, 1, 16, device=device)
    with pytest.raises(ValueError, match="at most 65535 rows or segments in one call, got 65536"):
        attention(x, x, x, dropout_p=0.1)


@pytest.mark.parametrize("packed", [True, False])
def test_what_the_hopper_kernels_copy_ahead_exists(packed):
    """The tiles of lse and delta that the programs of `fused_backward_kernel` and `near_sums_kernel` copy, by their own
    arithmetic, over segments of random lengths, short ones behind long ones and empty ones among them.
    """
    chance, block_m, block_n = random.Random(0), 64, 128
    for _ in range(300):
        lengths = [chance.choice([0, 1, 2, 63, 64, 65, 127, 128, 129, chance.randrange(600)]) for _ in range(9)]
        keys = lengths if chance.random() < 0.5 else [chance.randrange(600) for _ in lengths]
        if not packed:
            lengths, keys = [max(lengths)] * 9, [max(keys)] * 9
        max_q, max_k, rows = max(lengths), max(keys), sum(lengths)
        starts = [sum(lengths[:s]) for s in range(10)]
        in_pack = rows // block_m + 9
        there = readable_tiles(in_pack if packed else 9 * -(-max_q // block_m), block_m, max_k)
        copied = []
        for s, (length, its_keys) in enumerate(zip(lengths, keys, strict=True)):
            first_tile = starts[s] // block_m + s if packed else s * -(-max_q // block_m)
            for n0 in range(0, max_k, block_n):
                for first_m in (0, n0 // block_m * block_m):  # not causal, causal
                    count = -(-(length - first_m) // block_m) if n0 < its_keys else 0
                    copied.append(first_tile + first_m // block_m + max(count, 0))
            if packed:  # blocks of block_n queries, each segment starting one
                items = starts[s + 1] // block_n + s + 1 - (starts[s] // block_n + s)
                if s == 8:
                    items = rows // block_n + 9 - (starts[s] // block_n + s)
            else:
                items = -(-max_q // block_n)
            copied += [first_tile + 2 * j + 1 for j in range(items)]
        assert max(copied) < there
