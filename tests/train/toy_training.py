"""A toy model and toy data for the trainer's tests, made without `fat5.data`."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainingArguments

from fat5.model import FlashT5Config, FlashT5ForConditionalGeneration
from fat5.train.callbacks import JsonLines, LastStep
from fat5.train.guard import StepGuard
from fat5.train.options import GuardOptions, TrainingOptions
from fat5.train.progress import Progress
from fat5.train.signals import StopSignals
from fat5.train.throughput import CLOCKED
from fat5.train.trainer import PretrainingTrainer

VOCABULARY = 48
DENOISERS = ("copy", "reverse")
# An epsilon that keeps Adam from blowing rounding in a near-zero gradient up to a whole step.
SCALED = {"optimizer": "adamw_scale", "weight_decay": 0.1, "adam_epsilon": 1e-4}


def log(folder: Path) -> list[dict]:
    """The log that a run has left in its folder, without what the clock says."""
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in e.items() if k not in CLOCKED} for e in entries if "train_runtime" not in e]


def toy_model(**changes: Any) -> FlashT5ForConditionalGeneration:
    """Build a small FAT5 with an untied head; the same weights every time."""
    torch.manual_seed(1)
    config = {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "tie_word_embeddings": False,
    }
    return FlashT5ForConditionalGeneration(FlashT5Config(**(config | changes)))


class ToyBatches(Dataset):
    """The batches of a run over `n` toy documents, epoch after epoch."""

    def __init__(self, n: int, batch_size: int, total: int) -> None:
        self.windows = ToyWindows(n)
        self.batch_size = batch_size
        self.total = total

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        places = range(number * self.batch_size, (number + 1) * self.batch_size)
        n = len(self.windows)
        return toy_collator([self.windows[p % n] | {"epoch": p // n} for p in places])


class ToyWindows(Dataset):
    """Random documents of 3 to 12 tokens, of the first few of the vocabulary: that much can be learned at once."""

    def __init__(self, n: int, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.documents = [random.integers(3, 12, random.integers(3, 13)) for _ in range(n)]

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.documents[index], "index": index, "epoch": 0}


def toy_collator(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Ask for a copy of the even documents, and of the odd ones, one epoch on the other way round, reversed.

    Targets are of very different lengths, so that a mean of means is not the mean.
    """
    kinds = [(item["index"] + item["epoch"]) % 2 for item in items]
    targets = [item["input_ids"][::-1] if k else item["input_ids"] for item, k in zip(items, kinds, strict=True)]
    pad = torch.nn.utils.rnn.pad_sequence
    inputs = [torch.tensor(np.append(item["input_ids"], 1)) for item in items]
    return {
        "input_ids": pad(inputs, batch_first=True),
        "attention_mask": pad([torch.ones_like(i) for i in inputs], batch_first=True),
        "labels": pad([torch.tensor(t.copy()) for t in targets], batch_first=True, padding_value=-100),
        "denoiser": torch.tensor(kinds),
    }


class NoTokenizer(PreTrainedTokenizerFast):
    def __init__(self) -> None:
        pass

    def save_pretrained(self, folder, **kwargs) -> None:
        Path(folder, "tokenizer.json").write_text("{}")


# Where the trainers below compute; two_processes.py is run on GPUs too.
ON_CPU = os.environ.get("TOY_DEVICE", "cpu") == "cpu"


def make_trainer(
    folder: Path, *, steps=6, batch=8, micro=8, callbacks=(), model=None, guard=None, options=None, n=20, **changes
) -> PretrainingTrainer:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    values = {
        "output_dir": str(folder / "checkpoints"),
        "max_steps": steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": batch // micro // processes,
        "per_device_eval_batch_size": 5,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_steps": 2,
        "use_cpu": ON_CPU,
        "ddp_find_unused_parameters": False,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 5,
    }
    args = TrainingArguments(**(values | changes))
    progress = Progress()

    def examples(step):
        return [{"batch": step, "example": i} for i in range(step * batch, (step + 1) * batch)]

    return PretrainingTrainer(
        model or toy_model(),
        args,
        TrainingOptions(**({"steps": steps, "learning_rate": args.learning_rate} | (options or {}))),
        batches=ToyBatches(n, micro, steps * batch // micro),
        held_out=ToyWindows(13, seed=9),
        held_out_collator=toy_collator,
        denoisers=DENOISERS,
        tokenizer=NoTokenizer(),
        progress=progress,
        guard=StepGuard(guard or GuardOptions(), progress, folder / "bad_steps.jsonl", examples, StopSignals()),
        callbacks=[JsonLines(folder / "log.jsonl"), LastStep(), *callbacks],
    )


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step."""

    def __init__(self) -> None:
        self.kept: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        if not self.kept:
            named = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
            whole = ((name, g.full_tensor() if hasattr(g, "full_tensor") else g) for name, g in named)
            self.kept = {name.removeprefix("module."): g.clone() for name, g in whole}


def losses(trainer: PretrainingTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
