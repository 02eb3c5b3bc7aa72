"""How the operators of the layer are compared: outputs and every gradient with fp64, beside plain torch's in dtype."""

from collections.abc import Callable, Sequence

import torch
from attention_oracle import assert_as_exact, gradients

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
"""Of `torch.library.opcheck`, without the slow one on dynamic shapes, which `torch.compile` is tested with instead."""
Function = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]


def check(operator: Function, formula: Function, inputs: list[torch.Tensor]) -> None:
    """Outputs and gradients of `operator` as accurate as those of `formula` in the inputs' dtypes, by the 2x rule.

    Both take leaves and return tensors, of which all that learn are differentiated at once.
    """
    results = []
    for function, dtype in ((operator, None), (formula, torch.float64), (formula, None)):
        leaves = [x.detach().clone(memory_format=torch.preserve_format) for x in inputs]
        leaves = [(x if dtype is None else x.to(dtype)).requires_grad_() for x in leaves]
        outputs = function(leaves)
        chance = torch.Generator().manual_seed(1)
        weights = [torch.randn(y.shape, generator=chance).to(y.device, y.dtype) for y in outputs]
        total = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True) if y.requires_grad)
        results.append([*outputs, *gradients(total, leaves, torch.ones_like(total))])
    names = [f"output {i}" for i in range(len(outputs))] + [f"gradient {i}" for i in range(len(inputs))]
    for name, got, exact, plain in zip(names, *results, strict=True):
        assert_as_exact(name, got.detach(), exact.detach(), plain.detach().to(got.dtype))


def poison(monkeypatch) -> None:
    """Memory that is allocated without being set starts as NaN."""
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def poisoned(*args, allocate=allocate, **options):
            fresh = allocate(*args, **options)
            return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

        monkeypatch.setattr(torch, name, poisoned)
