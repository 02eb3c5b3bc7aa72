"""What launches ask about a GPU, asked once: torch takes as long for the answer as for a launch."""

import functools

import torch


def compute_capability(x: torch.Tensor) -> int:
    """90 for sm_90; 0 for a tensor on the CPU (Triton's interpreter)."""
    return _properties(x.device)[0] if x.is_cuda else 0


def multiprocessors(x: torch.Tensor) -> int:
    """Of the tensor's GPU; 1 on the CPU (Triton's interpreter)."""
    return _properties(x.device)[1] if x.is_cuda else 1


@functools.lru_cache
def _properties(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count
