"""A run of `fat5 pretrain`: from a recipe to a trained FAT5 repo, with its log and its picture."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainingArguments, get_scheduler

from fat5.train import checkpoints
from fat5.train.callbacks import JsonLines, LogLastStep, ProgressBar, StopOnBadGradient
from fat5.train.data import load_data
from fat5.train.errors import TrainingError
from fat5.train.folder import RunFolder
from fat5.train.load import add_rows, load_model, load_tokenizer, own_dropout
from fat5.train.recipe import Recipe, differences, load_recipe, recipe_text
from fat5.train.report import draw_losses, summarise_run
from fat5.train.stream_trainer import StreamTrainer
from fat5.train.trainer import PretrainingTrainer
from fat5.train.typed import to_plain


def pretrain(recipe: Recipe, resume: str = "auto") -> list[dict[str, Any]]:
    """Do the run that a recipe describes, or what is left of it.

    Args:
        recipe: what to train, on what, and where to write.
        resume: `auto`, `never` or the path of a checkpoint; see `fat5.train.checkpoints.choose`.

    Returns:
        The log: an entry for each logged step and each evaluation, as in `log.jsonl`.

    Raises:
        TrainingError: the run cannot start or go on; the message says what to change.
        RecipeError: the recipe that an earlier run left in the output folder cannot be read.
    """
    folder = RunFolder(Path(recipe.output.folder))
    checkpoint = checkpoints.choose(resume, folder.checkpoints)
    if checkpoint is not None:
        _require_same_run(recipe, folder)
    args = training_arguments(recipe, folder, fresh=checkpoint is None)
    trainer = _trainer(recipe, args, folder)
    if args.should_save:
        folder.root.mkdir(parents=True, exist_ok=True)
        folder.recipe.write_text(recipe_text(recipe), encoding="utf-8")
    if checkpoint is not None and isinstance(trainer, StreamTrainer):
        trainer.begin_at(checkpoint)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    _finish(trainer, recipe, folder)
    return trainer.state.log_history


def training_arguments(recipe: Recipe, folder: RunFolder, fresh: bool) -> TrainingArguments:
    """Translate a recipe into the arguments of `transformers.Trainer`.

    Args:
        recipe: the recipe.
        folder: where the checkpoints go.
        fresh: whether the run starts at step 0, where the first evaluation is.

    Raises:
        TrainingError: the batch does not divide among the processes, one process would drive several GPUs, or the
            schedule does not take its options.
    """
    training, evaluation, output = recipe.training, recipe.evaluation, recipe.output
    evaluates = bool(recipe.data.evaluation)
    args = TrainingArguments(
        output_dir=str(folder.checkpoints),
        max_steps=training.steps,
        per_device_train_batch_size=training.micro_batch_size,
        per_device_eval_batch_size=evaluation.batch_size,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        lr_scheduler_kwargs=training.schedule_options,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_epsilon=training.adam_epsilon,
        max_grad_norm=training.max_grad_norm,
        bf16=training.precision == "bf16",
        seed=training.seed,
        full_determinism=training.deterministic,
        use_cpu=training.device == "cpu" or not torch.accelerator.is_available(),
        dataloader_num_workers=training.loader_workers,
        average_tokens_across_devices=True,
        logging_steps=output.log_every,
        logging_nan_inf_filter=False,  # the trainer stops there instead
        eval_strategy="steps" if evaluates else "no",
        eval_steps=evaluation.every,
        eval_on_start=evaluates and fresh,
        save_steps=output.save_every,
        save_total_limit=output.keep_checkpoints,
        report_to="none",
        disable_tqdm=True,
    )
    if args.n_gpu > 1:
        raise TrainingError(
            f"{args.n_gpu} GPUs are visible to one process; start one process for each, `torchrun --nproc-per-node "
            f"{args.n_gpu} -m fat5.cli pretrain ...`, or show it only one with CUDA_VISIBLE_DEVICES"
        )
    _require_schedule(recipe)
    at_once = training.micro_batch_size * args.world_size
    if training.batch_size % at_once:
        raise TrainingError(
            f"training.batch_size {training.batch_size} is no multiple of micro_batch_size {training.micro_batch_size} "
            f"times {args.world_size} processes"
        )
    args.gradient_accumulation_steps = training.batch_size // at_once
    return args


def _require_schedule(recipe: Recipe) -> None:
    """Try the schedule out, which `Trainer` would only do after everything else is ready."""
    training = recipe.training
    try:
        get_scheduler(
            training.schedule,
            torch.optim.SGD([torch.zeros(1)], lr=training.learning_rate),
            training.warmup_steps,
            training.steps,
            training.schedule_options,
        )
    except (TypeError, ValueError) as error:
        raise TrainingError(f"training.schedule_options do not fit schedule {training.schedule}: {error}") from error


def _trainer(recipe: Recipe, args: TrainingArguments, folder: RunFolder) -> PretrainingTrainer:
    model = load_model(recipe.model)
    tokenizer = load_tokenizer(recipe.model, model.config)
    with args.main_process_first(desc="tokenising"):
        batches_per_step = args.gradient_accumulation_steps * args.world_size
        data = load_data(recipe, tokenizer, model.config.vocab_size, batches_per_step)
    add_rows(model, data.mixture.ids.rows)
    if recipe.training.gradient_checkpointing:
        # The name since transformers 5.19 or so, and the one before it.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    trainer_class = StreamTrainer if recipe.data.train[0].streaming else PretrainingTrainer
    trainer = trainer_class(
        model,
        args,
        batches=data.batches,
        held_out=data.held_out,
        held_out_collator=data.held_out_collator,
        denoisers=data.denoisers,
        tokenizer=tokenizer,
        callbacks=[JsonLines(folder.log), LogLastStep(), StopOnBadGradient(), ProgressBar()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _require_same_run(recipe: Recipe, folder: RunFolder) -> None:
    """Refuse to continue a run under a recipe that would have made another run of it."""
    if not folder.recipe.is_file():
        return
    changed = differences(load_recipe(folder.recipe), recipe)
    if changed:
        raise TrainingError(
            f"{folder.root} holds a run of another recipe ({'; '.join(changed)}); "
            "give another output.folder for a new run, or the old values to continue that one"
        )


def _finish(trainer: PretrainingTrainer, recipe: Recipe, folder: RunFolder) -> None:
    """Save the trained repo, the picture and the summary."""
    log = trainer.state.log_history
    # The run's dropout is not the model's: who fine-tunes it later gets the rate that it came with.
    trainer.model.config.dropout_rate = own_dropout(recipe.model)
    trainer.save_model(str(folder.model))
    if not trainer.args.should_save:  # another process does
        return
    (folder.model / "training_args.bin").unlink(missing_ok=True)  # a pickle, which a published repo must not hold
    draw_losses(log, folder.picture, title=f"Pretraining: {folder.root.name}")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    summary = {**summarise_run(log), "recipe": to_plain(recipe), "versions": versions}
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    (folder.model / "training.json").write_text(text + "\n", encoding="utf-8")
