"""AdamWScale against its published formula in fp64, its two roundings, and its resumption."""

import io
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fat5.optim import AdamWScale
from fat5.optim.rounding import add_stochastic_

SHAPES = [(7, 5), (13,), (3, 1, 4), (), (1, 33)]


class Published:
    """The formula, one parameter at a time, in fp64 and in the order in which it is published."""

    def __init__(self, p, lr, betas, eps, weight_decay, min_rms):
        self.p, self.m, self.v, self.t = p.double().clone(), p.double() * 0, p.double() * 0, 0
        self.lr, self.betas, self.eps, self.weight_decay, self.min_rms = lr, betas, eps, weight_decay, min_rms

    def step(self, g):
        g, (beta1, beta2) = g.double(), self.betas
        self.t += 1
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g * g
        step = self.lr * math.sqrt(1 - beta2**self.t) / (1 - beta1**self.t)
        step *= max(self.min_rms, math.sqrt(self.p.square().sum().item() / self.p.numel()))
        self.p = self.p - step * self.m / (self.v.sqrt() + self.eps)
        self.p = self.p - self.lr * self.weight_decay * self.p


def parameters(dtype=torch.float64):
    torch.manual_seed(3)
    made = [torch.randn(shape, dtype=torch.float64) * 10.0 ** (i - 2) for i, shape in enumerate(SHAPES)]
    made.append(torch.zeros(4, 6, dtype=torch.float64))  # starts at 0: moved by min_rms
    made.append(torch.randn(6, 8, dtype=torch.float64).t())  # strided
    return [torch.nn.Parameter(p.to(dtype)) for p in made]


def gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, dtype=torch.float64, generator=generator).mul(0.1).to(p.dtype) for p in params]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("rounding", ["nearest", "kahan", "stochastic"])
def test_it_is_the_published_formula(dtype, tolerance, rounding):
    values = {"lr": 0.02, "betas": (0.9, 0.98), "eps": 1e-6, "min_rms": 1e-3}
    params = parameters(dtype)
    groups = [{"params": params[:3], "weight_decay": 0.1}, {"params": params[3:], "weight_decay": 0.0, "lr": 0.01}]
    optimizer = AdamWScale(groups, **values, rounding=rounding)
    oracles = [
        Published(p.detach(), **(values | {"lr": 0.02 if i < 3 else 0.01}), weight_decay=0.1 if i < 3 else 0.0)
        for i, p in enumerate(params)
    ]
    for step in range(8):
        for i, (p, oracle, g) in enumerate(zip(params, oracles, gradients(params, step), strict=True)):
            p.grad = None if i == 1 and step in (0, 4) else g  # one parameter that is not always used
            if p.grad is not None:
                oracle.step(g)
        optimizer.step()
    for p, oracle in zip(params, oracles, strict=True):
        torch.testing.assert_close(p.detach().double(), oracle.p, rtol=tolerance, atol=tolerance * 1e-2)


