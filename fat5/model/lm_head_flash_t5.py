"""The language modeling head and its loss: together where kernels serve, without logits."""

from typing import TypeGuard

import torch
from torch import nn

from .attention_layout import host_may_look
from .fused_linear import is_plain
from .ops_attention import kernels_serve
from .ops_cross_entropy import check_labels, cross_entropy
from .ops_linear_cross_entropy import linear_cross_entropy


def loss_and_logits(
    head: nn.Module,
    hidden_states: torch.Tensor,
    labels: torch.Tensor | None,
    scale: float,
    training: bool,
    num_items_in_batch: torch.Tensor | int | None = None,
    places: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Loss in fp32, None without labels, and logits `[B, L, V]`, None in training where the loss did without them.

    Args:
        head: from D to V features.
        hidden_states: the decoder's output, `[B, L, D]`.
        labels: int64 `[B, L]`, -100 where nothing is to be predicted.
        scale: factor on the logits.
        training: logits are not wanted besides a loss.
        num_items_in_batch: what the summed loss is divided by; None for the number of labels.
        places: see `places_of_labels`; used where logits are not wanted.

    Raises:
        ValueError: if there is not one label for each of the decoder's inputs.
    """
    if labels is not None and does_without_logits(head, hidden_states.device, training):
        if places is not None:
            check_labels(labels, hidden_states.shape[:-1])
            hidden_states, labels = hidden_states.flatten(0, 1)[places], labels.flatten()[places]
        fused = linear_cross_entropy(
            hidden_states, head.weight, labels, logit_scale=scale, num_items=num_items_in_batch
        )
        return fused.loss, None
    logits = head(hidden_states if scale == 1.0 else hidden_states * scale)
    if labels is None:
        return None, logits
    return cross_entropy(logits, labels, num_items=num_items_in_batch).loss, logits


def does_without_logits(head: nn.Module, device: torch.device, training: bool) -> TypeGuard[nn.Linear]:
    """Whether the loss is all that there is to see of the decoder's output and its labels."""
    return training and kernels_serve(device) and is_plain(head)


def places_of_labels(labels: torch.Tensor) -> torch.Tensor | None:
    """Int64 `[N]`, where in the flattened batch there are labels, so that the others cost nothing.

    None where that is everywhere, or unknown. It waits for the device, and so is best called where that is idle anyway.
    """
    if not (kernels_serve(labels.device) and host_may_look(labels.device)):
        return None
    places = (labels != -100).flatten().nonzero()[:, 0]
    return None if len(places) == labels.numel() else places
