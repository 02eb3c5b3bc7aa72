"""What is seen and kept while a run goes on: the progress bar and the log."""

import json
import math
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy


class ProgressBar(TrainerCallback):
    """One bar for the run, with the latest losses; a line stays on the screen for each evaluation.

    The time of evaluations is no step's: the rate and the time left are those of training.
    """

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if self.bar is not None and "loss" in logs:
            shown = {"loss": f"{logs['loss']:.3f}", "lr": f"{logs['learning_rate']:.2e}"}
            if "tokens_per_second" in logs:
                shown["tokens/s"] = f"{logs['tokens_per_second']:,.0f}"
            self.bar.set_postfix(shown)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.set_description("evaluating")

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.set_description(refresh=False)
            self.bar.unpause()
            figures = kwargs["metrics"]
            error = f" ± {figures['eval_loss_se']:.4f}" if "eval_loss_se" in figures else ""
            self.bar.write(f"step {state.global_step:>7}: held-out loss {figures['eval_loss']:.4f}{error}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class JsonLines(TrainerCallback):
    """Keeps the log as a file of JSON lines, one for each logged step and evaluation.

    When a run continues from a checkpoint, what was logged after that checkpoint is cut off, so that the file
    always tells one undisturbed story.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(map(_line, state.log_history)), encoding="utf-8")

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(state.log_history[-1]))


def _line(entry: dict[str, Any]) -> str:
    """Write an entry; JSON has no number for what is none, such as the gradient's norm in a step that was skipped."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


class LastStep(TrainerCallback):
    """Logs and evaluates the last step even where the run's length is no multiple of the intervals."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_evaluate = args.eval_strategy != IntervalStrategy.NO