def test_buckets_do_not_change_the_result(monkeypatch):
    results = []
    for size in (2**26, 1, 40):
        monkeypatch.setattr("fat5.optim.adamw_scale._BUCKET", size)
        params = parameters()
        optimizer = AdamWScale(params, weight_decay=0.1)
        for step in range(3):
            for p, g in zip(params, gradients(params, step), strict=True):
                p.grad = g
            optimizer.step()
        results.append([p.detach().clone() for p in params])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("rounding", ["nearest", "kahan", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_resumed_run_is_bit_by_bit_the_undisturbed_one(rounding, dtype):
    def run(params, optimizer, steps):
        for step in steps:
            for p, g in zip(params, gradients(params, step), strict=True):
                p.grad = g
            optimizer.step()

    whole = parameters(dtype)
    run(whole, AdamWScale(whole, 0.01, weight_decay=0.1, rounding=rounding), range(9))
    broken = parameters(dtype)
    optimizer = AdamWScale(broken, 0.01, weight_decay=0.1, rounding=rounding)
    run(broken, optimizer, range(4))
    file = io.BytesIO()
    torch.save({"p": [p.detach() for p in broken], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    resumed = [torch.nn.Parameter(p) for p in saved["p"]]
    optimizer = AdamWScale(resumed, 7.0, rounding=rounding)  # its values come from the state
    optimizer.load_state_dict(saved["optimizer"])
    run(resumed, optimizer, range(4, 9))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    state = optimizer.state[resumed[0]]
    assert state["exp_avg_sq"].dtype == torch.float32


def test_kahan_and_stochastic_keep_small_updates_and_nearest_loses_them():
    """500 updates of a two-hundredth of bf16's last place of 1.0 each; fp64 says where they lead."""
    reached = {}
    for rounding in ("nearest", "kahan", "stochastic"):
        p = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = AdamWScale([p], lr=2e-5, rounding=rounding)
        oracle = Published(torch.ones(4096), 2e-5, (0.9, 0.999), 1e-6, 0.0, 1e-3)
        for _ in range(500):
            p.grad = torch.ones_like(p)
            optimizer.step()
            oracle.step(torch.ones(4096))
        compensation = optimizer.state[p].get("compensation", torch.zeros(()))
        reached[rounding] = (p.double() + compensation.double()).mean().item() - 1
    expected = oracle.p.mean().item() - 1
    assert expected == pytest.approx(-0.01, rel=0.01)
    assert reached["nearest"] == 0.0
    # The compensation is below 2^-9 and in bf16 too: each of its roundings errs by at most 2^-18.
    assert reached["kahan"] == pytest.approx(expected, abs=500 * 2**-18)
    # Each of the 500 roundings of 4096 elements errs by at most 2^-8: 5 standard errors of the mean.
    assert reached["stochastic"] == pytest.approx(expected, abs=5 * 2**-9 * math.sqrt(500 / 4096) / 2)


def test_stochastic_rounding_takes_a_neighbour_with_the_right_odds():
    n = 200_000
    for exact in (1.0 + 2**-7 * 0.3, -(1.0 + 2**-7 * 0.3), 3e-39, 0.0, float("inf"), float("nan")):
        p = torch.zeros(n, dtype=torch.bfloat16)
        add_stochastic_([p], [torch.full((n,), exact)], (1, 2))
        found = p.float().unique()
        if not math.isfinite(exact):
            assert all(math.isnan(f) if math.isnan(exact) else f == exact for f in found.tolist())
            continue
        assert len(found) <= 2
        gap = (found[-1] - found[0]).item()
        assert found[0] <= exact <= found[-1]
        assert p.double().mean().item() == pytest.approx(exact, abs=5 * gap / math.sqrt(n) / 2 + 1e-45)


def test_another_key_draws_other_numbers_and_the_same_key_the_same():
    draws = []
    for key in ((0, 0), (0, 0), (0, 1)):
        p = torch.zeros(1000, dtype=torch.bfloat16)
        add_stochastic_([p], [torch.full((1000,), 1.003)], key)
        draws.append(p)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_only_the_counters_are_read_on_the_host():
    """They lie on the host already; anything else read there would make it wait for the GPU."""

    class Reads(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.places = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:
                self.places.add(args[0].data_ptr())
            assert func not in (torch.ops.aten.nonzero.default, torch.ops.aten.is_nonzero.default)
            return func(*args, **(kwargs or {}))

    params = parameters(torch.bfloat16)
    optimizer = AdamWScale(params, rounding="stochastic", weight_decay=0.1)
    for p, g in zip(params, gradients(params, 0), strict=True):
        p.grad = g
    with Reads() as reads:
        optimizer.step()
    assert reads.places == {optimizer.state[p]["step"].data_ptr() for p in params}


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", ["nearest", "kahan", "stochastic"])
def test_a_gpu_is_never_waited_for_and_agrees_with_the_cpu(rounding):
    here, there = parameters(torch.bfloat16), [torch.nn.Parameter(p.cuda()) for p in parameters(torch.bfloat16)]
    optimizers = [AdamWScale(params, 0.01, weight_decay=0.1, rounding=rounding) for params in (here, there)]
    for step in range(4):
        for params in (here, there):
            for p, g in zip(params, gradients(here, step), strict=True):
                p.grad = g.to(p.device)
        optimizers[0].step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizers[1].step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(here, there, strict=True):
        atol = 2**-7 * a.abs().max().item()  # a last place, where fp32's rounding differs
        torch.testing.assert_close(
            a.detach(), b.detach().cpu(), rtol=2**-6, atol=atol * (4 if rounding == "stochastic" else 1)
        )


@pytest.mark.parametrize(
    "wrong", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": 0.0}, {"weight_decay": -0.1}, {"rounding": "up"}]
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AdamWScale(parameters(), **wrong)


def test_a_closure_is_called_with_gradients_on():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamWScale([p])

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3.0
    assert (p < 1).all()
