"""`transformers.Trainer` with what UL2 pretraining needs and it does not do by itself."""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fat5.data.save_tokenizer import save_tokenizer
from fat5.model.modeling_flash_t5 import FlashT5ForConditionalGeneration
from fat5.train import checkpoints, sharding
from fat5.train.errors import TrainingError
from fat5.train.fixed_shapes import FixedShapes
from fat5.train.flops import count
from fat5.train.graphed_step import GraphedStep
from fat5.train.guard import StepGuard
from fat5.train.held_out import measure, summarise
from fat5.train.optimization import make_schedule, own_optimizer
from fat5.train.options import TrainingOptions
from fat5.train.progress import Progress
from fat5.train.signals import outlive_first
from fat5.train.throughput import Throughput

Collator = Callable[[Any], dict[str, Tensor]]


class PretrainingTrainer(Trainer):
    """Exact losses, per real target token over a whole step; whole checkpoints; held-out figures per denoiser.

    Args:
        model: a model that divides its summed loss by `num_items_in_batch`; sharded by `fat5.train.sharding`, or not.
        args: as for `Trainer`; `max_steps` is the length of the run.
        options: the recipe's optimizer and schedule.
        batches: all batches of the run, whole and in the order in which they are used; with P processes, process p
            takes batches p, p + P, p + 2 P and so on. Each must be the same whenever it is asked for.
        held_out: the examples of the held-out text; None if the run is not evaluated.
        held_out_collator: makes batches of them, always the same.
        denoisers: the names behind the ids in a batch's `denoiser`.
        tokenizer: saved beside the weights of every checkpoint.
        progress: the run's memory, kept in the checkpoints.
        guard: judges each step.
        shapes: lays the batches out for CUDA graphs, in which the passes then run; None for batches as they are.
        callbacks: as for `Trainer`.
    """

    model: FlashT5ForConditionalGeneration  # as given below, where Trainer allows for None
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR
    train_dataset: Any  # of whole batches

    def __init__(
        self,
        model: FlashT5ForConditionalGeneration,
        args: TrainingArguments,
        options: TrainingOptions,
        *,
        batches: Dataset[dict[str, Any]],
        held_out: Dataset[Any] | None,
        held_out_collator: Collator,
        denoisers: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        progress: Progress,
        guard: StepGuard,
        shapes: FixedShapes | None = None,
        callbacks: list[TrainerCallback],
    ) -> None:
        # The tokenizer is not given to Trainer, which would write its ids over those of the model's config.
        config: Any = model.config
        use_cache = config.use_cache
        self.throughput = Throughput(config, args.device)
        super().__init__(
            model,
            args,
            data_collator=partial(_counted, shapes=shapes),
            train_dataset=batches,
            eval_dataset=held_out,
            callbacks=[guard, self.throughput, *callbacks],
            optimizer_cls_and_kwargs=own_optimizer(options),
        )
        config.use_cache = use_cache  # Trainer clears it, and would save it so; it is off per call, below
        self.model_accepts_loss_kwargs = True  # have the targets of a whole step counted; see compute_loss
        self.options = options
        self.held_out_collator = held_out_collator
        self.denoisers = list(denoisers)
        self.saved_tokenizer = tokenizer  # transformers 4 gives a meaning of its own to `tokenizer`
        self.progress = progress
        self.guard = guard
        self.checkpoints = Path(str(args.output_dir))
        self._written_to = self.checkpoints
        self._in_graphs = shapes is not None
        self._graphed_step: GraphedStep | None = None

    # ---- the step

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Fetch the batches of a step, with the clock running, and count their targets over all processes."""
        return super().get_batch_samples(self.throughput.timed(epoch_iterator), num_batches, device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return this forward pass's share of the step's loss: its sum over targets, by the step's number.

        The shares of a step add up to the mean over its real targets, however it is split into forward passes
        and processes; a mean of means would favour the targets of short batches.
        """
        with self.accelerator.autocast():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward; what it came to is judged before the optimizer's step."""
        step = partial(super().training_step, model)
        if self._in_graphs:
            if self._graphed_step is None:
                self._graphed_step = GraphedStep(step, [p for p in model.parameters() if p.requires_grad])
            targets = torch.as_tensor(num_items_in_batch, device=self.args.device)
            loss = self._graphed_step(_model_inputs(inputs), targets)
        else:
            loss = step(_model_inputs(inputs), num_items_in_batch)
        self.guard.add(loss, inputs["counts"].tokens)
        return loss

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Decay matrices only: neither norms' weights nor the table of position biases."""
        named = model.named_parameters()
        return [name for name, p in named if p.ndim > 1 and "relative_attention_bias" not in name]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the schedule that the recipe names."""
        if self.lr_scheduler is None:
            self.lr_scheduler = make_schedule(self.options, optimizer or self.optimizer)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_train_dataloader(self) -> DataLoader:
        """Read the run's batches in order. An item being a whole batch, the loader's batches are of one item."""
        return self._loader(self.train_dataset, 1, self.data_collator)

    def _loader(self, dataset: Any, batch_size: int, collator: Collator) -> DataLoader:
        loader = DataLoader(
            dataset,
            batch_size=batch_size,
            collate_fn=collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),  # else every evaluation would draw from the stream that dropout uses
            worker_init_fn=outlive_first,
        )
        return self.accelerator.prepare(loader)

    # ---- what is measured

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure and log the held-out figures, whole and per denoiser; see `fat5.train.held_out`."""
        examples = self.eval_dataset if eval_dataset is None else eval_dataset
        loader = self._loader(examples, self.args.per_device_eval_batch_size, self.held_out_collator)
        was_training = self.model.training
        self.model.eval()
        measured = measure(self._logits, loader, self.accelerator.gather_for_metrics)
        self.model.train(was_training)
        figures = summarise(measured, self.denoisers, metric_key_prefix)
        self.log(figures)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    def _logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        with self.accelerator.autocast():
            return self.model(**_model_inputs(batch)).logits

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log without an epoch: to `Trainer` the whole run is one, and a mixture of corpora has none.

        The training loss is the mean over all steps since the last entry, before and after an interruption.
        """
        self.state.epoch = None  # type: ignore[assignment]  # Trainer leaves it out of the log then
        if "loss" in logs:
            losses = self.progress.unlogged
            if losses:
                logs["loss"] = math.fsum(losses) / len(losses)
            else:  # all steps were skipped
                del logs["loss"]
            losses.clear()
            logs |= {"tokens": self.progress.tokens, "skipped_steps": self.progress.skipped}
            logs |= self.throughput.figures()
        logs.pop("train_loss", None)  # Trainer's sum over the steps since the last start, divided by all there were
        super().log(logs, start_time)

    # ---- what is saved

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a complete FAT5 repo: weights, configuration, code files, and the tokenizer.

        On all processes, since the parts of a sharded model are collected for it.
        """
        folder = output_dir or str(self.checkpoints)
        if sharding.is_sharded(self.model):
            weights = sharding.whole_weights(self.model)
            if self.args.should_save:
                # Of an unsharded model without memory: the sharded one is of a class of torch's, whose code would
                # be saved instead of ours.
                config: Any = self.model.config
                with torch.device("meta"):
                    plain = FlashT5ForConditionalGeneration(config)
                plain.generation_config = self.model.generation_config
                plain.save_pretrained(folder, state_dict=weights)
        else:
            super().save_model(folder, _internal_call)
        if self.args.should_save:
            save_tokenizer(self.saved_tokenizer, folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint that is whole or not there.

        Raises:
            TrainingError: it could not be written; the earlier ones are as they were.
        """
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = self.checkpoints / checkpoints.STAGING
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._written_to = staging
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.progress.save(staging / name)
                checkpoints.seal(staging / name, self.checkpoints / name)
                shutil.rmtree(staging)  # with the code files that the model puts beside a checkpoint
        except torch.OutOfMemoryError:
            raise
        except checkpoints.WRITE_ERRORS as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise TrainingError(self._not_saved(name, error)) from error
        finally:
            self._written_to = self.checkpoints
        if self.args.should_save and self.args.save_total_limit is not None:
            checkpoints.rotate(self.checkpoints, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _not_saved(self, name: str, error: Exception) -> str:
        free = shutil.disk_usage(self.checkpoints).free / 2**30
        last = checkpoints.newest(self.checkpoints)
        kept = f"the last good one is {last}" if last else "there is no earlier one"
        return (
            f"{self.checkpoints / name} could not be written ({error}); {free:.1f} GiB are free there. Nothing "
            f"half-written is left, and {kept}. Make room and give the same command again"
        )

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._written_to)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not sharding.is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        sharding.save_shards(self.model, _bare(self.optimizer), Path(output_dir) / sharding.FOLDER)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not sharding.is_sharded(self.model):  # else the weights are loaded with the optimizer's state
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if sharding.is_sharded(self.model):
            sharding.load_shards(self.model, _bare(self.optimizer), folder / sharding.FOLDER)
            self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        self.progress.load(folder)


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """Give the optimizer that accelerate has wrapped."""
    return getattr(optimizer, "optimizer", optimizer)


def _counted(items: list[dict[str, Any]], shapes: FixedShapes | None) -> dict[str, Any]:
    """Take the batch out of the loader's list of one, and count it and lay it out while it is on the host."""
    [batch] = items
    counts = count(batch)
    if shapes is not None:
        batch = shapes.stream(batch)
        counts = replace(counts, places=batch["input_ids"].numel() + batch["labels"].numel())
    return {**batch, "counts": counts}


def _model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of a batch what only the figures need."""
    return {key: value for key, value in batch.items() if key not in ("denoiser", "counts")}
