"""Training on streamed corpora, which tell their own place in a checkpoint."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fat5.data.stream import StreamBatches
from fat5.train.errors import TrainingError
from fat5.train.signals import outlive_first
from fat5.train.trainer import PretrainingTrainer

STATE_FILE = "stream_state.json"


class StreamTrainer(PretrainingTrainer):
    """`PretrainingTrainer` over `StreamBatches`.

    A checkpoint holds the place behind the last batch that was used, in `stream_state.json`. A resumed run begins
    there, where `Trainer` would read, tokenise and throw away all that comes before.
    """

    train_dataset: StreamBatches

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.train_dataset.process, self.train_dataset.processes = self.args.process_index, self.args.world_size
        self.place: dict[str, Any] | None = None

    def begin_at(self, checkpoint: Path) -> None:
        """Begin at the place that a checkpoint tells; before `train` is told to resume from it.

        Raises:
            TrainingError: the checkpoint does not tell the place.
        """
        path = checkpoint / STATE_FILE
        try:
            self.place = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise TrainingError(
                f"cannot read {path}, which tells the place in the streamed corpora: {error}; resume from another "
                "checkpoint"
            ) from error
        self.train_dataset.load_state(self.place)
        self.args.ignore_data_skip = True  # nothing before the place is read again

    def get_train_dataloader(self) -> DataLoader:
        """Read this process's batches: the stream itself keeps those of the others apart."""
        loader = DataLoader(
            self.train_dataset,
            batch_size=1,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),  # else its beginning would draw from the stream that dropout uses
            worker_init_fn=outlive_first,
        )
        return prepare_data_loader(
            loader,
            self.args.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,  # from one process to the others
        )

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward, and keep the place behind this batch."""
        self.place = inputs.pop("state")
        return super().training_step(model, inputs, num_items_in_batch)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as ever, and in a checkpoint the place: the last process has used the last batch of a step."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            return
        place = broadcast_object_list([self.place], from_process=self.args.world_size - 1)[0]
        if self.args.should_save:
            Path(output_dir or self.checkpoints, STATE_FILE).write_text(json.dumps(place), encoding="utf-8")
