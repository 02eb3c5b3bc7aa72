"""The position biases of the published FAT5 within a stock T5, which has none of them: the oracle of verification.

Written from the published formulas and not from `fat5.model`, so that the two are held against each other.
Source: https://github.com/catie-aq/flashT5 (`src/utils/positional_encoding.py`), Apache-2.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def replace_bias(stock: Any, config: Mapping[str, Any]) -> None:
    """Give a stock T5 the positions that a FlashT5 configuration states, in place of its own table in each stack."""
    for name in ("encoder", "decoder"):
        stack = getattr(getattr(stock, "transformer", stock), name, None)  # some heads have the stacks one level down
        if stack is not None:
            stack.block[0].layer[0].SelfAttention.relative_attention_bias = _bias(config)


def _bias(config: Mapping[str, Any]) -> nn.Module:
    kind, heads = config["position_encoding_type"], config["num_heads"]
    if kind == "FIRE":
        return _Fire(heads, config["fire_mlp_width"])
    return _Alibi(heads, config["alibi_mode"]) if kind == "ALiBi" else _NoPositions(heads)


class _Bias(nn.Module):
    """Stands for stock T5's embedding of buckets: given their matrix `[Lq, Lk]`, gives biases `[Lq, Lk, H]`.

    Only the shape of the matrix matters: the queries are the last of as many positions as there are keys.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(self, buckets: torch.Tensor) -> torch.Tensor:
        queries, keys = buckets.shape
        places = torch.arange(keys, dtype=torch.float32, device=buckets.device)
        return self.bias(places[keys - queries :, None], places[None, :])

    def bias(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Biases `[Lq, Lk, H]` of positions `[Lq, 1]` and `[1, Lk]`."""
        raise NotImplementedError


class _NoPositions(_Bias):
    def bias(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(query), key.shape[1], self.num_heads)


class _Alibi(_Bias):
    def __init__(self, num_heads: int, mode: str) -> None:
        super().__init__(num_heads)
        self.symmetric = mode == "symmetric"

    def bias(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        distance = (key - query)[..., None]
        if self.symmetric:
            return -distance.abs() * _slopes(self.num_heads)
        away = -distance.abs() * _slopes(self.num_heads // 2)
        nowhere = torch.tensor(-torch.inf)
        return torch.cat([torch.where(distance > 0, nowhere, away), torch.where(distance < 0, nowhere, away)], dim=-1)


def _slopes(heads: int) -> torch.Tensor:
    power = 1 << (heads.bit_length() - 1)
    if power == heads:
        return 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1))
    return torch.cat([_slopes(power), _slopes(2 * power)[::2][: heads - power]])


class _Fire(_Bias):
    def __init__(self, num_heads: int, mlp_width: int) -> None:
        super().__init__(num_heads)
        self.mlp = nn.Sequential(nn.Linear(1, mlp_width), nn.ReLU(), nn.Linear(mlp_width, num_heads))
        self.c, self.init_L, self.L_multiplier = (nn.Parameter(torch.zeros(())) for _ in range(3))

    def bias(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        reach = torch.clamp(query, min=float((self.L_multiplier * self.init_L).abs()))
        distance = query - key
        progress = distance.sign() * torch.log1p((self.c * distance).abs())
        return self.mlp((progress / (torch.log1p((self.c * reach).abs()) + 1e-6))[..., None])
