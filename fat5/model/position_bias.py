"""Which position bias a model has, as a module that makes it and in the form that the kernels take."""

import torch

from .configuration_flash_t5 import FlashT5Config
from .ops_attention_bias import AlibiBias, DenseBias, T5Bias
from .position_alibi import AlibiPositionBias
from .position_encoding import RelativePositionBias
from .position_fire import FirePositionBias

PositionBias = RelativePositionBias | AlibiPositionBias | FirePositionBias


def build_position_bias(config: FlashT5Config, bidirectional: bool) -> PositionBias | None:
    """The module that makes the biases of a stack, or of a layer; None where positions are no bias."""
    kind = config.position_encoding_type
    if kind == "t5":
        buckets, distance = config.relative_attention_num_buckets, config.relative_attention_max_distance
        module = RelativePositionBias(buckets, distance, config.num_heads, bidirectional)
        module.relative_attention_bias.init_std = config.d_model**-0.5
        return module
    if kind == "ALiBi":
        return AlibiPositionBias(config.num_heads, config.alibi_mode == "symmetric")
    if kind == "FIRE":
        return FirePositionBias(config.num_heads, config.fire_mlp_width, config.relative_attention_max_distance)
    return None


def kernel_bias(
    config: FlashT5Config, bias: torch.Tensor | None, causal: bool
) -> T5Bias | AlibiBias | DenseBias | None:
    """What the kernels add to the scores.

    Args:
        config: says which kind of bias it is.
        bias: a dense bias `[B|1, H, Lq, Lk]`, T5's table `[num_buckets, H]`, ALiBi's slopes `[H]`, or None.
        causal: T5's buckets do not tell keys after the query apart.
    """
    if bias is None:
        return None
    if bias.ndim == 4:
        return DenseBias(bias)
    if config.position_encoding_type == "ALiBi":
        return AlibiBias(bias.detach())  # reentrant checkpointing has marked it as if it learnt
    return T5Bias(bias, bidirectional=not causal, max_distance=config.relative_attention_max_distance)
