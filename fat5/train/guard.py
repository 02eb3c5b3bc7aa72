"""Looks at every step before the weights are changed: is the loss finite, the gradient, is the loss a leap?"""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from fat5.folders import write_file
from fat5.train.errors import TrainingError
from fat5.train.options import GuardOptions
from fat5.train.progress import Progress
from fat5.train.signals import StopSignals

Examples = Callable[[int], Sequence[dict[str, Any]]]


class StepGuard(TrainerCallback):
    """Judges each step on all processes alike, and stops the run, or skips the step, as the recipe says.

    One small reduction over the processes and one copy to the host in each step: that is the price of never changing
    the weights by a bad step. What is wrong, and the examples of the step, are written down as a line of JSON.

    Args:
        options: the recipe's guard section.
        progress: the run's memory.
        path: where bad steps are written down.
        examples: the examples of a step, as they are to be written down.
        signals: whether the run was asked to stop, which all processes learn of here.
    """

    def __init__(
        self, options: GuardOptions, progress: Progress, path: Path, examples: Examples, signals: StopSignals
    ) -> None:
        self.options, self.progress, self.path, self.examples = options, progress, path, examples
        self.signals = signals
        self.stopped_by: str | None = None
        self._loss: Tensor | None = None
        self._tokens = 0

    def add(self, share: Tensor, tokens: int) -> None:
        """Take in a forward pass's share of the step's loss, and its real tokens."""
        self._loss = share if self._loss is None else self._loss + share
        self._tokens += tokens

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        model: nn.Module = kwargs["model"]
        loss, norm, asked = self._measure(model)
        if asked:
            self.stopped_by = self.signals.received or "a signal to another process"
        reason = self._reason(loss, norm)
        if reason is None:
            self.progress.unlogged.append(loss)
            self.progress.recent = [*self.progress.recent, loss][-self.options.spike_window :]
            return
        step = state.global_step + 1
        skips = self.options.on_bad_step == "skip" and self.progress.skipped < self.options.skip_limit
        if state.is_world_process_zero:
            self._write_down(step, reason, loss, "skipped" if skips else "stopped")
        if not skips:
            raise TrainingError(self._message(reason, step, kwargs["lr_scheduler"].get_last_lr()[0]))
        self.progress.skipped += 1
        for p in model.parameters():
            p.grad = None  # every optimizer leaves such a parameter, and its state, as they are

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Cut off what was written down after the checkpoint that the run continues from."""
        if state.is_world_process_zero and self.path.is_file():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            write_file(self.path, "".join(line for line in lines if _step(line) <= state.global_step).encode())

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if self.stopped_by is not None:
            control.should_save = control.should_training_stop = True

    def _measure(self, model: nn.Module) -> tuple[float, float, bool]:
        """Give the step's loss over all processes, the gradient's norm, and whether any process is to stop."""
        if self._loss is None:
            raise RuntimeError("a step without a loss")
        norm: Any = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        asked = float(self.signals.received is not None)
        own = torch.tensor([asked, self._tokens], dtype=torch.float64).to(self._loss.device, non_blocking=True)
        shared = torch.cat([self._loss.double().reshape(1), own])
        self._loss, self._tokens = None, 0
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(shared)
            shared[0] /= dist.get_world_size()
        loss, stop, tokens, length = torch.cat([shared, norm.double().reshape(1)]).tolist()
        self.progress.tokens += int(tokens)
        return loss, length, stop > 0

    def _reason(self, loss: float, norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss became {loss}"
        if not math.isfinite(norm):
            return "a gradient became infinite or not a number, with a finite loss"
        recent, spike = self.progress.recent, self.options.spike
        if spike is not None and len(recent) == self.options.spike_window:
            mean, deviation = statistics.fmean(recent), statistics.stdev(recent)
            if loss > mean + spike * deviation:
                return f"the loss leapt to {loss:.4g}, from {mean:.4g} ± {deviation:.2g} over {len(recent)} steps"
        return None

    def _write_down(self, step: int, reason: str, loss: float, action: str) -> None:
        entry = {
            "step": step,
            "reason": reason,
            "loss": loss if math.isfinite(loss) else str(loss),
            "action": action,
            "examples": list(self.examples(step - 1)),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _message(self, reason: str, step: int, rate: float) -> str:
        limit = ""
        if self.options.on_bad_step == "skip":
            limit = f"; {self.options.skip_limit} steps were skipped already, which is guard.skip_limit"
        return (
            f"{reason} at step {step} (learning rate {rate:.3g}){limit}; the run was stopped before the weights were "
            f"changed, and the step's examples are in {self.path}. Lower training.learning_rate, lengthen "
            "training.warmup_steps, use training.precision=fp32 or, if the text is to blame, guard.on_bad_step=skip"
        )


def _step(line: str) -> float:
    """Read the step of a line; that of one which a killed run has only begun is behind all others."""
    try:
        return int(json.loads(line)["step"])
    except ValueError:
        return math.inf
