"""Linear layers whose input is computed again in backward: against fp64, and bit by bit against keeping it."""

import pytest
import torch
from layer_oracle import check, poison
from torch.nn import functional as F

from fat5.model.ops_gated_act import gated_act
from fat5.model.ops_philox import elementwise_dropout
from fat5.model.ops_rms_norm import add_rms_norm
from fat5.model.recomputed_linear import gated_act_linear, norm_linear

EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def seeded(monkeypatch, device):
    """The seed that every dropout of a test draws."""
    seed = torch.tensor([91], device=device)
    monkeypatch.setattr("fat5.model.recomputed_linear.draw_seed", lambda p, device: seed if p else None)
    return seed


def norm_inputs(device, dtype, branch=True, widths=(5, 17, 1), hidden_dtype=None):
    hidden = torch.randn(3, 7, 24, device=device).to(hidden_dtype or dtype)
    branches = [torch.randn(3, 7, 24, device=device).to(dtype)] * branch
    weights = [torch.randn(width, 24, device=device).to(dtype) for width in widths]
    return [hidden, *branches, torch.randn(24, device=device).to(dtype), *weights]


def run_norm(leaves, branch=True, p=0.0):
    hidden, *rest = leaves
    branch = rest.pop(0) if branch else None
    return norm_linear(hidden, branch, rest[0], EPS, p, rest[1:])


def norm_formula(leaves, branch=True, p=0.0, seed=None):
    hidden, *rest = leaves
    if branch:
        added = rest.pop(0)
        hidden = hidden + (elementwise_dropout(added, p, seed) if p else added)
    weight, *weights = rest
    normed = (hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + EPS) * weight).to(weight.dtype)
    return F.linear(normed, torch.cat(weights)), hidden


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("branch", [True, False])
def test_norm_and_linear(device, dtype, branch):
    check(lambda x: run_norm(x, branch), lambda x: norm_formula(x, branch), norm_inputs(device, dtype, branch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_with_dropout_and_wide_residual(device, dtype, seeded):
    inputs = norm_inputs(device, dtype, widths=(9,), hidden_dtype=torch.float32)
    check(lambda x: run_norm(x, p=0.3), lambda x: norm_formula(x, p=0.3, seed=seeded), inputs)


def act_formula(leaves, gated, p=0.0, seed=None):
    x, *up, weight = leaves
    if gated and not up:
        x, *up = x.chunk(2, -1)
    y = F.gelu(x, approximate="tanh") * (up[0] if up else 1)
    return [F.linear(elementwise_dropout(y, p, seed) if p else y, weight)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["plain", "pair", "joined"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_activation_and_linear(device, dtype, form, p, seeded):
    gated, up = form != "plain", form == "pair"
    x = torch.randn(3, 7, 90 if form == "joined" else 45, device=device).to(dtype)
    inputs = [x, *[torch.randn_like(x)] * up, torch.randn(11, 45, device=device).to(dtype)]
    check(
        lambda t: [gated_act_linear(t[0], t[1] if up else None, "gelu_new", gated, p, t[-1])],
        lambda t: act_formula(t, gated, p, seeded),
        inputs,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_keeping_the_input(device, dtype, monkeypatch, seeded):
    poison(monkeypatch)
    leaves = [x.requires_grad_() for x in norm_inputs(device, dtype, widths=(90,))]
    second = torch.randn(24, 45, device=device).to(dtype).requires_grad_()
    results = []
    for recompute in (True, False):
        hidden, branch, weight, first = leaves
        if recompute:
            x, total = norm_linear(hidden, branch, weight, EPS, 0.3, [first])
            y = gated_act_linear(x, None, "gelu_new", True, 0.3, second)
        else:
            normed, total = add_rms_norm(hidden, branch, weight, EPS, dropout_p=0.3, seed=seeded)
            y = F.linear(gated_act(F.linear(normed, first), "gelu_new", dropout_p=0.3, seed=seeded), second)
        results.append((y, total, *torch.autograd.grad((y + total).float().sin().sum(), [*leaves, second])))
    for got, kept in zip(*results, strict=True):
        if got.shape in (leaves[3].shape, second.shape):  # a weight's gradient, which a GPU may sum in another order
            assert (got - kept).abs().max() <= 8 * torch.finfo(dtype).eps * kept.abs().max()
        else:
            assert torch.equal(got, kept)


def test_inputs_are_not_kept(device):
    leaves = [x.requires_grad_() for x in norm_inputs(device, torch.float32, widths=(90,))]
    weight = torch.randn(24, 45, device=device, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x, total = run_norm(leaves)
        gated_act_linear(x, None, "silu", True, 0.0, weight)
    kept = {t.data_ptr() for t in kept if t.shape[:2] == (3, 7)}
    assert kept == {x.data_ptr(), total.data_ptr()}


@pytest.mark.parametrize("frozen", [[0, 1], [2], [3, 4, 5], [0, 1, 2], [4]])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(device, frozen):
    inputs = norm_inputs(device, torch.float32)
    everything = [x.clone().requires_grad_() for x in inputs]
    some = [x.clone().requires_grad_(i not in frozen) for i, x in enumerate(inputs)]
    for leaves in (everything, some):
        output, total = run_norm(leaves)
        (output.square().sum() + total.sum()).backward()
    for index, (leaf, whole) in enumerate(zip(some, everything, strict=True)):
        assert leaf.grad is None if index in frozen else torch.equal(leaf.grad, whole.grad)
    inner = torch.randn(4, 22, device=device, requires_grad=True)
    gated_act_linear(inner, None, "relu", True, 0.0, torch.randn(3, 11, device=device)).sum().backward()
    assert inner.grad.isfinite().all()


def test_one_output_alone_may_be_used_and_no_rows(device):
    leaves = [x.requires_grad_() for x in norm_inputs(device, torch.float32)]
    _, total = run_norm(leaves)
    gradients = torch.autograd.grad(total.sum(), leaves, allow_unused=True)
    assert torch.equal(gradients[0], torch.ones_like(leaves[0]))
    assert torch.equal(gradients[1], torch.ones_like(leaves[1]))
    assert all(gradient is None or not gradient.any() for gradient in gradients[2:])
    empty = [leaves[0][:0].detach().requires_grad_(), leaves[1][:0].detach().requires_grad_(), *leaves[2:]]
    output, _ = run_norm(empty)
    assert output.shape == (0, 7, 23)
    assert not any(gradient.any() for gradient in torch.autograd.grad(output.sum(), empty))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_sizes(device, dtype, seeded):
    inputs = [
        torch.randn(4099, 768, device=device).to(dtype),
        torch.randn(4099, 768, device=device).to(dtype),
        torch.randn(768, device=device).to(dtype),
        *((torch.randn(n, 768, device=device) / 28).to(dtype) for n in (768, 2048)),
    ]
    check(lambda x: run_norm(x, p=0.1), lambda x: norm_formula(x, p=0.1, seed=seeded), inputs)
    x = torch.randn(4099, 4096, device=device).to(dtype)
    check(
        lambda t: [gated_act_linear(t[0], None, "gelu_new", True, 0.1, t[1])],
        lambda t: act_formula(t, True, 0.1, seeded),
        [x, (torch.randn(768, 2048, device=device) / 45).to(dtype)],
    )
