"""A toy model and toy data for the trainer's tests, made without `fat5.data`."""

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from fat5.model import FlashT5Config, FlashT5ForConditionalGeneration

VOCABULARY = 48
DENOISERS = ("copy", "reverse")


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
