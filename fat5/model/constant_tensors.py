"""Tensors that depend on plain values alone, made once and kept."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

from .ops_operator import is_watched

P = ParamSpec("P")
T = TypeVar("T")


def kept(build: Callable[P, T]) -> Callable[P, T]:
    """Decorator of a function of hashable values that makes tensors: it is called once for each combination of them.

    What is kept serves in inference mode, where it may be asked for first, and in training alike. Where torch compiles,
    a dispatch mode (fake tensors, tracing) or a `torch.func` transform is on, nothing is kept: what is made there is of
    no use elsewhere.
    """
    once = lru_cache(maxsize=64)(build)

    @wraps(build)
    def get(*args: P.args, **kwargs: P.kwargs) -> T:
        if is_watched():
            return build(*args, **kwargs)
        with torch.inference_mode(False):
            return once(*args, **kwargs)

    return get
