"""In forward-mode differentiation and `torch.func` the layer's operators are plain torch, with its derivatives."""

import pytest
import torch
from torch.autograd import forward_ad

from fat5.model.ops_cross_entropy import cross_entropy
from fat5.model.ops_gated_act import gated_act
from fat5.model.ops_gated_linear import gated_linear
from fat5.model.ops_linear_cross_entropy import linear_cross_entropy
from fat5.model.ops_rms_norm import add_rms_norm

FUNCTIONS = {
    "norm": lambda x: add_rms_norm(x, x.sin(), x[0], 1e-6)[0].sum(),
    "act": lambda x: gated_act(x, "gelu_new").sum(),
    "loss": lambda x: cross_entropy(x, torch.arange(3, device=x.device)).loss,
    "head": lambda x: linear_cross_entropy(x, x.cos(), torch.arange(3, device=x.device)).loss,
    "head, no reduction": lambda x: linear_cross_entropy(
        x, x.cos(), torch.arange(3, device=x.device), reduction="none"
    ).loss.sum(),
}


@pytest.fixture(params=FUNCTIONS)
def function(request):
    return FUNCTIONS[request.param]


def test_derivatives_are_those_of_reverse_mode(function, device):
    x, tangent = torch.randn(3, 8, device=device), torch.randn(3, 8, device=device)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf), leaf)  # by the kernels
    expected = (gradient * tangent).sum()
    torch.testing.assert_close(torch.func.grad(function)(x), gradient, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.func.jvp(function, (x,), (tangent,))[1], expected, rtol=1e-5, atol=1e-5)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_gated_linear(device):
    x, tangent, gate, up = (torch.randn(4, 4, device=device, dtype=torch.bfloat16) for _ in range(4))

    def function(x):
        return gated_linear(x, gate, up, "relu")

    with torch.no_grad():
        got = torch.func.jvp(function, (x,), (tangent,))[1]
        exact = torch.func.jvp(
            lambda x: (x @ gate.double().T).relu() * (x @ up.double().T), (x.double(),), (tangent.double(),)
        )[1]
    torch.testing.assert_close(got.double(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("gradients", [True, False])
def test_one_batched_argument_beside_shared_ones(gradients, device):
    """As an ensemble that differs in one weight has it."""
    x, weights, ups = (torch.randn(shape, device=device) for shape in ((4, 8), (3, 8), (3, 4, 8)))
    for run, batch in (
        (lambda weight: add_rms_norm(x, None, weight, 1e-6)[0], weights),
        (lambda up: gated_act(x, "relu", up=up), ups),
        (lambda up: gated_act(x, "gelu_new", up=up), ups),
    ):
        with torch.set_grad_enabled(gradients):
            found = torch.func.vmap(run)(batch)
        torch.testing.assert_close(found, torch.stack([run(one) for one in batch]), rtol=1e-5, atol=1e-5)
