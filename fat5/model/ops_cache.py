"""A token added to a static cache by one kernel, where `transformers` launches five."""

from typing import Any

import torch
from transformers.cache_utils import StaticCache, StaticLayer

from .ops_attention import kernels_serve
from .ops_attention_checks import DTYPES
from .ops_graph import is_captured
from .ops_operator import is_watched, on_its_device

try:
    import triton  # noqa: F401  (named here so that the loader of remote code sees a guarded import)

    from .ops_cache_kernels import launch_append
    from .ops_early_launch import launches_early
except ImportError:
    pass


def append_serves(cache: Any, index: int, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `append_to_cache` may stand for `update` of a cache in one layer: in a graph, for one token a row.

    Launched one by one, torch's operations are sooner launched; `torch.compile` makes few kernels of them itself.
    """
    if not kernels_serve(key.device) or not is_captured(key.device) or is_watched() or torch.is_grad_enabled():
        return False
    if type(cache) is not StaticCache or cache.offloading:
        return False
    layer = cache.layers[index]
    if type(layer) is not StaticLayer or not layer.is_initialized or not hasattr(layer, "cumulative_length"):
        return False
    tensors: tuple[Any, ...] = key, value, layer.keys, layer.values
    if any(x.dtype != key.dtype or x.device != key.device or x.stride(3) != 1 for x in tensors):
        return False
    return key.shape[2] == 1 and key.dtype in DTYPES


@on_its_device
def append_to_cache(
    layer: Any, key: torch.Tensor, value: torch.Tensor, position: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a token to a layer of a static cache, in place, as its `update` does. No gradient.

    Args:
        layer: `StaticLayer` of `transformers` with keys and values `[B, H, L, D]`, which counts its tokens in a tensor.
        key, value: `[B, H, 1, D]` in the layer's dtype.
        position: int64 scalar tensor, the number of tokens that the layer holds, in other memory than its count. From
            L on, where there is no room, the last key becomes NaN.

    Returns:
        The layer's keys and values.
    """
    early = launches_early(key, key.shape[0])
    launch_append(key, value, layer.keys, layer.values, position, layer.cumulative_length, early)
    return layer.keys, layer.values
