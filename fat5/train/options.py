"""The typed sections of a recipe that are not about data: model, training, guard, evaluation, output."""

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers.training_args import OptimizerNames

# Without those that need to be told which modules to project, or that update while gradients are being computed.
_OTHER_USE = ("galore", "apollo", "lomo", "adalomo")
OPTIMIZERS = [name.value for name in OptimizerNames if not name.value.startswith(_OTHER_USE)]

# The schedules of transformers that need nothing but the step, and `fat5.optim.WarmupStableDecay`.
Schedule = Literal[
    "linear",
    "cosine",
    "inverse_sqrt",
    "constant_with_warmup",
    "polynomial",
    "cosine_with_min_lr",
    "wsd",
]
Precision = Literal["fp32", "bf16", "bf16_kahan", "bf16_stochastic", "bf16_nearest"]


@dataclass(frozen=True)
class ModelOptions:
    """Which model is trained, and what of its configuration is changed for the run."""

    path: str
    fresh: dict[str, Any] | None = None
    revision: str | None = None
    attn_implementation: str | None = None
    dropout_rate: float | None = None

    def __post_init__(self) -> None:
        _require(self.path != "", "path is empty; give a FAT5 folder or Hub id")
        if self.dropout_rate is not None:
            _require(0.0 <= self.dropout_rate < 1.0, "dropout_rate must be from 0 up to, not including, 1")


@dataclass(frozen=True)
class TrainingOptions:
    """The optimisation. Batch sizes count examples; steps are updates of the weights."""

    steps: int
    batch_size: int = 64
    micro_batch_size: int = 8
    optimizer: str = "adamw_torch_fused"
    learning_rate: float = 1e-3
    schedule: Schedule = "linear"
    schedule_options: dict[str, Any] = field(default_factory=dict)
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    precision: Precision = "fp32"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    gradient_checkpointing: bool = False
    cuda_graphs: bool = True
    seed: int = 0
    deterministic: bool = False
    device: Literal["auto", "cpu"] = "auto"
    loader_workers: int = 0

    def __post_init__(self) -> None:
        _require(self.steps > 0, "steps must be at least 1")
        _require(
            self.optimizer in optimizer_names(),
            f"optimizer {self.optimizer!r} is not known; known: {', '.join(optimizer_names())}",
        )
        _require(
            self.optimizer == "adamw_scale" or self.precision not in ("bf16_kahan", "bf16_stochastic"),
            f"precision {self.precision} needs optimizer adamw_scale, which rounds so; {self.optimizer} does not",
        )
        _require(self.micro_batch_size > 0, "micro_batch_size must be at least 1")
        _require(
            self.batch_size > 0 and self.batch_size % self.micro_batch_size == 0,
            f"batch_size {self.batch_size} must be a multiple of micro_batch_size {self.micro_batch_size}",
        )
        _require(self.learning_rate > 0, "learning_rate must be above 0")
        for name in ("adam_beta1", "adam_beta2"):
            _require(0 <= getattr(self, name) < 1, f"{name} must be from 0 up to, not including, 1")
        _require(self.adam_epsilon > 0, "adam_epsilon must be above 0")
        _require(0 <= self.warmup_steps <= self.steps, "warmup_steps must be from 0 to steps")
        _require(self.max_grad_norm >= 0, "max_grad_norm must be 0 (no clipping) or more")
        _require(self.weight_decay >= 0, "weight_decay must be 0 or more")
        _require(self.loader_workers >= 0, "loader_workers must be 0 or more")
        _require(0 <= self.seed < 2**32, "seed must be from 0 to 4294967295")


@dataclass(frozen=True)
class GuardOptions:
    """What happens at a step whose loss or gradient is not finite, or whose loss leaps."""

    on_bad_step: Literal["stop", "skip"] = "stop"
    skip_limit: int = 10
    spike: float | None = None
    spike_window: int = 100

    def __post_init__(self) -> None:
        _require(self.skip_limit >= 0, "skip_limit must be 0 or more")
        _require(self.spike is None or self.spike > 0, "spike must be above 0 standard deviations, or null for none")
        _require(self.spike_window > 1, "spike_window must be at least 2 steps")


@dataclass(frozen=True)
class EvaluationOptions:
    """How the held-out loss is measured: always on the same examples with the same masks."""

    every: int = 500
    examples: int | None = 512
    batch_size: int = 8
    seed: int = 0
    samples: int = 1

    def __post_init__(self) -> None:
        _require(self.every > 0, "every must be at least 1 step")
        _require(self.examples is None or self.examples > 1, "examples must be at least 2, or null for all")
        _require(self.batch_size > 0, "batch_size must be at least 1")
        _require(self.seed >= 0, "seed must be 0 or more")
        _require(self.samples >= 0, "samples must be 0 or more")


@dataclass(frozen=True)
class OutputOptions:
    """Where the run writes, and how often."""

    folder: str
    log_every: int = 10
    save_every: int = 500
    keep_checkpoints: int = 2
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()

    def __post_init__(self) -> None:
        _require(self.folder != "", "folder is empty; give the folder that the run writes to")
        _require(self.log_every > 0, "log_every must be at least 1 step")
        _require(self.keep_checkpoints > 0, "keep_checkpoints must be at least 1")
        _require(self.save_every > 0, "save_every must be at least 1 step")


def optimizer_names() -> list[str]:
    """List the optimizers that a recipe may name: FAT5's own, and those of `transformers`."""
    return ["adamw_scale", *OPTIMIZERS]


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
