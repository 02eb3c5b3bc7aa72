"""Positions other than T5's on the kernels themselves: a model equals itself on eager, in logits and every gradient."""

import pytest
import torch
from interpreter import DEVICE, HAS_KERNELS, INTERPRETED, needs_kernels, run_interpreted
from model_parity import batch, gradient_scale, relative_error
from position_kinds import kind_model

SMALL = {"num_heads": 2, "d_kv": 6, "num_layers": 1}
REAL = {"num_heads": 8, "d_kv": 64, "d_model": 256, "d_ff": 512}
SHAPE = SMALL if not HAS_KERNELS or INTERPRETED else REAL
LENGTHS = (9, 7, 2) if SHAPE is SMALL else (613, 389, 3)
LOGITS, GRADIENTS = (1e-5, 5e-5) if SHAPE is SMALL else (1e-4, 1e-3)


def test_in_the_interpreter():
    run_interpreted(__file__)


@needs_kernels
@pytest.mark.parametrize(
    ("kind", "packed"),
    [
        ("alibi", True),
        ("fire", False),
        pytest.param("rope", True, marks=pytest.mark.gpu),  # nothing of it is in the kernel: quicker on a real one
        pytest.param("alibi_asymmetric", False, marks=pytest.mark.gpu),
    ],
)
def test_a_model_equals_itself_on_eager(kind, packed):
    inputs = batch("left" if packed else "right", *LENGTHS)
    inputs = {name: value.to(DEVICE) for name, value in inputs.items()}
    real, results = inputs["labels"] != -100, {}
    for name in ("eager", "fat5"):
        model = kind_model(kind, name, **SHAPE).to(DEVICE)
        output = model(**inputs)
        output.loss.backward()
        results[name] = output.logits[real], dict(model.named_parameters())
    assert relative_error(results["fat5"][0], results["eager"][0]) < LOGITS
    for name, weight in results["eager"][1].items():
        if weight.requires_grad and not name.endswith("mlp.2.bias"):  # whose gradient is zero: it shifts all scores
            assert torch.isfinite(weight.grad).all()
            error = (results["fat5"][1][name].grad - weight.grad).abs().max()
            assert error < GRADIENTS * gradient_scale(name, results["eager"][1]), name
