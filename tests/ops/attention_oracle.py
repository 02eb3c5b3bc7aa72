"""What attention is, written out independently of the code under test, and how errors against it are judged."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

FLOORS = {torch.float32: 5e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}
"""Rounding floor by dtype, as a share of the largest magnitude, or of 1, that of the inputs: gradients may cancel.

Fp32: scores of 16 and more, in units of log 2, have lost a few units in the last place before they are exponents.
"""


def assert_as_exact(name: str, got: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> None:
    """Error against fp64 at most twice that of plain PyTorch in the same dtype, plus a rounding floor."""
    assert got.shape == exact.shape, f"{name}: shape {list(got.shape)}, not {list(exact.shape)}"
    assert got.dtype == plain.dtype, f"{name}: dtype {got.dtype}, not {plain.dtype}"
    if exact.numel() == 0:
        return
    assert torch.isfinite(got).all(), f"{name}: not finite"
    size = max(exact.abs().max().item(), 1.0)
    error = (got.double() - exact).abs().max().item()
    allowed = 2 * (plain.double() - exact).abs().max().item() + FLOORS[got.dtype] * size
    assert error <= allowed, f"{name}: error {error:.3e} where {allowed:.3e} is allowed (size {size:.3e})"


@dataclass
class Inputs:
    """One problem: leaves that require gradients, and what they mean."""

    q: torch.Tensor  # [B, H, Lq, D] or [Tq, H, D]
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor | None = None
    kind: str | None = None  # t5, alibi, dense
    bidirectional: bool = True
    max_distance: int = 128
    causal: bool = False
    scale: float = 1.0
    cu_q: torch.Tensor | None = None
    cu_k: torch.Tensor | None = None
    key_lengths: torch.Tensor | None = None
    q_offset: int = 0

    def leaves(self, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        """Fresh leaves q, k, v (and a bias that learns), in another dtype if given."""
        learns = [self.bias] if self.kind in ("t5", "dense") else []
        return [
            _copy_with_strides(x).to(x.dtype if dtype is None else dtype).requires_grad_()
            for x in (self.q, self.k, self.v, *learns)
        ]


def _copy_with_strides(x: torch.Tensor) -> torch.Tensor:
    """A copy whose elements lie as far apart as those of `x`: `clone` would move a slice's together."""
    if x.numel() == 0:
        return x.detach().clone()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.new_zeros(extent).as_strided(x.shape, x.stride()).copy_(x.detach())


def bucket(distance: int, bidirectional: bool, num_buckets: int, max_distance: int) -> int:
    """T5's bucket of one distance key - query (Raffel et al. 2020, section 2.1, as in the Mesh TensorFlow original)."""
    base = 0
    n = -distance
    if bidirectional:
        num_buckets //= 2
        base = num_buckets if n < 0 else 0
        n = abs(n)
    else:
        n = max(n, 0)
    exact = num_buckets // 2
    if n < exact:
        return base + n
    far = exact + int(
        torch.log(torch.tensor(n / exact, dtype=torch.float32)) / math.log(max_distance / exact) * (num_buckets - exact)
    )
    return base + min(far, num_buckets - 1)


def plain_attention(
    x: Inputs, leaves: list[torch.Tensor], keep: torch.Tensor | None = None, p: float = 0.0
) -> torch.Tensor:
    """Attention in the leaves' dtype by ordinary operations, segment by segment; `keep` is a mask of kept weights."""
    parts = []
    for q, k, v, bias in _segments(x, leaves):
        scores, visible = _scores(x, q, k, bias)
        weights = torch.where(visible, scores.softmax(-1), 0.0)
        if keep is not None:
            weights = weights * keep / (1 - p)
        parts.append(weights @ v)
    return _join(x, parts)


def _segments(x: Inputs, leaves: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
    """q, k, v `[B, H, L, D]` of each segment, or of the padded rows, and the bias."""
    q, k, v = leaves[:3]
    bias = leaves[3] if len(leaves) > 3 else x.bias
    if x.cu_q is None:
        yield q, k, v, bias
        return
    for s in range(len(x.cu_q) - 1):
        rows_q, rows_k = slice(int(x.cu_q[s]), int(x.cu_q[s + 1])), slice(int(x.cu_k[s]), int(x.cu_k[s + 1]))
        yield *(t[rows].transpose(0, 1)[None] for t, rows in ((q, rows_q), (k, rows_k), (v, rows_k))), bias


def _join(x: Inputs, parts: list[torch.Tensor]) -> torch.Tensor:
    """`[B, H, L, ...]` of each segment, laid out as the queries are."""
    return parts[0] if x.cu_q is None else torch.cat([part[0].transpose(0, 1) for part in parts])


def _scores(
    x: Inputs, q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores `[B, H, Lq, Lk]`, very small where no key is visible, and where it is."""
    keys = torch.arange(k.shape[2], device=q.device)
    distances = keys - torch.arange(q.shape[2], device=q.device)[:, None] - x.q_offset
    scores = q @ k.transpose(2, 3) * x.scale
    if x.kind == "t5" and distances.numel():
        low, high = int(distances.min()), int(distances.max())
        table = [bucket(r, x.bidirectional, bias.shape[0], x.max_distance) for r in range(low, high + 1)]
        buckets = torch.tensor(table, device=q.device)[distances - low]
        scores = scores + bias[buckets].permute(2, 0, 1).to(scores.dtype)
    elif x.kind == "alibi":
        scores = scores - bias.to(scores.dtype)[:, None, None] * distances.abs()
    elif x.kind == "dense":
        scores = scores + bias
    visible = ~torch.isneginf(scores)
    if x.causal:
        visible &= distances <= 0
    if x.key_lengths is not None:
        visible &= (keys < x.key_lengths[:, None])[:, None, None, :]
    return torch.where(visible, scores, -1e30 if q.dtype != torch.float16 else -6e4), visible


def gradients(out: torch.Tensor, leaves: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    """Of every leaf; zeros where the output does not depend on it."""
    found = torch.autograd.grad(out, leaves, grad.to(out.dtype), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
