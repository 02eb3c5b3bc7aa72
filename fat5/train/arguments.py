"""A recipe as the arguments of `transformers.Trainer`."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from transformers import TrainingArguments

from fat5.train.errors import TrainingError
from fat5.train.folder import RunFolder
from fat5.train.optimization import rates, require_optimizer
from fat5.train.recipe import Recipe
from fat5.train.typed import to_plain


class RecipeArguments(TrainingArguments):
    """Arguments that tell a tracker of the recipe that they come from.

    What they would tell of themselves is not the run: its optimizer, schedule and warm-up are made beside them, and of
    its text and denoisers they know nothing.
    """

    recipe: Recipe

    def to_dict(self) -> dict[str, Any]:
        """Give what the integrations of `transformers` record as a run's configuration."""
        plain: dict[str, Any] = to_plain(self.recipe)
        return plain


def require_trackers(names: Sequence[str]) -> None:
    """Check that the packages of trackers are installed.

    Raises:
        TrainingError: one is not.
    """
    for name in names:
        if find_spec(name) is None:
            raise TrainingError(f"output.report_to names {name}, which is not installed: `pip install {name}`")


def training_arguments(recipe: Recipe, folder: RunFolder, fresh: bool) -> TrainingArguments:
    """Translate a recipe into the arguments of `transformers.Trainer`.

    Args:
        recipe: the recipe.
        folder: where the checkpoints go.
        fresh: whether the run starts at step 0, where the first evaluation is.

    Raises:
        TrainingError: the batch does not divide among the processes, one process would drive several GPUs, or
            optimizer, schedule or a tracker cannot be had.
    """
    training, evaluation, output = recipe.training, recipe.evaluation, recipe.output
    evaluates = bool(recipe.data.evaluation)
    on_cpu = training.device == "cpu" or not torch.accelerator.is_available()
    require_trackers(output.report_to)
    args = RecipeArguments(
        output_dir=str(folder.checkpoints),
        max_steps=training.steps,
        per_device_train_batch_size=training.micro_batch_size,
        per_device_eval_batch_size=evaluation.batch_size,
        optim="adamw_torch" if training.optimizer == "adamw_scale" else training.optimizer,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_epsilon=training.adam_epsilon,
        max_grad_norm=training.max_grad_norm,
        bf16=training.precision == "bf16",
        seed=training.seed,
        full_determinism=training.deterministic,
        use_cpu=on_cpu,
        ddp_find_unused_parameters=False,  # all are used in every step; looking for others costs time
        dataloader_num_workers=training.loader_workers,
        average_tokens_across_devices=True,
        logging_steps=output.log_every,
        logging_nan_inf_filter=False,  # the guard looks at that
        eval_strategy="steps" if evaluates else "no",
        eval_steps=evaluation.every,
        eval_on_start=evaluates and fresh,
        save_steps=output.save_every,
        save_total_limit=output.keep_checkpoints,
        report_to=list(output.report_to) or "none",
        run_name=folder.root.name,
        disable_tqdm=True,
    )
    args.recipe = recipe
    if args.n_gpu > 1:
        raise TrainingError(
            f"{args.n_gpu} GPUs are visible to one process; start one process for each, `torchrun --nproc-per-node "
            f"{args.n_gpu} -m fat5.cli pretrain ...`, or show it only one with CUDA_VISIBLE_DEVICES"
        )
    rates(training)  # tries the schedule out, which Trainer would only do after everything else is ready
    require_optimizer(training, args)
    at_once = training.micro_batch_size * args.world_size
    if training.batch_size % at_once:
        raise TrainingError(
            f"training.batch_size {training.batch_size} is no multiple of micro_batch_size {training.micro_batch_size} "
            f"times {args.world_size} processes"
        )
    args.gradient_accumulation_steps = training.batch_size // at_once
    return args
