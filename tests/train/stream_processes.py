"""One of several processes that train on a stream: `torchrun ... stream_processes.py RECIPE SETTINGS USED STOP_AT`.

Writes the hashes of the batches that it used to USED-<rank>.json; fails in the middle of its batch STOP_AT, if any.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from torch import distributed as dist

import fat5.data.setup
from fat5.train.recipe import load_recipe
from fat5.train.run import pretrain
from fat5.train.stream_trainer import StreamTrainer

BLOCK, BLOCK_OF_ROWS = 24, 6  # of the size of the toy


class Used(list):
    """The hashes of the batches that are used, in order; `stop_at` ends the run in the middle of that batch."""

    stop_at = -1


def recording(used: Used, step):
    """`StreamTrainer.training_step`, which keeps account of what it is given."""

    def recorded(self, model, inputs, *rest):
        tensors = sorted((name, x.tolist()) for name, x in inputs.items() if isinstance(x, torch.Tensor))
        used.append(hashlib.sha256(json.dumps(tensors).encode()).hexdigest())
        if len(used) == used.stop_at:
            raise KeyboardInterrupt
        return step(self, model, inputs, *rest)

    return recorded


def main(recipe: Path, settings: Path, used: Path, stop_at: int) -> None:
    batches = Used()
    batches.stop_at = stop_at
    StreamTrainer.training_step = recording(batches, StreamTrainer.training_step)
    fat5.data.setup._BLOCK, fat5.data.setup._BLOCK_OF_ROWS = BLOCK, BLOCK_OF_ROWS
    try:
        pretrain(load_recipe(recipe, json.loads(settings.read_text())))
    finally:
        used.with_name(f"{used.name}-{os.environ['RANK']}.json").write_text(json.dumps(batches))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), int(sys.argv[4]))
    dist.destroy_process_group()
