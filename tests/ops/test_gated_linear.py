"""The gated feed-forward's first half in one kernel, without gradients, against its formula in fp64."""

import pytest
import torch
from attention_oracle import assert_as_exact
from layer_oracle import OPCHECKS, poison
from torch.nn import functional as F

from fat5.model.ops_gated_linear import gated_linear, gated_linear_serves

DTYPES = [torch.bfloat16, torch.float16]
ACTS = {
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


def make(device, shape, features, dtype):
    x = torch.randn(*shape, device=device).to(dtype)
    return x, *((torch.randn(features, shape[-1], device=device) / shape[-1] ** 0.5).to(dtype) for _ in range(2))


def formula(x, gate, up, act):
    return ACTS[act](x @ gate.T) * (x @ up.T)


@torch.no_grad()
def check(x, gate, up, act):
    got = gated_linear(x, gate, up, act)
    exact = formula(x.double(), gate.double(), up.double(), act)
    assert_as_exact(act, got, exact, formula(x, gate, up, act))
    return [(y.double() - exact).abs().mean() for y in (got, exact.to(x.dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", list(ACTS))
def test_activations(device, dtype, act):
    check(*make(device, (2, 5, 24), 33, dtype), act)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_product_is_rounded(device, dtype):
    error, of_one_rounding = check(*make(device, (64, 48), 96, dtype), "gelu_new")
    assert error < 1.1 * of_one_rounding, "rounding a factor as well makes it about twice as large"


@pytest.mark.parametrize(
    ("rows", "depth", "features"), [(1, 1, 1), (15, 130, 31), (17, 64, 65), (70, 33, 3), (1030, 16, 20)]
)
def test_sizes(device, rows, depth, features, monkeypatch):
    poison(monkeypatch)
    check(*make(device, (rows, depth), features, torch.bfloat16), "gelu_new")


@torch.no_grad()
def test_strided_inputs_and_no_rows(device):
    x, gate, up = make(device, (6, 40), 18, torch.bfloat16)
    check(x[:, ::2], gate[:, ::2], up[::2, :20].repeat_interleave(2, 0), "silu")
    assert gated_linear(x[:0], gate, up, "silu").shape == (0, 18)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@torch.no_grad()
def test_values_that_are_not_finite_stay_in_their_row(device, value):
    x, gate, up = make(device, (5, 24), 8, torch.bfloat16)
    x[2, 3] = value
    got = gated_linear(x, gate, up, "gelu")
    assert not got[2].isfinite().any()
    assert got[[0, 1, 3, 4]].isfinite().all()


def test_with_gradients_the_formula_runs(device):
    x, gate, up = make(device, (5, 24), 8, torch.bfloat16)
    gate.requires_grad_()
    assert not gated_linear_serves(x)
    gated_linear(x, gate, up, "gelu").sum().backward()
    assert gate.grad.isfinite().all()
    with torch.no_grad():
        assert gated_linear_serves(x)
        assert not gated_linear_serves(x.float())


@torch.no_grad()
def test_operator_is_registered_rightly_and_compiles(device):
    x, gate, up = make(device, (2, 5, 24), 33, torch.bfloat16)
    torch.library.opcheck(torch.ops.fat5.gated_linear.default, (x, gate, up, 0), test_utils=OPCHECKS)
    compiled = torch.compile(gated_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, gate, up, "gelu"), gated_linear(x, gate, up, "gelu"))


def test_bad_arguments_are_named(device):
    x, gate, up = make(device, (5, 24), 8, torch.bfloat16)
    for arguments, message in (
        ((x, gate, up, "tanh"), "act must be one of"),
        ((x, gate[:, 1:], up, "relu"), r"weights \[F, D\]"),
        ((x, gate, up[1:], "relu"), r"weights \[F, D\]"),
        ((x.half(), gate, up, "relu"), "one dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            gated_linear(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 33, 4097])
@pytest.mark.parametrize(("depth", "features"), [(512, 1024), (768, 2048), (2048, 5120)])
def test_real_sizes(device, rows, depth, features, dtype):
    check(*make(device, (rows, depth), features, dtype), "gelu_new")
