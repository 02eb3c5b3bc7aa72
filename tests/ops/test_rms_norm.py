"""RMSNorm of a residual sum against its formula in fp64: widths, dtypes, dropout, strides, what is refused."""

import pytest
import torch
from layer_oracle import OPCHECKS, check, poison

from fat5.model import ops_rms_norm
from fat5.model.ops_philox import elementwise_dropout
from fat5.model.ops_rms_norm import add_rms_norm

EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def formula(leaves, p=0.0, seed=None):
    hidden, *branch, weight = leaves
    if branch:
        added = elementwise_dropout(branch[0], p, seed) if p else branch[0]
        hidden = hidden + added
    normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + EPS) * weight
    return normed.to(weight.dtype), hidden


def make(device, shape, dtype=torch.float32, hidden_dtype=None, branch=True):
    hidden = 3 * torch.randn(shape, device=device).to(hidden_dtype or dtype)
    weight = torch.randn(shape[-1], device=device).to(dtype)
    return [hidden, *[torch.randn(shape, device=device).to(dtype)] * branch, weight]


def run(leaves, **options):
    hidden, *branch, weight = leaves
    return add_rms_norm(hidden, branch[0] if branch else None, weight, EPS, **options)


@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize(
    ("shape", "dtype", "hidden_dtype"),
    [
        ((3, 5, 1), torch.float32, None),
        ((1, 127), torch.bfloat16, None),
        ((19, 40), torch.float16, None),
        ((2, 3, 96), torch.bfloat16, torch.float32),
        ((2, 513), torch.bfloat16, None),
    ],
)
def test_shapes_and_dtypes(device, shape, dtype, hidden_dtype, branch):
    check(run, formula, make(device, shape, dtype, hidden_dtype, branch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.75])
def test_dropout_is_that_of_the_definition(device, dtype, p):
    seed = torch.tensor([0x123456789ABCDEF], device=device)
    inputs = make(device, (7, 45), dtype)
    check(lambda x: run(x, dropout_p=p, seed=seed), lambda x: formula(x, p, seed), inputs)


def test_dropout_drops_that_share_and_differs_by_row_and_seed(device):
    branch = torch.ones(8, 4096, device=device)
    masks = []
    for seed in (1, 2):
        _, total = add_rms_norm(
            torch.zeros_like(branch), branch, branch[0], EPS, dropout_p=0.3, seed=torch.tensor([seed], device=device)
        )
        masks.append(total != 0)
        assert (total[total != 0] - 1 / 0.7).abs().max() < 1e-4
        assert abs(masks[-1].float().mean().item() - 0.7) < 0.01
    rows = torch.cat(masks).float() - 0.7
    alike = (rows @ rows.T / 4096 / 0.21).fill_diagonal_(0)
    assert alike.abs().max() < 0.1, "rows or seeds share a mask"


def test_no_seed_draws_from_torch(device):
    hidden, branch, weight = make(device, (4, 64))
    torch.manual_seed(5)
    first = add_rms_norm(hidden, branch, weight, EPS, dropout_p=0.5)[1]
    second = add_rms_norm(hidden, branch, weight, EPS, dropout_p=0.5)[1]
    torch.manual_seed(5)
    again = add_rms_norm(hidden, branch, weight, EPS, dropout_p=0.5)[1]
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_strided_inputs(device):
    hidden, _, weight = make(device, (6, 40))
    check(lambda x: run([x[0].T, x[1][:, ::2], x[2]]), lambda x: formula([x[0].T, x[1][:, ::2], x[2]]), [
        hidden.T.contiguous(), torch.randn(6, 80, device=device), weight,
    ])  # fmt: skip


def test_fp16_stays_in_range_and_has_no_gradient_beyond(device):
    hidden = torch.tensor([[60000.0, -60000.0, 1.0, 2.0]], device=device).half().requires_grad_()
    branch = torch.tensor([[60000.0, -60000.0, 1.0, 2.0]], device=device).half().requires_grad_()
    normed, total = add_rms_norm(hidden, branch, torch.ones(4, device=device).half(), EPS)
    assert total.tolist() == [[65504.0, -65504.0, 2.0, 4.0]]
    assert normed.isfinite().all()
    for gradient in torch.autograd.grad(total.float().sum(), (hidden, branch)):
        assert gradient.tolist() == [[0.0, 0.0, 1.0, 1.0]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e4])
