"""Cross-entropy, on logits and from hidden states, against its formula in fp64."""

import pytest
import torch
from layer_oracle import OPCHECKS, check, poison
from torch.nn import functional as F

from fat5.model import ops_cross_entropy, ops_linear_cross_entropy
from fat5.model.ops_cross_entropy import cross_entropy
from fat5.model.ops_linear_cross_entropy import linear_cross_entropy


def formula(logits, labels, z_loss=0.0, label_smoothing=0.0, reduction="mean", num_items=None):
    """Loss, z-loss and accuracy, the softmax in fp32 or better, written out term by term."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counts = labels != -100
    lse = logits.logsumexp(-1)
    target = logits.gather(-1, labels.where(counts, 0).unsqueeze(-1)).squeeze(-1)
    loss = lse - (1 - label_smoothing) * target - label_smoothing * logits.mean(-1)
    z, right = z_loss * lse.square(), target >= logits.amax(-1)
    loss, z, right = (torch.where(counts, x, 0.0) for x in (loss + z, z, right))
    total = counts.sum().clamp(min=1)
    if reduction == "none":
        return loss, z.detach(), right
    divisor = (total if num_items is None else num_items) if reduction == "mean" else 1
    return loss.sum() / divisor, z.sum().detach() / divisor, right.sum() / total


def labels_for(device, tokens, vocab, ignored=True):
    labels = torch.randint(vocab, (tokens,), device=device)
    if ignored:
        labels[1::3] = -100
    return labels


def check_both(device, tokens, width, vocab, dtype, logit_scale=1.0, labels=None, **options):
    """The two operators on one problem, every output and gradient."""
    labels = labels_for(device, tokens, vocab, tokens > 1) if labels is None else labels
    hidden = torch.randn(tokens, width, device=device).to(dtype)
    weight = torch.randn(vocab, width, device=device).to(dtype)
    check(
        lambda x: linear_cross_entropy(*x, labels, logit_scale=logit_scale, **options),
        lambda x: formula(x[0] @ x[1].T * logit_scale, labels, **options),
        [hidden, weight],
    )
    logits = (hidden @ weight.T * logit_scale).detach()
    check(lambda x: cross_entropy(*x, labels, **options), lambda x: formula(*x, labels, **options), [logits])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("z_loss", "label_smoothing"), [(0.0, 0.0), (1e-2, 0.1)])
def test_reductions_and_terms(device, reduction, z_loss, label_smoothing, monkeypatch):
    monkeypatch.setattr(ops_linear_cross_entropy, "CHUNK_TOKENS", 8)
    monkeypatch.setattr(ops_linear_cross_entropy, "ALIGNMENT", 4)  # three chunks, the last one shorter
    options = {"z_loss": z_loss, "label_smoothing": label_smoothing, "reduction": reduction}
    check_both(device, 18, 12, 53, torch.float32, logit_scale=0.4, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 1), (1, 97), (5, 1009)])
def test_sizes_and_dtypes(device, tokens, vocab, dtype):
    check_both(device, tokens, 16, vocab, dtype, z_loss=1e-4)


@pytest.mark.parametrize("num_items", [7, torch.tensor(7)])
def test_sum_is_divided_by_the_items_of_a_step(device, num_items):
    check_both(device, 5, 8, 31, torch.float32, num_items=num_items)


def test_unequal_micro_batches_add_up(device):
    weight = torch.randn(29, 8, device=device, requires_grad=True)
    hidden, labels = torch.randn(11, 8, device=device), labels_for(device, 11, 29)
    items = (labels != -100).sum()
    (whole,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels).loss, weight)
    parts = [
        torch.autograd.grad(linear_cross_entropy(hidden[s], weight, labels[s], num_items=items).loss, weight)[0]
        for s in (slice(0, 2), slice(2, 11))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_without_any_label_loss_and_gradients_are_zero(device):
    hidden, weight = torch.randn(3, 8, device=device), torch.randn(29, 8, device=device)
    labels = torch.full((3,), -100, device=device)
    check_both(device, 3, 8, 29, torch.float32, labels=labels, z_loss=1e-3)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    outputs = linear_cross_entropy(*leaves, labels)
    assert [x.item() for x in outputs] == [0.0, 0.0, 0.0]
    assert not any(g.any() for g in torch.autograd.grad(outputs.loss, leaves))


@pytest.mark.parametrize("num_items", [0, torch.tensor(0)])
def test_no_label_in_a_step_of_no_items(device, num_items):
    hidden, weight = torch.randn(3, 8, device=device), torch.randn(29, 8, device=device)
    labels = torch.full((3,), -100, device=device)
    assert linear_cross_entropy(hidden, weight, labels, num_items=num_items).loss == 0
    assert cross_entropy(hidden, labels, num_items=num_items).loss == 0


def test_labels_of_any_ints(device, monkeypatch):
    logits, labels = torch.randn(3, 29, device=device), torch.tensor([4, -100, 6], device=device)
    expected = F.cross_entropy(logits, labels)
    torch.testing.assert_close(cross_entropy(logits, labels.int()).loss, expected)
    monkeypatch.setattr(ops_cross_entropy, "kernels_serve", lambda device: False)
    torch.testing.assert_close(cross_entropy(logits, labels.int()).loss, expected)


def test_second_derivatives_are_refused(device):
    hidden, weight = (torch.randn(shape, device=device, requires_grad=True) for shape in ((3, 8), (29, 8)))
    labels = torch.tensor([4, 5, 6], device=device)
    expected = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels).loss, hidden)
    loss = linear_cross_entropy(hidden, weight, labels).loss
    first = torch.autograd.grad(loss, hidden, create_graph=True)
    torch.testing.assert_close(first, expected)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (hidden.sum() + first[0].square().sum()).backward()


def test_small_gradients_survive_fp16_under_a_loss_scale(device):
    """Rows of the weight for what is improbable everywhere, as exact as plain torch's, whose logits see the scale."""
    tokens, vocab, width, logit_scale, items, loss_scale = 4, 300, 32, 0.05, 16384, 65536.0
    weight, labels = torch.randn(vocab, width, device=device), torch.arange(tokens, device=device)
    rows = weight[labels]
    hidden = torch.randn(tokens, width, device=device) + 14 / logit_scale * rows / rows.square().sum(-1, keepdim=True)
    hidden, weight = hidden.half(), weight.half()

    def plain(hidden, weight):
        logits = (hidden * logit_scale) @ weight.T
        loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")
        return loss / items

    def fused(hidden, weight):
        return linear_cross_entropy(hidden, weight, labels, logit_scale=logit_scale, num_items=items).loss

    found = []
    for function, dtype in ((plain, torch.float64), (plain, torch.float16), (fused, torch.float16)):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        gradients = torch.autograd.grad(function(*leaves) * loss_scale, leaves)
        found.append((gradients[0].double(), gradients[1][tokens:].double()))
    for exact, rounded, got in zip(*found, strict=True):
        assert (got - exact).norm() <= 2 * (rounded - exact).norm() + 1e-3 * exact.norm()


