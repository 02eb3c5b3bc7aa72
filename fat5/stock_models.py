"""The attention kernels in a stock T5, mT5 or umT5 of `transformers`, in place and reversibly."""

from typing import TypeVar

import transformers
from packaging.version import Version
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

OLDEST = "5.17"
ATTENTION = "fat5"
Model = TypeVar("Model", bound=PreTrainedModel)


def enable(model: Model) -> Model:
    """Let a stock T5, mT5 or umT5 attend by the kernels, in memory linear in length.

    Every attention module is replaced by one on the very same submodules, under the same names: parameters,
    `state_dict` and what `save_pretrained` writes stay as they are, and adapters go on working. Where there are no
    kernels (on a CPU), or none for a mask (4-d masks, static caches), the same modules run on torch's sdpa.

    Do it before anything wraps or hooks the attention modules themselves (FSDP, offloading).

    Args:
        model: T5, mT5 or umT5, with whatever head.

    Returns:
        The same model, changed. If it is enabled already, nothing happens.

    Raises:
        TypeError: if the model is none of these.
        RuntimeError: if transformers is older than 5.17.
    """
    if Version(transformers.__version__) < Version(OLDEST):
        raise RuntimeError(
            f"fat5.enable needs transformers {OLDEST} or later, and this is {transformers.__version__}. Upgrade it, or "
            "convert the model with `fat5convert`, whose models run on older releases too."
        )
    from transformers.models.mt5.modeling_mt5 import MT5Attention
    from transformers.models.t5.modeling_t5 import T5Attention
    from transformers.models.umt5.modeling_umt5 import UMT5Attention

    from .model.fused_attention import refuse_other_models
    from .stock_attention import EnabledT5Attention, EnabledUMT5Attention, fused_mask

    if not isinstance(model, PreTrainedModel) or model.config.model_type not in ("t5", "mt5", "umt5"):
        raise TypeError(
            f"fat5.enable takes a T5, mT5 or umT5 of transformers, and {type(model).__name__} is none. (A FlashT5 runs "
            "on the kernels as it is; of an adapted model enable the base model.)"
        )
    AttentionInterface.register(ATTENTION, refuse_other_models)
    AttentionMaskInterface.register(ATTENTION, fused_mask)
    stand_ins = {T5Attention: EnabledT5Attention, MT5Attention: EnabledT5Attention, UMT5Attention: EnabledUMT5Attention}
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) in stand_ins:
                setattr(parent, name, stand_ins[type(child)](child))
    for stack in _stacks(model):
        stack.config._attn_implementation = ATTENTION
    return model


def disable(model: Model) -> Model:
    """Undo `enable`: the original modules, with the submodules as they are now, and the implementation of before.

    Args:
        model: what `enable` returned.

    Returns:
        The same model, changed. If it is not enabled, nothing happens.
    """
    from .stock_attention import EnabledAttention

    implementation = None
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, EnabledAttention):
                implementation = child.replaced_implementation
                setattr(parent, name, child.original())
    if implementation is not None:
        for stack in _stacks(model):
            stack.config._attn_implementation = implementation
    return model


def _stacks(model: nn.Module) -> list[PreTrainedModel]:
    """The model and its stacks, which have configurations of their own."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]
