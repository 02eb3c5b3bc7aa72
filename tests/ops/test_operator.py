"""Operators called directly give what the registered ones give, and are called so only where nobody watches."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fat5.model.fused_linear import SplitColumns
from fat5.model.ops_attention import attention, attention_forward
from fat5.model.ops_attention_bias import T5Bias
from fat5.model.ops_gated_act import gated_act
from fat5.model.ops_rms_norm import add_rms_norm


class Watch(TorchDispatchMode):
    """Notes the operators of this project that pass by."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fat5":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


def run_attention(x, table):
    return attention(x, x, x, bias=T5Bias(table.t(), True, 20), dropout_p=0.1)


def run_norm(x, table):
    return add_rms_norm(x, x.sin(), table[0], 1e-6, dropout_p=0.1)[0]


def run_act(x, table):
    return gated_act(x * table[0], "gelu_new", dropout_p=0.1)


@pytest.mark.parametrize("run", [run_attention, run_norm, run_act])
def test_watched_and_unwatched_calls_agree(run, device):
    leaves = torch.randn(1, 2, 19, 16, device=device), torch.randn(2, 16, device=device)
    leaves = tuple(leaf.requires_grad_() for leaf in leaves)
    results = []
    for watch in (None, Watch()):
        torch.manual_seed(5)
        with watch or torch.enable_grad():
            out = run(*leaves)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        if watch:
            assert len(watch.seen) == 2, "forward and backward pass by whoever watches"
    for direct, registered in zip(*results, strict=True):
        torch.testing.assert_close(direct, registered, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("cross", [False, True])
def test_gradients_of_one_projection_lie_side_by_side(rows, cross, device):
    heads, width = 2, 16
    parts = 2 if cross else 3
    together = torch.randn(rows, 21, parts * heads * width, device=device, requires_grad=True)
    alone = torch.randn(rows, 13, heads * width, device=device, requires_grad=True)

    def run(split):
        states = [*([alone] if cross else []), *split(together)]
        q, k, v = (x.unflatten(-1, (heads, width)).transpose(1, 2) for x in states)
        return torch.autograd.grad(attention(q, k, v).square().sum(), [together, *([alone] if cross else [])])

    passed = []

    def split_and_note(x):
        split = SplitColumns.apply(x, parts)
        for part in split:
            part.register_hook(passed.append)
        return split

    expected, got = run(lambda x: x.chunk(parts, -1)), run(split_and_note)
    assert {x.untyped_storage().data_ptr() for x in passed} == {got[0].untyped_storage().data_ptr()}, "a copy was made"
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_that_lie_elsewhere_are_copied(device):
    x = torch.randn(3, 5, 8, device=device, requires_grad=True)
    first, second = SplitColumns.apply(x, 2)
    (gradient,) = torch.autograd.grad((first * 2 + second.square()).sum(), x)
    torch.testing.assert_close(gradient, torch.cat([torch.full_like(first, 2), 2 * second], -1))


def test_calls_under_fake_tensors_launch_nothing():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(1, 19, 2, 16)
        out, lse = attention_forward(
            q, q, q, None, None, None, None, None, 0, True, 0, False, 1.0, 0, 0.0, 19, 19, False
        )
    assert out.shape == q.shape
    assert lse.shape == (2, 19)
