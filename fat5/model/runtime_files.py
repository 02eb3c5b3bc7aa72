"""The code files that every saved model carries, so that it loads where FAT5 is not installed."""

import os
import shutil
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)

RUNTIME_FILES = (
    "configuration_flash_t5.py",
    "modeling_flash_t5.py",
    "pretrained_flash_t5.py",
    "encoder_flash_t5.py",
    "encoder_decoder_flash_t5.py",
    "heads_flash_t5.py",
    "stack_flash_t5.py",
    "layers_flash_t5.py",
    "attention.py",
    "attention_mask.py",
    "attention_layout.py",
    "constant_tensors.py",
    "decoding_graphs.py",
    "decoding_inputs.py",
    "decoding_state.py",
    "flash_attention.py",
    "fused_attention.py",
    "fused_linear.py",
    "generation_flash_t5.py",
    "lm_head_flash_t5.py",
    "norm_flash_t5.py",
    "recomputed_linear.py",
    "ops_attention.py",
    "ops_attention_backward.py",
    "ops_attention_backward_hopper.py",
    "ops_attention_backward_hopper_launch.py",
    "ops_attention_backward_keys.py",
    "ops_attention_backward_queries.py",
    "ops_attention_backward_tile.py",
    "ops_attention_bias.py",
    "ops_attention_bias_grad.py",
    "ops_attention_bias_grad_hopper.py",
    "ops_attention_bias_line.py",
    "ops_attention_checks.py",
    "ops_attention_configs.py",
    "ops_attention_diagonals_hopper.py",
    "ops_attention_forward.py",
    "ops_attention_forward_kernel.py",
    "ops_attention_forward_sm90.py",
    "ops_attention_places_sm90.py",
    "ops_attention_problem.py",
    "ops_attention_reference.py",
    "ops_attention_strips.py",
    "ops_attention_table.py",
    "ops_cache.py",
    "ops_cache_kernels.py",
    "ops_cross_entropy.py",
    "ops_cross_entropy_kernels.py",
    "ops_decode_attention.py",
    "ops_decode_attention_kernels.py",
    "ops_device.py",
    "ops_dropout_tile.py",
    "ops_early_launch.py",
    "ops_few_rows_linear.py",
    "ops_few_rows_linear_kernels.py",
    "ops_gated_act.py",
    "ops_gated_act_kernels.py",
    "ops_gated_linear.py",
    "ops_gated_linear_kernels.py",
    "ops_graph.py",
    "ops_linear_cross_entropy.py",
    "ops_operator.py",
    "ops_philox.py",
    "ops_rms_norm.py",
    "ops_rms_norm_kernels.py",
    "packed_inputs.py",
    "packed_stack.py",
    "position_alibi.py",
    "position_bias.py",
    "position_encoding.py",
    "position_fire.py",
    "position_rotary.py",
    "runtime_files.py",
)
"""Names of the files, all in one flat folder."""


def copy_runtime_files(folder: str | os.PathLike[str]) -> None:
    """Copy the code files into `folder`, which is made if it does not exist.

    They come from the folder of this very file: the installed package, or the place where `transformers` keeps the
    code of a loaded repository. Somebody else's file of such a name, as `attention.py` is one, is kept beside it.

    Args:
        folder: where a model is being saved.
    """
    source, target = Path(__file__).resolve().parent, Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    saved_before = (target / RUNTIME_FILES[0]).exists()
    for name in RUNTIME_FILES:
        path = target / name
        if path.exists() and path.samefile(source / name):
            continue
        if path.exists() and not saved_before and path.read_bytes() != (source / name).read_bytes():
            kept = path.replace(path.with_name(f"{name}.before_flash_t5"))
            logger.warning(f"{path} is not of this model, whose code has a file of that name; it is {kept} now")
        shutil.copyfile(source / name, path)
