"""Where static caches lie: in memory of their own, so that each takes the place of one that has gone.

The graphs of decoding (see `DecodingGraphs`) hold places. Elsewhere other tensors would come in between.
"""

from functools import cache
from typing import Any

import torch
from transformers.cache_utils import Cache, StaticLayer

from .ops_graph import is_captured
from .ops_operator import is_watched


@cache
def pool_of_caches(device: torch.device) -> Any:
    """Memory of a GPU that static caches are allocated from; what none of them needs serves others before it runs out.

    Blocks are found by their size there: the same sizes in the same order lie where they lay, once those have gone.
    """
    return torch.cuda.MemPool(use_on_oom=True)


def allocate_layer(cache: Cache, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
    """Allocate a layer of a static cache that is still empty, on a GPU, before `key` and `value` are added to it.

    All others, and those of transformers 4, which no graph takes, are left to themselves.
    """
    if not key.is_cuda or not cache.is_compileable or is_watched() or is_captured(key.device):
        return
    layer = cache.layers[index]
    if type(layer) is StaticLayer and not layer.is_initialized and hasattr(layer, "cumulative_length"):
        with torch.cuda.use_mem_pool(pool_of_caches(key.device), key.device):
            layer.lazy_initialization(key, value)
