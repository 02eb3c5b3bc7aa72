"""The held-out figures, against hand computation."""

import math

import numpy as np
import pytest
import torch

from fat5.train.held_out import Examples, example_sums, mean_and_error, measure, summarise


def by_hand(logits: np.ndarray, labels: np.ndarray) -> list[list[float]]:
    """Sum over each row's targets, one number at a time, in fp64: loss, targets, correct, log²(Z)."""
    sums = []
    for row_logits, row_labels in zip(logits.astype(np.float64), labels, strict=True):
        kept = [(x, y) for x, y in zip(row_logits, row_labels, strict=True) if y != -100]
        logs = [math.log(sum(math.exp(v) for v in x)) for x, _ in kept]
        loss = sum(z - x[y] for z, (x, y) in zip(logs, kept, strict=True))
        sums.append([loss, len(kept), sum(x[y] == max(x) for x, y in kept), sum(z * z for z in logs)])
    return sums


def test_the_sums_are_over_each_rows_targets():
    logits = torch.randn(4, 6, 11)
    labels = torch.randint(0, 11, (4, 6))
    labels[1, 3:] = labels[2, 1:] = -100
    labels[0] = logits[0].argmax(-1)
    logits[3, 2] = float("nan")
    labels[3, 2] = -100  # what is no target does not count, whatever it is
    sums = torch.stack(example_sums(logits, labels), 1)
    expected = by_hand(logits.numpy(), labels.numpy())
    assert expected[0][2] == 6
    np.testing.assert_allclose(sums.numpy(), expected, rtol=1e-6)


def test_the_softmax_of_bf16_logits_is_taken_in_fp32():
    logits = torch.randn(2, 5, 300).bfloat16()
    labels = torch.randint(0, 300, (2, 5))
    expected = by_hand(logits.float().numpy(), labels.numpy())
    np.testing.assert_allclose(example_sums(logits, labels)[0].numpy(), [row[0] for row in expected], rtol=1e-6)


def test_the_mean_is_per_target_and_not_per_example():
    mean, _ = mean_and_error(torch.tensor([1.0, 30.0]), torch.tensor([1.0, 10.0]))
    assert mean == pytest.approx(31 / 11)


def test_the_error_is_that_of_the_mean_when_all_examples_are_as_long():
    losses = torch.rand(50, dtype=torch.float64) * 40
    _, error = mean_and_error(losses, torch.full((50,), 8.0, dtype=torch.float64))
    assert error == pytest.approx((losses / 8).std().item() / math.sqrt(50))


def test_the_error_says_how_far_the_mean_of_other_draws_lies():
    """Draw the whole held-out set many times: the spread of its means must be the error that each states."""
    random = np.random.default_rng(0)
    targets = random.integers(1, 40, (400, 300)).astype(float)
    losses = targets * random.gamma(2, 1.5, (400, 300))
    figures = [mean_and_error(torch.tensor(x), torch.tensor(t)) for x, t in zip(losses, targets, strict=True)]
    spread = np.std([mean for mean, _ in figures])
    assert np.mean([error for _, error in figures]) == pytest.approx(spread, rel=0.1)


def test_one_example_has_no_error():
    assert mean_and_error(torch.tensor([6.0]), torch.tensor([2.0])) == (3.0, None)


def test_each_denoiser_is_summed_up_by_itself_and_one_without_examples_is_left_out():
    columns = [[2.0, 9.0, 4.0, 5.0], [1.0, 3.0, 2.0, 1.0], [1.0, 0.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]]
    examples = Examples(*map(torch.tensor, columns), torch.tensor([0, 2, 0, 2]))
    figures = summarise(examples, ["r", "s", "x"], "eval")
    assert figures["eval_loss"] == pytest.approx(20 / 7)
    assert figures["eval_r_loss"] == pytest.approx(6 / 3)
    assert figures["eval_x_loss"] == pytest.approx(14 / 4)
    assert figures["eval_accuracy"] == pytest.approx(3 / 7)
    assert figures["eval_r_accuracy"] == pytest.approx(2 / 3)
    assert figures["eval_log_z_squared"] == pytest.approx(10 / 7)
    of_each = {f"eval{name}_{k}" for name in ("", "_r", "_x") for k in ("loss", "loss_se", "accuracy")}
    assert set(figures) == {*of_each, "eval_log_z_squared"}


def test_the_batch_size_changes_nothing():
    logits, labels = torch.randn(6, 4, 9), torch.randint(0, 9, (6, 4))
    denoiser = torch.tensor([0, 1, 1, 0, 2, 1])

    def batches(size):
        for i in range(0, 6, size):
            yield {"labels": labels[i : i + size], "denoiser": denoiser[i : i + size], "at": torch.tensor(i)}

    def forward(batch):
        return logits[int(batch["at"]) :][: len(batch["labels"])]

    one, four = (measure(forward, batches(size)) for size in (1, 4))
    assert all(torch.equal(a, b) for a, b in zip(one.columns, four.columns, strict=True))
