"""`transformers.Trainer` with what UL2 pretraining needs and it does not do by itself."""

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from fat5.train.errors import TrainingError
from fat5.train.held_out import measure, summarise

Collator = Callable[[Any], dict[str, Tensor]]


class PretrainingTrainer(Trainer):
    """Exact losses: per real target token over a whole step, and per denoiser on held-out text.

    Args:
        model: a model that divides its summed loss by `num_items_in_batch`.
        args: as for `Trainer`; `max_steps` is the length of the run.
        batches: all batches of the run, whole and in the order in which they are used; with P processes, process p
            takes batches p, p + P, p + 2 P and so on. Each must be the same whenever it is asked for.
        held_out: the examples of the held-out text; None if the run is not evaluated.
        held_out_collator: makes batches of them, always the same.
        denoisers: the names behind the ids in a batch's `denoiser`.
        tokenizer: saved beside the weights of every checkpoint.
        callbacks: as for `Trainer`.
    """

    model: PreTrainedModel  # as given below, where Trainer allows for None
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR
    train_dataset: Any  # of whole batches

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        batches: Dataset[dict[str, Any]],
        held_out: Dataset[Any] | None,
        held_out_collator: Collator,
        denoisers: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback],
    ) -> None:
        # The tokenizer is not given to Trainer, which would write its ids over those of the model's config.
        use_cache = model.config.use_cache
        super().__init__(
            model,
            args,
            data_collator=itemgetter(0),
            train_dataset=batches,
            eval_dataset=held_out,
            callbacks=callbacks,
        )
        model.config.use_cache = use_cache  # Trainer clears it, and would save it so; it is off per call, below
        self.model_accepts_loss_kwargs = True  # have the targets of a whole step counted; see compute_loss
        self.held_out_collator = held_out_collator
        self.denoisers = list(denoisers)
        self.saved_tokenizer = tokenizer  # transformers 4 gives a meaning of its own to `tokenizer`
        self.checkpoints = str(args.output_dir)

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
        return super().compute_loss(model, _model_inputs(inputs), return_outputs, num_items_in_batch)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward.

        Raises:
            TrainingError: the loss is not finite; the weights have not been touched.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss became {loss.item()} at step {self.state.global_step + 1} (learning rate "
                f"{self.lr_scheduler.get_last_lr()[0]:.3g}); the run was stopped before the weights were "
                "changed. Lower training.learning_rate, lengthen training.warmup_steps or use "
                "training.precision=fp32, and start again"
            )
        return loss

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Decay matrices only: neither norms' weights nor the table of position biases."""
        named = model.named_parameters()
        return [name for name, p in named if p.ndim > 1 and "relative_attention_bias" not in name]

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
        )
        return self.accelerator.prepare(loader)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure and log the held-out loss, whole and per denoiser, each with its standard error."""
        examples = self.eval_dataset if eval_dataset is None else eval_dataset
        loader = self._loader(examples, self.args.per_device_eval_batch_size, self.held_out_collator)
        was_training = self.model.training
        self.model.eval()
        columns = measure(self._logits, loader, self.accelerator.gather_for_metrics)
        self.model.train(was_training)
        figures = summarise(*columns, self.denoisers, metric_key_prefix)
        self.log(figures)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    def _logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        with self.accelerator.autocast():
            return self.model(**_model_inputs(batch)).logits

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log without an epoch: to `Trainer` the whole run is one, and a mixture of corpora has none."""
        self.state.epoch = None  # type: ignore[assignment]  # Trainer leaves it out of the log then
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a complete FAT5 repo: weights, configuration, code files, and the tokenizer."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self.saved_tokenizer.save_pretrained(output_dir or self.checkpoints)


def _model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Leave out of a batch what only the figures need."""
    return {key: value for key, value in batch.items() if key != "denoiser"}
