"""Models too large for memory: built without weights, each layer's fetched from the file as it is called."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.hooks import attach_align_device_hook
from transformers import PretrainedConfig, PreTrainedModel

_BLOCK = re.compile(r"(^|.*\.)block\.\d+")


def streamed(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    weights: Mapping[str, torch.Tensor],
    implementation: str,
    dtype: torch.dtype,
) -> Any:
    """A model that holds no weights: each layer fetches its own as it is called, and drops them after.

    Args:
        model_class: of the model.
        config: its configuration.
        weights: name -> values, of any dtype.
        implementation: of attention.
        dtype: of the model.
    """
    return attach_weights(without_weights(model_class, config, implementation, dtype), weights)


def without_weights(
    model_class: type[PreTrainedModel], config: PretrainedConfig, implementation: str, dtype: torch.dtype
) -> Any:
    """A model on the meta device. Arguments as of `streamed`."""
    config._attn_implementation = implementation
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return model_class(config).eval()
    finally:
        torch.set_default_dtype(before)


def attach_weights(model: Any, weights: Mapping[str, torch.Tensor]) -> Any:
    """Let every layer of a model on the meta device fetch its weights as it is called, and drop them after."""
    attach_align_device_hook(model, execution_device=torch.device("cpu"), offload=True, weights_map=weights)
    for name, module in model.named_modules():
        if _BLOCK.fullmatch(name):
            module.register_forward_hook(lambda *_: return_freed_memory())
    return_freed_memory()
    return model


def return_freed_memory() -> None:
    """Give freed memory back to the system: glibc keeps what lies between small blocks, a little more each layer."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if trim is not None:
        trim(0)
