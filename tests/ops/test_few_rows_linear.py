"""Linear layers on few rows, joined, against their formula in fp64."""

import pytest
import torch
from attention_oracle import assert_as_exact
from layer_oracle import OPCHECKS, poison
from torch.nn import functional as F

from fat5.model.ops_few_rows_linear import MAX_ROWS, few_rows_linear, few_rows_linear_serves

DTYPES = [torch.bfloat16, torch.float16]


def make(device, shape, features, count, dtype):
    x = torch.randn(*shape, device=device).to(dtype)
    weights = torch.randn(count, features, shape[-1], device=device) / shape[-1] ** 0.5
    return x, list(weights.to(dtype))


def formula(x, weights):
    return torch.cat([x @ weight.T for weight in weights], -1)


@torch.no_grad()
def check(x, weights):
    exact = formula(x.double(), [weight.double() for weight in weights])
    assert_as_exact("output", few_rows_linear(x, weights), exact, formula(x, weights))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    ("shape", "features"), [((1, 1), 1), ((15, 130), 31), ((2, 9, 64), 65), ((33, 256), 3), ((64, 1030), 40)]
)
def test_sizes(device, shape, features, count, dtype, monkeypatch):
    poison(monkeypatch)
    check(*make(device, shape, features, count, dtype))


@torch.no_grad()
def test_strided_inputs_and_no_rows(device):
    x, (first, second) = make(device, (6, 40), 18, 2, torch.bfloat16)
    check(x[:, ::2], [first[:, ::2], second[:, 20:]])
    assert few_rows_linear(x[:0], [first, second]).shape == (0, 36)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@torch.no_grad()
def test_values_that_are_not_finite_stay_in_their_row(device, value):
    x, weights = make(device, (5, 24), 8, 2, torch.bfloat16)
    x[2, 3] = value
    got = few_rows_linear(x, weights)
    assert not got[2].isfinite().any()
    assert got[[0, 1, 3, 4]].isfinite().all()


def test_what_it_does_not_serve_is_left_to_torch(device):
    x, weights = make(device, (MAX_ROWS, 24), 8, 2, torch.bfloat16)
    weights[0].requires_grad_()
    assert not few_rows_linear_serves(x)
    few_rows_linear(x, weights).sum().backward()
    assert weights[0].grad.isfinite().all()
    with torch.no_grad():
        assert few_rows_linear_serves(x) == (device.type == "cpu"), "on a GPU in graphs only"
        assert not few_rows_linear_serves(x.float())
        assert not few_rows_linear_serves(torch.cat([x, x[:1]]))
        more = torch.cat([x, x[:1]]).float()
        torch.testing.assert_close(
            few_rows_linear(more, [w.float() for w in weights]), formula(more, [w.float() for w in weights])
        )


@torch.no_grad()
def test_operator_is_registered_rightly_and_compiles(device):
    x, weights = make(device, (2, 5, 24), 33, 3, torch.bfloat16)
    for count in (1, 2, 3):
        given = (*weights[:count], *[None] * (3 - count))
        torch.library.opcheck(torch.ops.fat5.few_rows_linear.default, (x, *given), test_utils=OPCHECKS)
        compiled = torch.compile(few_rows_linear, fullgraph=True, backend="aot_eager")
        assert_as_exact(
            "compiled",
            compiled(x, weights[:count]),
            formula(x.double(), [weight.double() for weight in weights[:count]]),
            formula(x, weights[:count]),
        )


def test_bad_arguments_are_named(device):
    x, weights = make(device, (5, 24), 8, 3, torch.bfloat16)
    for arguments, message in (
        ((x, []), "one to 3 weights"),
        ((x, [*weights, weights[0]]), "one to 3 weights"),
        ((x, [weights[0], weights[1][1:]]), r"weights \[F, D\] of one shape"),
        ((x[:, 1:], weights), r"weights \[F, D\] of one shape"),
        ((x.half(), weights), "one dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            few_rows_linear(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 16, 17, 33, 64])
@pytest.mark.parametrize(("depth", "features"), [(512, 384), (768, 768), (1000, 130), (2816, 1024), (5120, 2048)])
@torch.no_grad()
def test_real_sizes_in_a_graph(device, rows, depth, features, dtype):
    """Three launches one after the other, each early: on rows that the one before has just written."""
    x, weights = make(device, (rows, depth), depth, 1, dtype)
    _, joined = make(device, (rows, depth), features, 3, dtype)
    static = torch.zeros_like(x)
    few_rows_linear(few_rows_linear(static, weights), joined)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            first = few_rows_linear(static, weights)
            got = few_rows_linear(first, joined)
    static.copy_(x)
    for _ in range(20):
        first.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert_as_exact("first", first, formula(x.double(), [weights[0].double()]), F.linear(x, weights[0]))
        exact = formula(first.double(), [weight.double() for weight in joined])
        assert_as_exact("joined", got, exact, formula(first, joined))
