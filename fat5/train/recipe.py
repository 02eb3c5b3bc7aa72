"""The recipe of a run: one YAML file, typed, in which every key is known.

`load_recipe` reads a file and the `--set a.b=c` changes to it into a `Recipe`. What is wrong is reported with
the key's full path and, for a misspelt key, the name that was probably meant. The defaults are here and in
`fat5.data.options`; `recipes/ul2.yaml` says in plain words what each field does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from fat5.data.options import DataOptions, MixtureOptions
from fat5.train.typed import FieldError, build, to_plain

# The schedules of transformers that need nothing but the step.
Schedule = Literal[
    "linear",
    "cosine",
    "inverse_sqrt",
    "constant_with_warmup",
    "polynomial",
    "warmup_stable_decay",
    "cosine_with_min_lr",
]


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the key, or the file, and what to change."""


@dataclass(frozen=True)
class ModelOptions:
    """Which model is trained, and what of its configuration is changed for the run."""

    path: str
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
    learning_rate: float = 1e-3
    schedule: Schedule = "linear"
    schedule_options: dict[str, Any] = field(default_factory=dict)
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    seed: int = 0
    deterministic: bool = False
    device: Literal["auto", "cpu"] = "auto"
    loader_workers: int = 0

    def __post_init__(self) -> None:
        _require(self.steps > 0, "steps must be at least 1")
        _require(self.micro_batch_size > 0, "micro_batch_size must be at least 1")
        _require(
            self.batch_size > 0 and self.batch_size % self.micro_batch_size == 0,
            f"batch_size {self.batch_size} must be a multiple of micro_batch_size {self.micro_batch_size}",
        )
        _require(self.learning_rate > 0, "learning_rate must be above 0")
        _require(0 <= self.warmup_steps <= self.steps, "warmup_steps must be from 0 to steps")
        _require(self.max_grad_norm >= 0, "max_grad_norm must be 0 (no clipping) or more")
        _require(self.weight_decay >= 0, "weight_decay must be 0 or more")
        _require(self.loader_workers >= 0, "loader_workers must be 0 or more")
        _require(self.seed >= 0, "seed must be 0 or more")


@dataclass(frozen=True)
class EvaluationOptions:
    """How the held-out loss is measured: always on the same examples with the same masks."""

    every: int = 500
    examples: int | None = 512
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.every > 0, "every must be at least 1 step")
        _require(self.examples is None or self.examples > 1, "examples must be at least 2, or null for all")
        _require(self.batch_size > 0, "batch_size must be at least 1")
        _require(self.seed >= 0, "seed must be 0 or more")


@dataclass(frozen=True)
class OutputOptions:
    """Where the run writes, and how often."""

    folder: str
    log_every: int = 10
    save_every: int = 500
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        _require(self.folder != "", "folder is empty; give the folder that the run writes to")
        _require(self.log_every > 0, "log_every must be at least 1 step")
        _require(self.keep_checkpoints > 0, "keep_checkpoints must be at least 1")
        # A logged training loss is a mean over log_every steps; a resumed run can only continue whole means.
        _require(
            self.save_every > 0 and self.save_every % self.log_every == 0,
            f"save_every {self.save_every} must be a multiple of log_every {self.log_every}, so that a resumed"
            " run logs the same losses as an undisturbed one",
        )


@dataclass(frozen=True)
class Recipe:
    """A whole run of `fat5 pretrain`."""

    model: ModelOptions
    data: DataOptions
    training: TrainingOptions
    output: OutputOptions
    mixture: MixtureOptions = field(default_factory=MixtureOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def load_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: the YAML file.
        changes: `a.b=c` settings laid over the file, in order; the value is read as YAML.

    Raises:
        RecipeError: the file cannot be read, is not YAML, lacks a required key, or has an unknown key or
            a value that its field does not take.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"the recipe {path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"the recipe {path} must be YAML sections such as model, data, training, output")
    for change in changes:
        _apply_change(raw, change)
    try:
        return build(Recipe, raw)
    except FieldError as error:
        raise RecipeError(f"{error} (recipe {path})") from error


def _apply_change(raw: dict[str, Any], change: str) -> None:
    """Lay one `a.b=c` over the raw recipe, making the sections on the way that are not there."""
    key, equals, text = change.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise RecipeError(f"--set {change}: write it as section.key=value, for example training.steps=1000")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {change}: the value is not valid YAML: {error}") from error
    section = raw
    for depth, name in enumerate(names[:-1], start=1):
        inner = section.setdefault(name, {})
        if inner is None:  # `data:` with nothing under it
            inner = section[name] = {}
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {change}: {'.'.join(names[:depth])} is a value, not a section")
        section = inner
    section[names[-1]] = value


def recipe_text(recipe: Recipe) -> str:
    """Write a recipe as YAML, every default filled in; `load_recipe` reads it back to an equal one."""
    return yaml.safe_dump(to_plain(recipe), sort_keys=False, allow_unicode=True)


# What may change between a run and its continuation: the rest would make it another run.
_MAY_CHANGE = (
    "training.steps",
    "training.device",
    "training.loader_workers",
    "training.micro_batch_size",
    "output",
)


def differences(before: Recipe, after: Recipe) -> list[str]:
    """List, as `key: old -> new`, by which keys `after` would not continue the run of `before`."""
    old, new = _flat(to_plain(before)), _flat(to_plain(after))
    may_change: tuple[str, ...] = _MAY_CHANGE
    if after.data.packing == "stream" or after.data.train[0].streaming:
        # A stream is packed in pieces of a micro-batch, and the place in streamed corpora is counted in them.
        may_change = tuple(key for key in _MAY_CHANGE if key != "training.micro_batch_size")
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in old | new
        if old.get(key) != new.get(key) and not key.startswith(may_change)
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves |= _flat(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves
