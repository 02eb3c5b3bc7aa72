"""Attention in plain torch, as the formula reads: what runs on a CPU, and what the kernels are tested against."""

import math

import torch

from .ops_attention_bias import ALIBI_BIAS, DENSE_BIAS, T5_BIAS, BiasArgs
from .ops_attention_problem import Problem
from .ops_operator import is_watched
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
    """Output `[B, Lq, H, D]`; the arguments are those of the forward kernel's launcher. Differentiable by autograd.

    Segments are attended to one by one, unless torch compiles or traces, when their ends are no numbers: then all at
    once, behind a mask.
    """
    device, batch = q.device, q.shape[0]
    if cu_q is None or cu_k is None:
        places_q = torch.arange(q.shape[1], device=device) + problem.q_offset
        places_k = torch.arange(k.shape[1], device=device)
        hidden = None if lengths_k is None else places_k >= lengths_k[:, None, None, None]
        rows = torch.arange(batch, device=device)[:, None, None, None]
        return _attend(q, k, v, bias, places_q, places_k, hidden, rows, problem, seed)
    if is_watched():
        (segment_q, places_q), (segment_k, places_k) = (_places(cu, x.shape[1]) for cu, x in ((cu_q, q), (cu_k, k)))
        hidden = segment_q[:, None] != segment_k
        return _attend(q, k, v, bias, places_q, places_k, hidden, segment_q[:, None], problem, seed)
    ends_q, ends_k = cu_q.tolist(), cu_k.tolist()
    outputs = [q[:, :0]]  # there may be no segment
    for segment in range(len(ends_q) - 1):
        rows_q, rows_k = slice(*ends_q[segment : segment + 2]), slice(*ends_k[segment : segment + 2])
        one_q, one_k, one_v = q[:, rows_q], k[:, rows_k], v[:, rows_k]
        places_q, places_k = (torch.arange(x.shape[1], device=device) for x in (one_q, one_k))
        number = torch.tensor(segment, device=device)
        outputs.append(_attend(one_q, one_k, one_v, bias, places_q, places_k, None, number, problem, seed))
    return torch.cat(outputs, dim=1)


def _places(cu: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The segment of each token and its position there, int64 `[T]`."""
    token = torch.arange(tokens, device=cu.device)
    segment = torch.searchsorted(cu[1:].long(), token, right=True)
    return segment, token - cu.long()[segment]


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: BiasArgs,
    places_q: torch.Tensor,
    places_k: torch.Tensor,
    hidden: torch.Tensor | None,
    segments: torch.Tensor,
    problem: Problem,
    seed: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of all queries over all keys. Softmax in fp32 or better.

    Args:
        q, k, v: `[B, L, H, D]`.
        bias: as the launchers take it.
        places_q, places_k: positions that distances are between, int64 `[L]`.
        hidden: keys that a query does not see, bool, broadcastable to `[B, H, Lq, Lk]`.
        segments: number of each score's segment, int64, broadcastable to that too.
        problem: the numbers of the call.
        seed: of the dropout.
    """
    distance = places_k[None, :] - places_q[:, None]  # [Lq, Lk]
    scores = torch.einsum("bihd,bjhd->bhij", q, k).to(torch.promote_types(q.dtype, torch.float32)) * problem.scale
    if bias.kind == T5_BIAS and bias.line is not None:
        scores = scores + bias.line[:, distance.clamp(-bias.left, bias.right) + bias.left]
    elif bias.kind == ALIBI_BIAS and bias.slopes is not None:
        scores = scores - bias.slopes[:, None, None] * distance.abs()
    elif bias.kind == DENSE_BIAS and bias.dense is not None:
        scores = scores + bias.dense
    if problem.causal:
        scores = scores.masked_fill(distance > 0, -math.inf)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    masked = torch.isneginf(scores).all(dim=-1, keepdim=True)  # a row without any key gives zeros, not NaN
    weights = scores.masked_fill(masked, 0.0).softmax(dim=-1).masked_fill(masked, 0.0)
    if problem.dropout_p > 0 and seed is not None:
        rows = places_q - problem.q_offset
        keep = dropout_mask(seed, problem.dropout_p, segments, weights.shape[1], rows, places_k)
        weights = torch.where(keep, weights / (1 - problem.dropout_p), 0.0)
    return torch.einsum("bhij,bjhd->bihd", weights.to(v.dtype), v)


def dropout_mask(
    seed: torch.Tensor, p: float, segments: torch.Tensor, heads: int, queries: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """The kernels' dropout: bool, `[heads, Lq, Lk]` broadcast with the segments, True where a weight is kept.

    Philox 4x32-10 (Salmon et al. 2011) on counters (key, query, head, segment), so that it depends neither on tiles
    nor on the layout of the batch.

    Args:
        seed: int64 `[1]`.
        p: probability of dropping.
        segments: number of each score's segment, int64, broadcastable with `[heads, Lq, Lk]`.
        heads: how many there are.
        queries, keys: their places in the segment, int64 `[L]`.
    """
    head = torch.arange(heads, device=seed.device)[:, None, None]
    counters = torch.broadcast_tensors(keys, queries[:, None], head, segments)
    bits = philox(seed, *counters)[0]
    signed = torch.where(bits >= 1 << 31, bits - (1 << 32), bits)
    uniform = torch.where(signed < 0, -signed - 1, signed).float() * 4.6566127342e-10
    return uniform > p
