"""The recipe of a run: one YAML file, typed, in which every key is known.

`load_recipe` reads a file and the `--set a.b=c` changes to it into a `Recipe`. What is wrong is reported with
the key's full path and, for a misspelt key, the name that was probably meant. The defaults are in
`fat5.train.options` and `fat5.data.options`; `recipes/ul2.yaml` says in plain words what each field does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from fat5.data.options import DataOptions, MixtureOptions
from fat5.train.options import EvaluationOptions, GuardOptions, ModelOptions, OutputOptions, TrainingOptions
from fat5.train.typed import FieldError, build, to_plain


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the key, or the file, and what to change."""


@dataclass(frozen=True)
class Recipe:
    """A whole run of `fat5 pretrain`."""

    model: ModelOptions
    data: DataOptions
    training: TrainingOptions
    output: OutputOptions
    mixture: MixtureOptions = field(default_factory=MixtureOptions)
    guard: GuardOptions = field(default_factory=GuardOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a section, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ConstructorError(None, None, f"{key.value} stands there twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


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
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
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


# What may change between a run and its continuation: the rest would make it another run. Steps and options of the
# schedule may as long as the learning rates of the steps already done stay the same, which is checked apart.
_MAY_CHANGE = (
    "data.cache",
    "training.steps",
    "training.schedule_options",
    "training.device",
    "training.cuda_graphs",
    "training.loader_workers",
    "training.micro_batch_size",
    "guard",
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
