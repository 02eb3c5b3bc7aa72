"""One matrix product for layers that share their input, where nothing stands between a layer and its weight."""

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from .norm_flash_t5 import FlashT5LayerNorm, NormedSum
from .ops_attention import kernels_serve
from .ops_attention_checks import DTYPES
from .ops_few_rows_linear import few_rows_linear, few_rows_linear_serves
from .ops_operator import is_transformed, is_watched
from .recomputed_linear import side_by_side


def fused_linear(states: torch.Tensor | NormedSum, layers: Sequence[nn.Module]) -> torch.Tensor | None:
    """`[..., N1 + N2 + ...]`: the outputs of linear layers side by side, from their weights copied into one.

    Args:
        states: `[..., D]`. If they are still to be normalised they are not kept for backward, where that is possible.
        layers: linear layers from D to N1, N2, ... features.

    Returns:
        The outputs, or None where the layers are to be called one by one: on devices without kernels, in transforms
        (see `is_transformed`), where a layer is more than its weight (see `is_plain`), or where there are too few
        tokens to pay for the copy. The copy moves 2 D times the number of features, the one product saves about 4 D
        (2 D without gradients) times the tokens.
    """
    given = states.hidden_states if isinstance(states, NormedSum) else states
    if not kernels_serve(given.device) or is_transformed():
        return None
    if len(layers) == 1:
        pays = torch.is_grad_enabled()
    else:
        pays = given.shape[:-1].numel() >= sum(getattr(layer, "out_features", 0) for layer in layers)
    if not pays:  # soon told, which every layer asks in every step of decoding
        return None
    weights = plain_weights(layers, given.device)
    if not weights:
        return None
    if isinstance(states, NormedSum):
        if is_untouched(states.norm, FlashT5LayerNorm) and states.may_wait(weights[0].dtype):
            return states.linear(weights)
        states = states.states()
    return F.linear(states, side_by_side(weights))


def project(states: torch.Tensor | NormedSum, layers: Sequence[nn.Module]) -> list[torch.Tensor]:
    """The outputs `[..., N]` of linear layers of one width, by one product where there is one for them."""
    together = fused_linear(states, layers)
    if together is None:
        given = states.states() if isinstance(states, NormedSum) else states
        together = _few_rows(given, layers)
        if together is None:
            return [layer(given) for layer in layers]
    if len(layers) == 1:
        return [together]
    plain = is_watched() or not torch.is_grad_enabled()
    return list(together.chunk(len(layers), -1) if plain else SplitColumns.apply(together, len(layers)))


def linear(layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """The output `[..., N]` of a linear layer, on few rows by the kernel made for them."""
    output = _few_rows(states, (layer,))
    return layer(states) if output is None else output


def _few_rows(states: torch.Tensor, layers: Sequence[nn.Module]) -> torch.Tensor | None:
    """What `few_rows_linear` makes of layers that are no more than their weights; None where it does not serve."""
    if not few_rows_linear_serves(states):
        return None
    weights = plain_weights(layers, states.device)
    return few_rows_linear(states, weights) if weights and weights[0].dtype == states.dtype else None


def recomputing_weight(layer: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """The weight of a layer on an activation of `x` if `gated_act_linear` may compute both; else None."""
    if not torch.is_grad_enabled() or is_watched() or is_transformed():
        return None
    if x.dtype not in DTYPES or not kernels_serve(x.device):
        return None
    weights = plain_weights([layer], x.device)
    return weights[0] if weights and weights[0].dtype == x.dtype else None


def plain_weights(layers: Sequence[nn.Module], device: torch.device) -> list[torch.Tensor] | None:
    """The weights of linear layers in the dtype of their product; None where a layer is more than its weight.

    So too where dtypes differ, or where a weight is on another device.
    """
    weights = [layer.weight for layer in layers if isinstance(layer, nn.Linear) and is_plain(layer)]
    if len(weights) < len(layers) or any(x.dtype != weights[0].dtype or x.device != device for x in weights):
        return None
    if torch.is_autocast_enabled(device.type):  # cast before they are copied side by side: half as much to copy
        return [weight.to(torch.get_autocast_dtype(device.type)) for weight in weights]
    return weights


class SplitColumns(torch.autograd.Function):
    """`x.chunk(parts, -1)` whose gradient is no copy where the gradients of the parts lie side by side already."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
        """Views of x."""
        return x.chunk(parts, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The tensor that they are slices of, or a new one."""
        first, width = gradients[0], gradients[0].shape[-1]
        whole = torch.Size((*first.shape[:-1], len(gradients) * width))
        strides = [math.prod(whole[axis + 1 :]) for axis in range(len(whole))]
        if all(
            gradient.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and gradient.storage_offset() == first.storage_offset() + index * width
            and all(whole[axis] == 1 or gradient.stride(axis) == strides[axis] for axis in range(len(whole)))
            for index, gradient in enumerate(gradients)
        ):
            return first.as_strided(whole, strides), None
        return torch.cat(gradients, -1), None


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling a layer is just the product with its weight: no adapter, quantisation or offloading, no
    hook of its own or of all modules.
    """
    return (
        is_untouched(layer, nn.Linear)
        and layer.bias is None
        and type(layer.weight) in (nn.Parameter, torch.Tensor)
        and layer.weight.is_floating_point()
    )


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module is just the forward of its class: nothing wraps it, no hook, its own or of
    all modules, waits for the call.
    """
    return (
        type(module) is kind
        and "forward" not in vars(module)  # accelerate replaces it on the instance
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not _has_any_global_hook()
    )
