"""A run of `fat5 pretrain`: from a recipe to a trained FAT5 repo, with its log and its pictures."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import transformers
from torch import distributed as dist
from transformers import TrainingArguments

from fat5.data.documents import DataError
from fat5.folders import write_file
from fat5.model.modeling_flash_t5 import FlashT5ForConditionalGeneration
from fat5.train import checkpoints, sharding
from fat5.train.arguments import training_arguments
from fat5.train.callbacks import JsonLines, LastStep, ProgressBar
from fat5.train.continuation import Claim, require_agreement, require_same_run
from fat5.train.corpora import pin_corpora, require_same_text
from fat5.train.data import load_data
from fat5.train.energy import Energy
from fat5.train.errors import Stopped, TrainingError
from fat5.train.fixed_shapes import FixedShapes
from fat5.train.folder import RunFolder
from fat5.train.guard import StepGuard
from fat5.train.load import add_rows, load_or_make, own_dropout
from fat5.train.progress import Progress
from fat5.train.recipe import Recipe, recipe_text
from fat5.train.report import device_name, write_report
from fat5.train.samples import Samples
from fat5.train.signals import StopSignals
from fat5.train.stream_trainer import StreamTrainer
from fat5.train.trainer import PretrainingTrainer


def pretrain(recipe: Recipe, resume: str = "auto") -> list[dict[str, Any]]:
    """Do the run that a recipe describes, or what is left of it.

    Args:
        recipe: what to train, on what, and where to write.
        resume: `auto`, `never` or the path of a checkpoint; see `fat5.train.checkpoints.choose`.

    Returns:
        The log: an entry for each logged step and each evaluation, as in `log.jsonl`.

    Raises:
        TrainingError: the run cannot start or go on; the message says what to change.
        Stopped: a signal asked for it; what was done is saved.
        RecipeError: the recipe that an earlier run left in the output folder cannot be read.
    """
    folder = RunFolder(Path(recipe.output.folder))
    checkpoint = checkpoints.choose(resume, folder.checkpoints)
    if checkpoint is not None:
        require_same_run(recipe, folder, checkpoint)
    args = training_arguments(recipe, folder, fresh=checkpoint is None)
    require_agreement(folder, checkpoint)
    signals, energy = StopSignals(), Energy()
    try:
        pinned = pin_corpora(recipe, folder, fresh=checkpoint is None)
        trainer = _trainer(pinned, args, folder, signals)
        # The run's dropout is not the model's: who fine-tunes it later gets the rate that it came with. It is read now:
        # what the model was loaded from need not be there at the end.
        dropout_rate = own_dropout(recipe.model)
        trainer.add_callback(energy)
        text = require_same_text(pinned, trainer.train_dataset, folder, fresh=checkpoint is None)
        if checkpoint is not None and isinstance(trainer, StreamTrainer):
            trainer.begin_at(checkpoint)
        with Claim(folder) if args.should_save else nullcontext():
            if args.should_save:
                write_file(folder.recipe, recipe_text(recipe).encode())
                write_file(folder.corpora, json.dumps(text).encode())
            with signals:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            step = trainer.state.global_step
            if trainer.guard.stopped_by is not None and step < recipe.training.steps:
                raise Stopped(trainer.guard.stopped_by, folder.checkpoint(step))
            trainer.model.config.dropout_rate = dropout_rate
            _finish(trainer, recipe, folder, energy)
    except DataError as error:  # found only when an example was to be built
        # That of a process that prepares batches has its traceback in front.
        raise TrainingError(str(error).rpartition("DataError: ")[2].strip()) from error
    except Exception as error:
        tracker = type(error).__module__.partition(".")[0]
        if tracker not in recipe.output.report_to:
            raise
        raise TrainingError(
            f"output.report_to: {tracker} does not take the log ({error}). Mend that, or leave it out"
        ) from error
    return trainer.state.log_history


def _trainer(recipe: Recipe, args: TrainingArguments, folder: RunFolder, signals: StopSignals) -> PretrainingTrainer:
    training = recipe.training
    model, tokenizer = load_or_make(recipe)
    batches_per_step = args.gradient_accumulation_steps * args.world_size
    with args.main_process_first(desc="tokenising"):
        data = load_data(recipe, tokenizer, model.config.vocab_size, batches_per_step)
    add_rows(model, data.mixture.ids.rows)
    if training.gradient_checkpointing:
        # The name since transformers 5.19 or so, and the one before it.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    if training.parallel == "fsdp":
        sharding.shard(model, args.device)
    progress = Progress()

    def examples(step: int) -> list[dict[str, Any]]:
        if isinstance(trainer, StreamTrainer):
            return [{"behind": trainer.place}]
        numbers = range(step * batches_per_step, (step + 1) * batches_per_step)
        return [example for number in numbers for example in data.describe(number, tokenizer)]

    trainer_class = StreamTrainer if recipe.data.train[0].streaming else PretrainingTrainer
    trainer = trainer_class(
        model,
        args,
        training,
        batches=data.batches,
        held_out=data.held_out,
        held_out_collator=data.held_out_collator,
        denoisers=data.denoisers,
        tokenizer=tokenizer,
        progress=progress,
        guard=StepGuard(recipe.guard, progress, folder.bad_steps, examples, signals),
        shapes=_shapes_of_graphs(recipe, model, args, data.mixture.ids.pad),
        callbacks=[JsonLines(folder.log), LastStep(), ProgressBar()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    if data.held_out is not None and recipe.evaluation.samples:
        each, autocast = recipe.evaluation.samples, trainer.accelerator.autocast
        held_out = data.held_out, data.held_out_collator, data.denoisers
        trainer.add_callback(Samples(folder.samples, *held_out, each, tokenizer, autocast))
    return trainer


def _shapes_of_graphs(
    recipe: Recipe, model: FlashT5ForConditionalGeneration, args: TrainingArguments, pad: int
) -> FixedShapes | None:
    """Say how batches are laid out for CUDA graphs; None where steps are not run in them.

    That is without the kernels, which alone take a stream; with a position bias that is a matrix, which would be one of
    the whole stream; with several processes, whose exchange of gradients is not captured; where activations are
    recomputed, which reads the state of the random numbers; and with positions drawn at random, which are drawn for
    rows.
    """
    data, training = recipe.data, recipe.training
    alone = not (dist.is_available() and dist.is_initialized())
    kernels = args.device.type == "cuda" and model.encoder.may_pack(args.device, model.dtype)
    if not (training.cuda_graphs and alone and kernels):
        return None
    config = model.config
    if training.gradient_checkpointing or config.has_dense_bias or config.use_randomized_position_encoding:
        return None
    rows, longest = training.micro_batch_size, (data.max_input_length, data.max_target_length)
    return FixedShapes(rows * longest[0], rows * longest[1], *longest, pad)


def _finish(trainer: PretrainingTrainer, recipe: Recipe, folder: RunFolder, energy: Energy) -> None:
    """Save the trained repo, whole or not at all, and the report."""
    staged = folder.root / checkpoints.STAGING
    if trainer.args.should_save:
        shutil.rmtree(staged, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.save_model(str(staged))
        if not trainer.args.should_save:  # another process does
            return
        (staged / "training_args.bin").unlink(missing_ok=True)  # a pickle, which a published repo must not hold
        facts = {
            "device": device_name(trainer.args.device),
            "processes": f"{trainer.args.world_size} ({recipe.training.parallel})",
            "parameters": f"{sum(p.numel() for p in trainer.model.parameters()):,}",
            "precision": recipe.training.precision,
            "energy": energy.fact,
        }
        write_report(recipe, folder, staged, trainer.state.log_history, facts)
        checkpoints.put_in_place(staged, folder.model)
    except checkpoints.WRITE_ERRORS as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise TrainingError(
            f"the trained model could not be written to {folder.model} ({error}); the last checkpoint is whole. "
            "Make room and give the same command again"
        ) from error
