"""Attention in plain torch, as a CPU runs it, compiled whole: one call gives what segment after segment does."""

import pytest
import torch

from fat5.model.ops_attention import attention
from fat5.model.ops_attention_bias import AlibiBias, DenseBias, T5Bias

LENGTHS = [5, 0, 1, 7]


def leaves(kind, packed):
    """In fp64: the order of the sums, which differs, is then nothing beside a wrong term."""
    options = {"dtype": torch.float64, "requires_grad": True}
    shape = (sum(LENGTHS), 2, 16) if packed else (2, 2, 13, 16)
    made = [torch.randn(shape, **options) for _ in range(3)]
    if kind == "t5":
        made.append(torch.randn(8, 2, **options))
    elif kind == "dense":
        made.append(torch.randn(1, 2, 13, 13, **options))
    return made


def step_of(kind, packed, causal, dropout_p):
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    segments = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": 7, "max_seqlen_k": 7} if packed else {}
    options = segments | {"causal": causal, "dropout_p": dropout_p, "seed": torch.tensor([3])}

    def step(q, k, v, learned=None):
        bias = {
            "t5": lambda: T5Bias(learned, not causal, 20), "dense": lambda: DenseBias(learned),
            "alibi": lambda: AlibiBias(torch.tensor([0.5, 0.1])), None: lambda: None,
        }[kind]()  # fmt: skip
        return attention(q, k, v, bias=bias, **options)

    return step


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("kind", "packed"), [("t5", False), ("t5", True), ("alibi", True), ("dense", False), (None, True), (None, False)]
)
def test_compiled_whole(kind, packed, causal, dropout_p):
    step, given = step_of(kind, packed, causal, dropout_p), leaves(kind, packed)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for run in (step, compiled):
        out = run(*given)
        results.append([out, *torch.autograd.grad(out.square().sum(), given)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)