def test_no_tokens(device):
    hidden = torch.zeros(0, 8, device=device, requires_grad=True)
    weight = torch.randn(29, 8, device=device, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.long, device=device)).loss
    assert loss.item() == 0.0
    assert not torch.autograd.grad(loss, weight)[0].any()


@pytest.mark.parametrize("value", [1e4, -1e4, float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["label", "other", "row"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_extreme_logits_propagate_as_in_torch(device, value, where, smoothing):
    logits = torch.randn(3, 37, device=device)
    labels = torch.tensor([4, 5, 6], device=device)
    logits[1, {"label": 5, "other": 20, "row": slice(None)}[where]] = value
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    got = cross_entropy(leaves[0], labels, reduction="none", label_smoothing=smoothing).loss
    expected = F.cross_entropy(leaves[1], labels, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(got, expected, equal_nan=True)
    gradients = [torch.autograd.grad(x.sum(), y)[0] for x, y in zip((got, expected), leaves, strict=True)]
    torch.testing.assert_close(*gradients, equal_nan=True)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("options", [{"reduction": "none"}, {"reduction": "sum", "label_smoothing": 0.1}])
def test_extreme_states_at_ignored_labels_propagate_as_in_torch(device, value, options):
    """The loss does not see them; their gradient is NaN, and with it that of the whole weight."""
    hidden, weight = torch.randn(3, 8, device=device), torch.randn(37, 8, device=device)
    labels = torch.tensor([4, -100, 6], device=device)
    hidden[1, 2] = value

    def plain(hidden, weight):
        return F.cross_entropy(hidden @ weight.T, labels, **options)

    def on_logits(hidden, weight):
        return cross_entropy(hidden @ weight.T, labels, **options).loss

    def fused(hidden, weight):
        return linear_cross_entropy(hidden, weight, labels, **options).loss

    found = []
    for function in (plain, on_logits, fused):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        loss = function(*leaves)
        found.append((loss, *torch.autograd.grad(loss.sum(), leaves)))
    assert found[0][0].isfinite().all()
    assert found[0][1].isnan().any(1).tolist() == [False, True, False]
    for got in found[1:]:
        torch.testing.assert_close(got, found[0], equal_nan=True)


def test_a_row_of_nothing_but_minus_infinity_at_an_ignored_label(device):
    logits = torch.randn(3, 37, device=device)
    logits[0, 3], logits[1] = -float("inf"), -float("inf")
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    for function, leaf in zip((cross_entropy, F.cross_entropy), leaves, strict=True):
        loss = function(leaf, torch.tensor([-100, -100, 6], device=device), reduction="sum")
        (loss if function is F.cross_entropy else loss.loss).backward()
    assert leaves[1].grad.isnan().all(1).tolist() == [False, True, False]
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, equal_nan=True)


def test_a_label_outside_the_vocabulary_makes_the_loss_nan(device):
    for label in (29, -1, 1 << 40):
        loss = cross_entropy(torch.randn(2, 29, device=device), torch.tensor([3, label], device=device)).loss
        assert loss.isnan()


def test_accuracy_and_z_loss_are_reported_apart(device):
    logits = torch.zeros(4, 5, device=device, requires_grad=True)
    with torch.no_grad():
        logits[[0, 1, 2], [1, 2, 3]] = 9.0
    labels = torch.tensor([1, 2, 0, -100], device=device)
    outputs = cross_entropy(logits, labels, z_loss=0.5)
    assert outputs.accuracy.item() == pytest.approx(2 / 3)
    lse = logits[:3].logsumexp(-1)
    assert outputs.z_loss.item() == pytest.approx(0.5 * lse.square().mean().item(), rel=1e-6)
    plain = F.cross_entropy(logits, labels).item()
    assert (outputs.loss - outputs.z_loss).item() == pytest.approx(plain, rel=1e-5)
    assert not outputs.z_loss.requires_grad


def test_frozen_inputs_cost_no_gradient(device):
    hidden, weight = torch.randn(3, 8, device=device), torch.randn(29, 8, device=device)
    labels = labels_for(device, 3, 29)
    for learns in ((True, False), (False, True), (False, False)):
        leaves = [x.clone().requires_grad_(flag) for x, flag in zip((hidden, weight), learns, strict=True)]
        loss = linear_cross_entropy(*leaves, labels).loss
        assert loss.requires_grad == any(learns)
        if loss.requires_grad:
            loss.backward()
        expected = [x.clone().requires_grad_() for x in (hidden, weight)]
        F.cross_entropy(expected[0] @ expected[1].T, labels).backward()
        for leaf, want, flag in zip(leaves, expected, learns, strict=True):
            assert (leaf.grad is not None) == flag
            if flag:
                torch.testing.assert_close(leaf.grad, want.grad)


def test_strided_inputs(device):
    labels = labels_for(device, 6, 29).view(2, 3)
    wide, weight = torch.randn(2, 3, 16, device=device), torch.randn(8, 29, device=device)
    check(
        lambda x: linear_cross_entropy(x[0][..., ::2], x[1].T, labels),
        lambda x: formula(x[0][..., ::2] @ x[1], labels),
        [wide, weight],
    )
    check(lambda x: cross_entropy(x[0][..., ::2], labels % 8), lambda x: formula(x[0][..., ::2], labels % 8), [wide])
    check(lambda x: cross_entropy(x[0][..., :9], labels % 8), lambda x: formula(x[0][..., :9], labels % 8), [wide])


def test_operators_are_registered_rightly_and_write_everything(device, monkeypatch):
    hidden, weight = (torch.randn(n, 8, device=device, requires_grad=True) for n in (3, 29))
    labels = labels_for(device, 3, 29)
    options = (0.5, -100, 1e-3, 0.1)
    ops = torch.ops.fat5
    logits = (hidden @ weight.T).detach().requires_grad_()
    for operator, arguments in (
        (ops.linear_cross_entropy_sum, (hidden, weight, labels, *options, True, True)),
        (ops.linear_cross_entropy_rows, (hidden, weight, labels, *options)),
        (ops.cross_entropy_forward, (logits, labels, *options[1:])),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=OPCHECKS)
    poison(monkeypatch)
    check_both(device, 3, 8, 29, torch.float32, z_loss=1e-3)
    check_both(device, 3, 8, 29, torch.float32, reduction="none")


def test_compiles_into_one_graph(device):
    hidden, weight = (torch.randn(n, 8, device=device, requires_grad=True) for n in (3, 29))
    labels = labels_for(device, 3, 29)

    def step(hidden, weight):
        return linear_cross_entropy(hidden * 2, weight, labels, z_loss=1e-3).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(f(hidden, weight), (hidden, weight)) for f in (compiled, step)]
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)


def test_bad_arguments_are_named(device):
    hidden, weight = torch.randn(3, 8, device=device), torch.randn(29, 8, device=device)
    labels = torch.zeros(3, dtype=torch.long, device=device)
    for arguments, options, message in (
        ((hidden, weight[:, :7], labels), {}, "the weight must be"),
        ((hidden, weight.half(), labels), {}, "the weight must be"),
        ((hidden, weight, labels[:2]), {}, "labels must be ints"),
        ((hidden, weight, labels.float()), {}, "labels must be ints"),
        ((hidden, weight, labels), {"reduction": "max"}, "reduction must be"),
        ((hidden, weight, labels), {"label_smoothing": 1.0}, "label_smoothing"),
        ((hidden, weight, labels), {"z_loss": -1.0}, "z_loss"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*arguments, **options)


def test_the_kernels_run(device, monkeypatch):
    for module in (ops_cross_entropy, ops_linear_cross_entropy):
        monkeypatch.setattr(module, "reference_rows", None)
    check_both(device, 2, 8, 29, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocab", [32128, 32100, 250112, 256384])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_real_sizes(device, vocab, dtype, reduction, monkeypatch):
    monkeypatch.setattr(ops_linear_cross_entropy, "CHUNK_TOKENS", 256)
    check_both(device, 600, 64, vocab, dtype, logit_scale=0.125, z_loss=1e-4, label_smoothing=0.1, reduction=reduction)


@pytest.mark.gpu
def test_memory_is_that_of_a_chunk(device):
    tokens, width, vocab = 8192, 256, 32128
    hidden = torch.randn(tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    labels = labels_for(device, tokens, vocab)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, labels).loss.backward()
    used = torch.cuda.max_memory_allocated() - before
    assert used < vocab * (2048 * 2 + width * (4 + 2)) + (32 << 20)


@pytest.mark.gpu
def test_nothing_waits_for_the_device(device):
    hidden = torch.randn(300, 64, device=device, requires_grad=True)
    weight = torch.randn(999, 64, device=device, requires_grad=True)
    labels = labels_for(device, 300, 999)
    for reduction in ("mean", "none"):
        linear_cross_entropy(hidden, weight, labels, reduction=reduction).loss.sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for reduction in ("mean", "none"):
            linear_cross_entropy(hidden, weight, labels, z_loss=1e-4, reduction=reduction).loss.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("z_loss", "logit"), [(1.0, 200.0), (0.1, 2000.0), (1e-2, 13000.0), (1e-4, 60000.0)])
def test_large_z_loss_in_fp16_keeps_its_gradients(device, z_loss, logit):
    """A logit's may be many times as large as without, which leaves no room for the factor that keeps small ones."""
    exact = [torch.eye(4, 8).double() * logit, torch.eye(5, 8).double()]
    labels = torch.tensor([0, 1, 2, 4], device=device)
    found = []
    for dtype in (torch.float64, torch.float16):
        hidden, weight = (x.to(device, dtype).requires_grad_() for x in exact)
        if dtype == torch.float64:
            logits = hidden @ weight.T
            lse = logits.logsumexp(-1)
            loss = (lse - logits[torch.arange(4, device=device), labels] + z_loss * lse**2).mean()
        else:
            loss = linear_cross_entropy(hidden, weight, labels, z_loss=z_loss).loss
        found.append(torch.autograd.grad(loss / logit, (hidden, weight)))
    for got, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=5e-3, atol=5e-3)
