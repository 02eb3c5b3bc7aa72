"""Tokens a second, MFU, padding and waiting for data, measured while a run goes on."""

import time
from collections.abc import Iterator
from dataclasses import astuple
from typing import Any

import torch
from torch import distributed as dist
from transformers import TrainerCallback

from fat5.model.configuration_flash_t5 import FlashT5Config
from fat5.train.flops import Counts, peak_flops, training_flops

CLOCKED = ("tokens_per_second", "tflops", "mfu", "padding", "data_wait", "peak_memory_gib")
"""Figures of what this process did since its last entry: they alone differ between runs otherwise the same."""


class Throughput(TrainerCallback):
    """Adds up steps between two log entries. Evaluation and saving are not part of a step.

    Args:
        config: the model's.
        device: whose peak MFU is relative to.
    """

    def __init__(self, config: FlashT5Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self._start_over()

    def _start_over(self) -> None:
        self._counts, self._busy, self._waited = Counts(), 0.0, 0.0
        self._began: float | None = None

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Give the batches of a step, of which it counts size and the time it takes to get them."""
        self._began = time.perf_counter()
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.perf_counter() - began
            self._counts += batch["counts"]
            yield batch

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._began is not None:
            if control.should_log and self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # else what the optimizer has still to do would count nowhere
            self._busy += time.perf_counter() - self._began
            self._began = None

    def figures(self) -> dict[str, float]:
        """Give the figures since the last time, over all processes, and start over; empty if there was no step.

        `tokens_per_second` (real ones, all processes), `tflops` (10^12 operations a second of one process), `mfu`
        (the share of the device's peak), `padding` (share of computed tokens), `data_wait` (share of the time) and,
        on a GPU, `peak_memory_gib` (the most that tensors took on any of them since the run's start).
        """
        if not self._busy:
            return {}
        sums = torch.tensor([*astuple(self._counts), self._busy, self._waited], dtype=torch.float64)
        sums = sums.to(self.device)
        processes = 1
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
            processes = dist.get_world_size()
        *counted, busy, waited = sums.tolist()
        counts = Counts(*map(int, counted))
        seconds = busy / processes
        rate = training_flops(self.config, counts) / seconds / processes
        figures = {"tokens_per_second": counts.tokens / seconds, "tflops": rate / 1e12}
        if (peak := peak_flops(self.device)) is not None:
            figures["mfu"] = rate / peak
        figures |= {"padding": 1 - counts.tokens / counts.places, "data_wait": waited / busy}
        if self.device.type == "cuda":
            most = torch.tensor(torch.cuda.max_memory_allocated(self.device), device=self.device)
            if processes > 1:
                dist.all_reduce(most, dist.ReduceOp.MAX)
            figures["peak_memory_gib"] = most.item() / 2**30
        self._start_over()
        return figures
