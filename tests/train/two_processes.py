"""What the two processes of test_distributed.py do: `torchrun --nproc-per-node 2 two_processes.py FOLDER RECIPE`."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from torch import distributed as dist
from torch.utils._pytree import tree_map_only
from toy_training import ON_CPU, SCALED, Gradients, losses, make_trainer, toy_model
from transformers import TrainerCallback

from fat5.train.continuation import require_agreement
from fat5.train.errors import TrainingError
from fat5.train.folder import RunFolder
from fat5.train.options import GuardOptions
from fat5.train.recipe import load_recipe
from fat5.train.run import pretrain
from fat5.train.sharding import shard, whole_weights

RANK = int(os.environ["RANK"])
DEVICE = torch.device("cpu" if ON_CPU else f"cuda:{RANK}")


def started(folder: Path, *, sharded=False, **changes):
    """Make a trainer, as if these processes had just been started."""
    AcceleratorState._reset_state(reset_partial_state=True)
    model = toy_model()
    if sharded:
        shard(model, DEVICE)
    return make_trainer(folder, model=model, eval_strategy="no", **changes)


def weights(trainer) -> dict:
    return whole_weights(trainer.model) if hasattr(trainer.model, "unshard") else trainer.model.state_dict()


def keep(folder: Path, name: str, value) -> None:
    """Save what the test is to look at, on the CPU; each process its own."""
    torch.save(tree_map_only(torch.Tensor, Tensor.cpu, value), folder / f"{name}-{RANK}.pt")


class Kill(TrainerCallback):
    """Sends this process a signal in the middle of a step."""

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 2 and RANK == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class SpoilOne(TrainerCallback):
    """Makes one process's loss infinite in one step."""

    def on_step_begin(self, args, state, control, model, **kwargs) -> None:
        self.kept = model.lm_head.weight.data.clone()
        if state.global_step == 2 and RANK == 1:
            model.lm_head.weight.data.mul_(float("nan"))

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        model.lm_head.weight.data.copy_(self.kept)


def main(folder: Path, recipe: Path) -> None:
    for sharded in (False, True):
        gradients = Gradients()
        trainer = started(
            folder / f"step{sharded}",
            sharded=sharded,
            steps=1,
            batch=64,
            micro=16,
            n=64,
            callbacks=[gradients],
            max_grad_norm=0.0,
        )
        trainer.train()
        keep(folder, f"step{sharded}", (losses(trainer)[0], gradients.kept))

    for name, sharded in (("ddp", False), ("fsdp", True)):
        trainer = started(folder / name, sharded=sharded, micro=4, save_total_limit=9, options=SCALED)
        trainer.train()
        keep(folder, name, weights(trainer))
        one = folder / f"{name}_one"  # a run of one process, of which the test has left a checkpoint
        trainer = started(one, sharded=sharded, micro=4, options=SCALED)
        trainer.train(resume_from_checkpoint=str(one / "checkpoints" / "checkpoint-2"))
        keep(folder, f"{name}_one", weights(trainer))

    trainer = started(folder / "killed", micro=4, callbacks=[Kill()], save_steps=100)
    with trainer.guard.signals:
        trainer.train()
    keep(folder, "killed", (trainer.guard.stopped_by, trainer.state.global_step))

    trainer = started(folder / "spoilt", micro=4, guard=GuardOptions(on_bad_step="skip"))
    trainer.callback_handler.callbacks.insert(0, SpoilOne())
    trainer.train()
    keep(folder, "spoilt", (trainer.progress.skipped, weights(trainer)))

    try:  # as if the machines had a folder each
        require_agreement(RunFolder(folder), folder / f"checkpoint-{RANK}" if RANK else None)
    except TrainingError as error:
        keep(folder, "disagree", str(error))

    AcceleratorState._reset_state(reset_partial_state=True)
    pretrain(load_recipe(recipe, json.loads((folder / "settings.json").read_text())))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    dist.destroy_process_group()