def test_extreme_values_propagate_as_in_torch(device, value):
    hidden, branch, weight = make(device, (3, 20))
    branch[1, 3] = value
    torch.testing.assert_close(run([hidden, branch, weight]), formula([hidden, branch, weight]), equal_nan=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_nan_when_dropped_as_in_torch(device, value):
    """See the test of its like in `test_gated_act.py`."""
    _, branch, weight = make(device, (1, 64))
    seed, zeros = torch.tensor([3], device=device), torch.zeros_like(branch)
    kept = add_rms_norm(zeros, torch.ones_like(branch), weight, EPS, dropout_p=0.5, seed=seed)[1] > 0
    expected = torch.full_like(branch, value).where(kept, torch.nan)
    dropped = torch.nn.functional.dropout(torch.full((64,), value), 0.5)
    assert dropped.isnan().any()
    assert not (dropped == 0).any()
    bad = torch.full_like(branch, value)
    total = add_rms_norm(zeros, bad, weight, EPS, dropout_p=0.5, seed=seed)[1]
    torch.testing.assert_close(total, expected, equal_nan=True)
    branch.requires_grad_()
    total = add_rms_norm(zeros, branch, weight, EPS, dropout_p=0.5, seed=seed)[1]
    torch.testing.assert_close(torch.autograd.grad(total, branch, bad)[0], expected, equal_nan=True)


def test_unused_outputs_and_no_rows(device):
    leaves = [x.requires_grad_() for x in make(device, (5, 24))]
    _, total = run(leaves)
    for gradient, expected in zip(torch.autograd.grad(total.sum(), leaves), (1, 1, 0), strict=True):
        assert torch.equal(gradient, torch.full_like(gradient, expected))
    empty = [x.requires_grad_() for x in make(device, (0, 24))]
    gradients = torch.autograd.grad(run(empty)[0].sum(), empty)
    assert [list(x.shape) for x in gradients] == [[0, 24], [0, 24], [24]]
    assert not gradients[2].any()


def test_operator_is_registered_rightly_and_writes_everything(device, monkeypatch):
    hidden, branch, weight = (x.requires_grad_() for x in make(device, (5, 24)))
    seed = torch.tensor([3], device=device)
    for arguments in (
        (hidden, branch, weight, seed, EPS, 0.5, torch.float32),
        (hidden, None, weight, None, EPS, 0.0, torch.bfloat16),
    ):
        torch.library.opcheck(torch.ops.fat5.rms_norm_forward.default, arguments, test_utils=OPCHECKS)
    poison(monkeypatch)
    check(lambda x: run(x, dropout_p=0.5, seed=seed), lambda x: formula(x, 0.5, seed), [hidden, branch, weight])


def test_compiles_into_one_graph(device):
    leaves = [x.requires_grad_() for x in make(device, (5, 24))]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(leaves), run(leaves))


def test_bad_arguments_are_named(device):
    hidden, branch, weight = make(device, (5, 24))
    for arguments, message in (
        ((hidden, branch[:4], weight, EPS), "agree in shape"),
        ((hidden, branch, weight[:3], EPS), "weight"),
        ((hidden[:, :0], None, weight[:0], EPS), "width"),
    ):
        with pytest.raises(ValueError, match=message):
            add_rms_norm(*arguments)
    with pytest.raises(ValueError, match="dropout_p"):
        add_rms_norm(hidden, branch, weight, EPS, dropout_p=1.0)


def test_the_kernel_runs(device, monkeypatch):
    monkeypatch.setattr(ops_rms_norm, "reference_add_rms_norm", None)
    run(make(device, (5, 24)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [128, 512, 768, 1000, 1024, 2048, 4096, 5120, 8192])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_real_sizes(device, width, dtype, p):
    seed = torch.tensor([11], device=device)
    check(
        lambda x: run(x, dropout_p=p, seed=seed), lambda x: formula(x, p, seed), make(device, (3, 1111, width), dtype)
    )


@pytest.mark.gpu
def test_repeated_runs_give_the_same_bits(device):
    leaves = [x.requires_grad_() for x in make(device, (20000, 768), torch.bfloat16)]
    first, second = (torch.autograd.grad(run(leaves)[0].float().square().sum(), leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
