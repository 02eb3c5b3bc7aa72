"""Whether work is captured in a CUDA graph, where nobody may look at values, and which launches all kernels alike."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_rehearsing = threading.local()


def is_captured(device: torch.device) -> bool:
    """Whether this thread's work on a device is captured, or done as if it were."""
    if getattr(_rehearsing, "now", False):
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextmanager
def rehearsal() -> Iterator[None]:
    """Work as in a capture, but at once: kernels are compiled here that could not be compiled there."""
    _rehearsing.now = True
    try:
        yield
    finally:
        _rehearsing.now = False
