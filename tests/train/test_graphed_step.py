"""Passes in CUDA graphs: the gradients and losses of passes as they are."""

import pytest
import torch
from torch import nn

from fat5.train.graphed_step import GraphedStep


def make(device="cpu", dropout=0.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(dropout), nn.ReLU(), nn.Linear(16, 1)).to(device)

    def step(inputs, targets):
        loss = model(inputs["x"]).square().sum() * inputs["scale"] / targets
        loss.backward()
        return loss.detach()

    return model, step


def batches(device="cpu"):
    """Of two shapes, and two plain values."""
    torch.manual_seed(1)
    sizes = [3, 3, 5, 3, 5, 5, 3, 3]
    return [{"x": torch.randn(n, 8, device=device), "scale": 1.0 if i < 6 else 2.0} for i, n in enumerate(sizes)]


def train(model, run, device, each):
    """Losses and weights of plain SGD, a step each so many batches, with gradients set to None between steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for i, inputs in enumerate(batches(device)):
        losses.append(run(inputs, torch.tensor(7 + i // each, device=device)))
        if (i + 1) % each == 0:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return [*losses, *model.parameters()]


@pytest.mark.parametrize("each", [1, 2, 4])
def test_gradients_stay_in_place_and_begin_at_zero(each):
    found = []
    for graphed in (False, True):
        model, step = make()
        run = _once_each(GraphedStep(step, list(model.parameters()))) if graphed else step
        found.append(train(model, run, "cpu", each))
    for got, expected in zip(*found, strict=True):
        assert torch.equal(got, expected)


def _once_each(graphed):
    """What a shape's first batch does, for every batch: nothing is captured on a CPU."""

    def run(inputs, targets):
        graphed._seen.clear()
        loss = graphed(inputs, targets)
        held = [p.grad.data_ptr() for p in graphed.parameters]
        assert held == [gradient.data_ptr() for gradient in graphed.gradients]
        return loss

    return run


def test_a_gradient_that_was_replaced_is_refused():
    model, step = make()
    graphed = GraphedStep(step, list(model.parameters()))
    graphed(batches()[0], torch.tensor(7))
    parameter = graphed.parameters[0]
    parameter.grad = parameter.grad.clone()
    with pytest.raises(RuntimeError, match="replaced"):
        graphed(batches()[0], torch.tensor(7))


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("each", [1, 2, 4])
def test_replays_train_as_passes_do(each, dropout):
    found = []
    for graphed in (False, True):
        model, step = make("cuda", dropout)
        run = GraphedStep(step, list(model.parameters())) if graphed else step
        torch.manual_seed(2)
        found.append(train(model, run, "cuda", each))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)
    assert len(run._graphs) == 3
