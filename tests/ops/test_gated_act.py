"""Activation, gate and dropout against their formulas in fp64."""

import math

import pytest
import torch
from layer_oracle import OPCHECKS, check, poison
from torch.nn import functional as F
from transformers.activations import ACT2FN

from fat5.model import ops_gated_act
from fat5.model.ops_gated_act import ACTIVATIONS, gated_act, reference_gated_act
from fat5.model.ops_philox import elementwise_dropout

FORMULAS = {
    "gelu_new": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x * torch.sigmoid(x),
}
PLAIN = {
    "gelu_new": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "gelu": torch.nn.functional.gelu,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
}


def formula(act, x, up, p=0.0, seed=None):
    y = (FORMULAS if x.dtype == torch.float64 else PLAIN)[act](x)
    y = y if up is None else y * up
    return [elementwise_dropout(y, p, seed) if p else y]


@pytest.mark.parametrize("act", list(FORMULAS))
@pytest.mark.parametrize("form", ["plain", "pair", "joined"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_and_forms(device, act, form, dtype):
    x, up = (2 * torch.randn(3, 5, 45, device=device).to(dtype) for _ in range(2))
    if form == "plain":
        check(lambda t: [gated_act(t[0], act, gated=False)], lambda t: formula(act, t[0], None), [x])
    elif form == "pair":
        check(lambda t: [gated_act(t[0], act, up=t[1])], lambda t: formula(act, *t), [x, up])
    else:
        joined = torch.cat([x, up], dim=-1)
        check(lambda t: [gated_act(t[0], act)], lambda t: formula(act, *t[0].chunk(2, -1)), [joined])


@pytest.mark.parametrize("act", list(FORMULAS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_in_plain_torch_the_same_bits_with_gradients_or_without(act, dtype):
    """As `transformers` rounds, whose activations are the oracle; the arguments stay as they are."""
    joined = (3 * torch.randn(5, 2 * 77)).to(dtype)
    joined[0, :6] = torch.tensor([0.0, -0.0, 1e4, -1e4, torch.inf, torch.nan])
    x, up = joined.chunk(2, -1)
    before = joined.clone()
    for first, second in ((joined, None), (x, up), (x.contiguous(), up.contiguous()), (x[:, :1].expand(5, 77), up)):
        with_gradients = reference_gated_act(first, second, ACTIVATIONS[act], True, 0.0, None)
        with torch.no_grad():
            without = reference_gated_act(first, second, ACTIVATIONS[act], True, 0.0, None)
        expected = ACT2FN[act](first if second is not None else x) * up
        for found in (with_gradients, without):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(joined, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("width", [1, 64, 2049])
def test_widths_and_dropout(device, width):
    seed = torch.tensor([77], device=device)
    x, up = (torch.randn(4, width, device=device).half() for _ in range(2))
    check(
        lambda t: [gated_act(t[0], "silu", up=t[1], dropout_p=0.4, seed=seed)],
        lambda t: formula("silu", *t, 0.4, seed),
        [x, up],
    )


def test_strided_inputs(device):
    wide = torch.randn(6, 90, device=device)

    def halves(x):
        return x[:, :40], x[:, 50:]

    check(lambda t: [gated_act(halves(t[0])[0], "gelu", up=halves(t[0])[1])], lambda t: formula("gelu", *halves(t[0])),
          [wide])  # fmt: skip
    check(lambda t: [gated_act(t[0].T, "gelu")], lambda t: formula("gelu", *t[0].T.chunk(2, -1)), [wide])


@pytest.mark.parametrize("act", list(FORMULAS))
def test_extreme_values_propagate_as_in_torch(device, act):
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1e4, -1e4, 0.0]], device=device)
    up = torch.full_like(x, 2.0)
    for gate, other in ((x, up), (up, x)):
        # in fp64: on some CPUs oneDNN makes gelu(inf) NaN in fp32
        expected = PLAIN[act](gate.double()) * other
        torch.testing.assert_close(gated_act(gate, act, up=other), expected.float(), equal_nan=True)


@pytest.mark.parametrize("gradient", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("gated", [False, True])
def test_relu_has_no_gradient_where_it_is_zero_whatever_comes_in(device, gated, gradient):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0, -1.0, 0.0, -0.0], device=device)
    found = []
    for function in (gated_act_of, formula):
        leaves = [y.clone().requires_grad_() for y in (x, torch.full_like(x, 2.0))[: 1 + gated]]
        output = function("relu", leaves[0], leaves[1] if gated else None)[0]
        found.append(torch.autograd.grad(output, leaves, torch.full_like(x, gradient)))
    assert (found[1][0][x <= 0] == 0).all()
    torch.testing.assert_close(*found, equal_nan=True)


def gated_act_of(act, x, up):
    return [gated_act(x, act, up=up, gated=up is not None)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.0])
def test_dropping_what_is_not_finite_gives_what_it_gives_in_torch(device, value):
    """The same values as torch's own dropout, whose mask is another: what is not finite is NaN when dropped."""
    seed, found = torch.tensor([5], device=device), []
    for ours in (True, False):
        x = torch.full((1, 512), value, device=device, requires_grad=True)
        y = gated_act(x, "relu", gated=False, dropout_p=0.5, seed=seed) if ours else F.dropout(x, 0.5)
        y.backward(torch.full_like(y, value))
        found.append([values(y), values(x.grad)])
    assert found[0] == found[1]


def values(x):
    """The values in a tensor; -1 stands for NaN, which does not equal itself."""
    return set(x.detach().nan_to_num(-1.0, posinf=torch.inf).flatten().tolist())


def test_operator_is_registered_rightly_and_writes_everything(device, monkeypatch):
    x, up = (torch.randn(3, 46, device=device, requires_grad=True) for _ in range(2))
    seed = torch.tensor([3], device=device)
    for arguments in ((x, up, seed, 0, True, 0.5), (x, None, None, 1, False, 0.0)):
        torch.library.opcheck(torch.ops.fat5.gated_act_forward.default, arguments, test_utils=OPCHECKS)
    poison(monkeypatch)
    check(lambda t: [gated_act(t[0], "relu")], lambda t: formula("relu", *t[0].chunk(2, -1)), [x])


def test_only_the_inputs_are_kept(device):
    x = torch.randn(3, 46, device=device, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated_act(x, "gelu", dropout_p=0.1)
    assert sum(t.numel() for t in kept if t.is_floating_point()) == x.numel()


def test_bad_arguments_are_named(device):
    x = torch.randn(3, 45, device=device)
    for arguments, message in (
        ({"act": "tanh"}, "act must be one of"),
        ({"act": "relu"}, "even"),
        ({"act": "relu", "up": x[:2]}, "like x"),
        ({"act": "relu", "up": x.half()}, "like x"),
        ({"act": "relu", "gated": False, "dropout_p": 1.0}, "dropout_p"),
    ):
        with pytest.raises(ValueError, match=message):
            gated_act(x, **arguments)


def test_the_kernel_runs(device, monkeypatch):
    monkeypatch.setattr(ops_gated_act, "reference_gated_act", None)
    gated_act(torch.randn(3, 46, device=device), "relu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [1024, 2816, 5120, 10240])
@pytest.mark.parametrize("act", list(FORMULAS))
def test_real_sizes(device, width, dtype, act):
    seed = torch.tensor([11], device=device)
    check(
        lambda t: [gated_act(t[0], act, dropout_p=0.1, seed=seed)],
        lambda t: formula(act, *t[0].chunk(2, -1), 0.1, seed),
        [torch.randn(3, 555, 2 * width, device=device).to(dtype)],
    )
