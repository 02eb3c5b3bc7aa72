"""Attention in plain torch, as the formula reads: what runs on a CPU, and what the kernels are tested against."""

import math

import torch

from .ops_attention_bias import ALIBI_BIAS, DENSE_BIAS, T5_BIAS, BiasArgs
from .ops_attention_problem import Problem
from .ops_philox import philox


def reference_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: BiasArgs,
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    lengths_k: torch.Tensor | None,
    problem: Problem,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Output `[B, Lq, H, D]`; the arguments are those of the forward kernel's launcher. Differentiable by autograd."""
    if cu_q is None or cu_k is None:
        return _attend(q, k, v, bias, lengths_k, problem, seed, first_segment=0)
    ends_q, ends_k = cu_q.tolist(), cu_k.tolist()
    outputs = [q[:, :0]]  # there may be no segment
    for segment in range(len(ends_q) - 1):
        rows_q, rows_k = slice(*ends_q[segment : segment + 2]), slice(*ends_k[segment : segment + 2])
        outputs.append(_attend(q[:, rows_q], k[:, rows_k], v[:, rows_k], bias, None, problem, seed, segment))
    return torch.cat(outputs, dim=1)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: BiasArgs,
    lengths_k: torch.Tensor | None,
    problem: Problem,
    seed: torch.Tensor | None,
    first_segment: int,
) -> torch.Tensor:
    """The segments of a padded batch, or one segment of a packed one. Softmax in fp32 or better."""
    query_positions = torch.arange(q.shape[1], device=q.device) + problem.q_offset
    key_positions = torch.arange(k.shape[1], device=q.device)
    distance = key_positions[None, :] - query_positions[:, None]  # [Lq, Lk]
    scores = torch.einsum("bihd,bjhd->bhij", q, k).to(torch.promote_types(q.dtype, torch.float32)) * problem.scale
    if bias.kind == T5_BIAS and bias.line is not None:
        scores = scores + bias.line[:, distance.clamp(-bias.left, bias.right) + bias.left]
    elif bias.kind == ALIBI_BIAS and bias.slopes is not None:
        scores = scores - bias.slopes[:, None, None] * distance.abs()
    elif bias.kind == DENSE_BIAS and bias.dense is not None:
        scores = scores + bias.dense
    if problem.causal:
        scores = scores.masked_fill(distance > 0, -math.inf)
    if lengths_k is not None:
        scores = scores.masked_fill(key_positions >= lengths_k[:, None, None, None], -math.inf)
    masked = torch.isneginf(scores).all(dim=-1, keepdim=True)  # a row without any key gives zeros, not NaN
    weights = scores.masked_fill(masked, 0.0).softmax(dim=-1).masked_fill(masked, 0.0)
    if problem.dropout_p > 0 and seed is not None:
        keep = dropout_mask(seed, problem.dropout_p, first_segment, *weights.shape)
        weights = torch.where(keep, weights / (1 - problem.dropout_p), 0.0)
    return torch.einsum("bhij,bjhd->bihd", weights.to(v.dtype), v)


def dropout_mask(
    seed: torch.Tensor, p: float, first_segment: int, segments: int, heads: int, length_q: int, length_k: int
) -> torch.Tensor:
    """The kernels' dropout: bool `[segments, heads, Lq, Lk]`, True where a weight is kept.

    Philox 4x32-10 (Salmon et al. 2011) on counters (key, query, head, segment), so that it depends neither on tiles
    nor on the layout of the batch.
    """
    device = seed.device
    shape = (segments, heads, length_q, length_k)
    counters = [
        torch.arange(length_k, device=device),
        torch.arange(length_q, device=device)[:, None],
        torch.arange(heads, device=device)[:, None, None],
        torch.arange(first_segment, first_segment + segments, device=device)[:, None, None, None],
    ]
    c0, c1, c2, c3 = (counter.expand(shape) for counter in counters)
    c0 = philox(seed, c0, c1, c2, c3)[0]
    signed = torch.where(c0 >= 1 << 31, c0 - (1 << 32), c0)
    uniform = torch.where(signed < 0, -signed - 1, signed).float() * 4.6566127342e-10
    return uniform > p
