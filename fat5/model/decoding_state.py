"""What a graph of a decoding step takes for given of a model, and whether there can be one."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .decoding_inputs import Facts
from .fused_linear import is_untouched

PLAIN_CODE = ("torch.nn.modules.", "transformers.activations")
"""Where the modules are from whose calls depend on nothing but their weights and input."""
PLAIN = (int, float, str)


def state_of(model: nn.Module) -> Facts | None:
    """What a graph takes for given of a model: its modules, where its weights lie, its configuration, torch's settings.

    None where a step cannot be captured, or may do more than the model's own code says: on devices without graphs, in
    training, under autocast, with another attention, with positions other than T5's (some keep tensors that a graph
    does not), with hooks, adapters, quantised, offloaded or compiled layers.
    """
    config: Any = model.config
    device = next(model.parameters()).device
    if not has_graphs(device) or torch.is_autocast_enabled(device.type):
        return None
    if config._attn_implementation != "fat5" or config.position_encoding_type not in ("t5", "none"):
        return None
    if config.output_hidden_states:
        return None
    own_code = __name__.rpartition(".")[0] + "."
    modules, places = [], []
    for module in modules_of_a_step(model):
        kind = type(module)
        if not f"{kind.__module__}.".startswith((own_code, *PLAIN_CODE)):
            return None
        in_training = module.training and kind not in (nn.Linear, nn.Embedding)  # to which it makes no difference
        if in_training or module._compiled_call_impl is not None or not is_untouched(module, kind):
            return None
        # epsilons, say; and not by `int | float | str`, which takes as long to form as all else here
        numbers = [x for name, x in vars(module).items() if isinstance(x, PLAIN) and not name.startswith("_")]
        modules.append((id(module), kind, numbers))
        for x in (*module._parameters.values(), *module._buffers.values()):
            if x is None:
                continue
            if type(x) not in (nn.Parameter, Tensor) or x.device != device:
                return None
            places.append((x.data_ptr(), x.dtype, x.shape, x.stride()))
    settings = torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.matmul.fp32_precision
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None  # graphs share memory, in turns
    return modules, places, config.to_dict(), settings, stream


def modules_of_a_step(model: nn.Module) -> Iterator[nn.Module]:
    """The model and what it holds, but for the encoder; in a third of the time of `model.modules()`."""
    left = [model]
    while left:
        module = left.pop()
        yield module
        parts = module._modules.items()
        left.extend(x for name, x in parts if x is not None and not (module is model and name == "encoder"))


def may_serve(model: Any) -> bool:
    """Whether there are graphs where a model lies."""
    return has_graphs(model.device)


def has_graphs(device: torch.device) -> bool:
    """Whether it is a GPU, that on which this thread works, and torch's own allocator gives its memory."""
    if device.type != "cuda" or device.index != torch.cuda.current_device():
        return False
    return torch.cuda.get_allocator_backend() == "native"
