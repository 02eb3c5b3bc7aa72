"""A batch of a new size launches what is compiled already: a compiler that starts in mid-run stalls it for seconds."""

import pytest
import torch
import triton

from fat5.model.ops_attention import attention
from fat5.model.ops_attention_bias import T5Bias
from fat5.model.ops_rms_norm import add_rms_norm

pytestmark = pytest.mark.gpu


def step(tokens, longest, segments):
    """Norm and packed attention of `segments` sequences, forward and backward."""
    inner = torch.randperm(tokens - 1, device="cuda")[: segments - 1].add(1).sort().values
    ends = torch.tensor([0, tokens], device="cuda")
    cu = torch.cat([ends[:1], inner, ends[1:]]).int()
    x = torch.randn(tokens, 3, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    table = torch.randn(32, 2, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    normed, _ = add_rms_norm(x, x.sin(), torch.ones(64, device="cuda", dtype=torch.bfloat16), 1e-6)
    out = attention(
        *normed.unbind(1), bias=T5Bias(table), cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest,
        max_seqlen_k=longest,
    )  # fmt: skip
    out.square().sum().backward()


def test_sizes_do_not_compile_again():
    for sizes in ((4096, 512, 16), (4096, 2048, 3)):  # the two ways to sum a gradient near the diagonal
        step(*sizes)
    compiled = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **about: compiled.append(about["repr"]) or False
    try:
        for tokens in (4095, 4097, 3333, 2048, 6000):
            for longest, segments in ((500, 17), (333, 21), (1, 4096), (1500, 4), (2047, 5)):
                step(tokens, longest if segments < tokens else 1, min(segments, tokens))
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None
    assert not compiled
