"""FSDP2: the weights, gradients and optimizer state of a model divided among the processes."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer

from fat5.model.layers_flash_t5 import FlashT5Block
from fat5.model.modeling_flash_t5 import FlashT5ForConditionalGeneration
from fat5.train.errors import TrainingError

FOLDER = "sharded"
"""In a checkpoint: weights and optimizer state as `torch.distributed.checkpoint` writes them, for any processes."""


def shard(model: FlashT5ForConditionalGeneration, device: torch.device) -> None:
    """Divide a model among all processes, in place: block by block, the embedding and the rest together.

    Gradients are reduced in fp32. `accelerate` shards on GPUs alone, and CPU runs are how this is tested, so torch's
    `fully_shard` is called here, on either.

    Raises:
        TrainingError: the processes were not started by torchrun.
    """
    if not dist.is_initialized():
        raise TrainingError(
            "training.parallel: fsdp needs processes to divide the model among; start the run with "
            "`torchrun --nproc-per-node N -m fat5.cli pretrain ...`, or take training.parallel=ddp"
        )
    nn.Module.to(model, device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    options: Any = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
    for module in list(model.modules()):
        if isinstance(module, FlashT5Block):
            fully_shard(module, **options)
    fully_shard(model, **options)
    register_fsdp_forward_method(model, "generate")
    # A block's output is a view where dropout is off; nothing writes into it, which is what the warning is about.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # What accelerate looks at to see that a model is ready; else it would wrap this one for DDP.
    model._is_accelerate_prepared = True  # type: ignore[assignment]


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has divided the model."""
    return isinstance(model, FSDPModule)


def save_shards(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Write each process's part into `folder`, on all processes."""
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def load_shards(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Read what `save_shards` wrote, under any number of processes, on all processes."""
    weights, state = get_state_dict(model, optimizer)
    read: Any = {"model": weights, "optimizer": state}
    dcp.load(read, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=read["model"], optim_state_dict=read["optimizer"])


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """Collect a sharded model's weights in the first process's memory, on all processes; empty in the others."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
